"""A vmap in a captured graph, read as one call: Hugging Face's mask functions, mapped over all queries and keys.

Dynamo captures the entering of the levels, the calls on batched tensors, and the leaving. By themselves these calls mean
nothing, but the whole section is a function of ordinary tensors, and make_fx below functorch sees the ATen calls on the
tensors inside. Only a section all of whose values are masks and positions is read: an attention in one is no business of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flashfuse.patterns.call_traces import CallTrace, Held, Hole, NotByCalls, filled
from flashfuse.patterns.normal_form import is_opaque

_ENTER, _LEAVE, _LOAD = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"
_KNOWN = (_ENTER, _LEAVE, _LOAD, "_add_batch_dim", "_remove_batch_dim")


@dataclass(frozen=True)
class Section:
    """The captured nodes from entering the first level to leaving it, the one whose result is used behind them, and what they
    read from before."""

    nodes: tuple[fx.Node, ...]
    result: fx.Node
    inputs: tuple[fx.Node, ...]

    @property
    def last(self) -> fx.Node:
        """The node with which the section ends."""
        return self.nodes[-1]


def vmap_sections(graph: fx.Graph) -> list[Section]:
    """The sections of a captured graph. Raises NotByCalls if functorch does anything else than these vmaps."""
    sections: list[Section] = []
    inside: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        name = _functorch_name(node)
        if name and name not in _KNOWN:
            raise NotByCalls(f"{name} changes functorch's levels")
        depth += (name == _ENTER) - (name == _LEAVE)
        if (depth or name == _LEAVE) and node.op in ("call_function", "call_method"):
            inside.append(node)
        if inside and not depth:
            sections.append(_section(tuple(inside)))
            inside = []
    if depth:
        raise NotByCalls("a vmap that is not left")
    return sections


def loads_decompositions(node: fx.Node) -> bool:
    """Whether a node only prepares functorch, as before every vmap."""
    return _functorch_name(node) == _LOAD


def _functorch_name(node: fx.Node) -> str:
    known = node.op == "call_function" and "functorch" in str(getattr(node.target, "__module__", ""))
    return str(getattr(node.target, "__name__", node.target)) if known else ""


def _section(nodes: tuple[fx.Node, ...]) -> Section:
    own = set(nodes)
    results = [node for node in nodes if any(user not in own for user in node.users)]
    if len(results) != 1:
        raise NotByCalls("a vmap with several results")
    if any(is_opaque(node) for node in nodes):
        raise NotByCalls("a vmap with a call that cannot be looked into")
    inputs = dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in own)
    return Section(nodes, results[0], tuple(inputs))


def trace_section(section: Section, skeleton: Any, held: list[Held], fake_mode: FakeTensorMode) -> CallTrace:
    """The section as the trace of one call on `held`; `skeleton` has its inputs with holes for these.

    Raises NotByCalls for a section that computes floats, writes or makes constants, and whatever tracing raises.
    """
    aliases: list[int | None] = []

    def run(*values: Any) -> Any:
        env = dict(zip(section.inputs, filled(skeleton, values), strict=True))
        with _state_as_it_was():
            for node in section.nodes:
                env[node] = _called(node, *fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__))
        result = env[section.result]
        storages = [_storage(value) if isinstance(value, torch.Tensor) else -1 for value in values]
        own = _storage(result)
        aliases.append(storages.index(own) if own in storages else None)
        return result

    with fake_mode, enable_python_dispatcher():
        graph = make_fx(run)(*(each.value for each in held)).graph
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    for node in calls:
        if not _is_plain(node):
            raise NotByCalls(f"{node.target} in a vmap")
    graph.eliminate_dead_code()
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
    (last,) = (node for node in graph.nodes if node.op == "output")
    return CallTrace(graph, inputs, (last.args[0],), Hole(0), (aliases[-1],), ())


def _called(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a captured call gives."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_plain(node: fx.Node) -> bool:
    """Whether a call gives a mask, positions or a number, and does nothing else."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return False
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _state_as_it_was() -> Iterator[None]:
    """Grad mode and functorch's levels as before, also where a trace stops half way."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
