"""Writes that autograd does not see: under `no_grad`, or through `.data` and `.detach()`.

After such a write a tensor has a new value and its old gradient. In the normal form, which is functional, the new value is
computed from the old one like any other, so which writes these are must be read from the captured graph.
"""

from __future__ import annotations

import torch
from torch import fx

from flashfuse.patterns.normal_form import NormalForm, captured_value


def unseen_writes(form: NormalForm, captured: fx.Graph) -> list[tuple[int, int]]:
    """Those of a form's writes, as (time, storage), that autograd does not see, or may not see.

    Autograd sees a write through any view of a tensor in all others, but `.data` and `.detach()` begin tensors of their own on
    the same storage. (Whether a captured value requires a gradient does not tell: its fake tensor shows the end of the graph.)
    """
    replaced = _replaced(form, captured)
    if not form.writes:
        return replaced
    disabled = _without_grad(form, captured)
    bases: dict[int, set[int]] = {}
    for origins in form.origins.values():
        for origin in origins:
            value = captured_value(origin)
            if value is not None:
                bases.setdefault(origin.storage, set()).add(id(value if value._base is None else value._base))
    unseen = [(time, storage) for time, storage in form.writes if time in disabled or len(bases.get(storage, ())) > 1]
    return unseen + replaced


def _replaced(form: NormalForm, captured: fx.Graph) -> list[tuple[int, int]]:
    """The calls of `Tensor.set_`, which exchanges the storage itself, with the storages of what they touch."""
    times = {form.times[node]: node for node in captured.nodes if node in form.times and _name(node) == "set_"}
    touched = [
        (time, origin.storage)
        for origins in form.origins.values()
        for origin in origins
        for time, node in times.items()
        if origin.node is node or origin.node in node.all_input_nodes
    ]
    return list(dict.fromkeys(touched))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _without_grad(form: NormalForm, captured: fx.Graph) -> set[int]:
    """The times of the captured calls that run while grad mode is off."""
    enabled = torch.is_grad_enabled()
    found = set()
    for node in captured.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled and node in form.times:
            found.add(form.times[node])
    return found
