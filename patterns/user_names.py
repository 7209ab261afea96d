"""What the user calls a tensor: for reports, so that a formula reads `bias[h, m, n]` and not `c0[h, m, n]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from flashfuse.patterns.normal_form import NormalForm

_TAKEN = frozenset("bhmnsxMN")  # indices, lengths, the score
_OWNERS = ("_parameters_", "_buffers_", "_modules_")


def capture_names(form: NormalForm, nodes: Sequence[fx.Node | None]) -> tuple[str, ...]:
    """A name for each, all different: the user's variable, parameter or argument, or else `c0`, `c1`, ...; None is a seed."""
    names: list[str] = []
    for place, node in enumerate(nodes):
        name = "seed" if node is None else _name(form, node)
        if not name or name in _TAKEN or not name.isidentifier():
            name = f"c{place}"
        names.append(f"{name}_{place}" if name in names else name)
    return tuple(names)


def _name(form: NormalForm, node: fx.Node) -> str:
    origins = form.origins.get(node, ())
    if not origins:
        return ""
    found = next((each.node for each in origins if each.node.op in ("placeholder", "get_attr")), origins[0].node)
    while found.op not in ("placeholder", "get_attr"):
        variable = re.sub(r"_\d+$", "", found.name)  # Dynamo names a result after the variable that it is kept in
        if variable.strip("_") != _called(found):
            return variable
        if not found.all_input_nodes or (len(found.all_input_nodes) > 1 and _called(found) != "getitem"):
            return ""
        found = found.all_input_nodes[0]
    return argument_name(str(found.target))


def _called(node: fx.Node) -> str:
    """The name that a node gets if no variable gives it one."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return target.rsplit(".", 1)[-1].strip("_").lower()


def argument_name(target: str) -> str:
    """The user's name in Dynamo's name of an argument: `L_self_parameters_bias_` and `l_self_bias` are `bias`."""
    name = re.sub(r"^[Ll]_", "", target).strip("_")
    for owner in _OWNERS:
        name = name.rsplit(owner, 1)[-1]
    return re.sub(r"^(?:self|kwargs|fn|args)_+", "", name).strip("_")
