"""Each distinct call of a captured graph traced once: the normal form of a model with equal layers costs that of one.

A captured call is traced by itself, on the fake values that Dynamo gave its arguments, and the ATen calls that come out are
copied wherever the same call is made on values of the same shapes, strides and dtypes. What a trace of the whole graph would
know by itself is kept here by hand: which values share a storage, and which value a tensor has after a write.

A write is followed only if no other view of the storage is read later. Where one is, and wherever else a call by itself
does not tell all (`NotByCalls`), the whole graph is traced at once (`normal_form.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.node import map_aggregate

from flashfuse.patterns.calls import kind_of

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_IDLE_DROPOUTS = (torch.nn.functional.dropout, torch.dropout, torch.ops.aten.dropout.default)


class NotByCalls(Exception):
    """The graph has to be traced as a whole."""


@dataclass(frozen=True)
class Held:
    """A tensor or a symbolic number: its node in the normal form, its fake value and, of a tensor, its storage."""

    node: fx.Node
    value: Any
    storage: int = -1


@dataclass(frozen=True)
class Hole:
    """The place of an argument in a call's skeleton, or of a result in a trace's."""

    place: int


@dataclass(frozen=True)
class CallTrace:
    """The ATen calls of one captured call.

    result: what the call returns, with holes that count `outputs`. aliases[k]: the argument whose storage output k shares.
    writes: which argument becomes which output.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]
    result: Any
    aliases: tuple[int | None, ...]
    writes: tuple[tuple[int, int], ...]


def with_holes(value: Any) -> tuple[Any, list[Held]]:
    """A structure with every held value, each counted once, replaced by its place."""
    held: list[Held] = []

    def hole(leaf: Any) -> Any:
        if not isinstance(leaf, Held):
            return leaf
        known = next((place for place, each in enumerate(held) if each.node is leaf.node), None)
        if known is None:
            held.append(leaf)
        return Hole(len(held) - 1 if known is None else known)

    return map_aggregate(value, hole), held


def filled(value: Any, parts: Any) -> Any:
    """A structure with its holes filled."""
    return map_aggregate(value, lambda leaf: parts[leaf.place] if isinstance(leaf, Hole) else leaf)


def same_call(node: fx.Node, skeleton: Any, held: list[Held]) -> Any:
    """A key that is equal for calls with equal traces, or None where that cannot be told."""
    found = (node.op, node.target, _frozen(skeleton), tuple(kind_of(each.value) for each in held))
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_frozen, value)))
    if isinstance(value, dict):
        return (dict, tuple((name, _frozen(each)) for name, each in value.items()))
    if isinstance(value, slice):
        return (slice, _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return (type(value), repr(value) if isinstance(value, float) else value)  # 1, 1.0 and True are equal, -0.0 and 0.0 too


def idle_dropout(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is a dropout that returns its very argument."""
    if node.target not in _IDLE_DROPOUTS or not args:
        return False
    given = dict(zip(("input", "p", "training" if node.target is _IDLE_DROPOUTS[0] else "train"), args, strict=False)) | kwargs
    training = given.get("training", given.get("train", True))
    return training is False or given.get("p", 0.5) in (0, 0.0)


def trace_call(node: fx.Node, skeleton: Any, held: list[Held], fake_mode: FakeTensorMode) -> CallTrace:
    """Trace one captured call. Raises whatever tracing raises."""
    run = _Run(node, skeleton)
    values = [each.value for each in held]
    with fake_mode, enable_python_dispatcher():
        traced = make_fx(run, pre_dispatch=True)(*values)
    graph = traced.graph
    graph.eliminate_dead_code()
    inputs = tuple(each for each in graph.nodes if each.op == "placeholder")
    (last,) = (each for each in graph.nodes if each.op == "output")
    if any(each.op == "get_attr" for each in graph.nodes):
        raise NotByCalls(f"{node.target} makes a constant")
    outputs = last.args[0] if isinstance(last.args[0], (list, tuple)) else [last.args[0]]
    return CallTrace(graph, inputs, tuple(outputs), run.result, tuple(run.aliases), tuple(run.writes))


class _Run:
    """A captured call as the function that make_fx traces; notes what became of storages."""

    def __init__(self, node: fx.Node, skeleton: Any) -> None:
        self.node = node
        self.skeleton = skeleton
        self.result: Any = None
        self.aliases: list[int | None] = []
        self.writes: list[tuple[int, int]] = []

    def __call__(self, *values: Any) -> list[Any]:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        _do_not_record_sizes()
        with above, mode:
            arguments = [FunctionalTensor.to_functional(v) if isinstance(v, torch.Tensor) else v for v in values]
            args, kwargs = filled(self.skeleton, arguments)
            self.aliases, self.writes = [], []
            found = _called(self.node)(*args, **kwargs)
            storages = {_storage(a): place for place, a in enumerate(arguments) if isinstance(a, FunctionalTensor)}
            outputs: list[Any] = []

            def out(leaf: Any) -> Any:
                if not isinstance(leaf, (torch.Tensor, *NUMBERS)):
                    return leaf
                outputs.append(leaf)
                self.aliases.append(storages.get(_storage(leaf)) if isinstance(leaf, FunctionalTensor) else None)
                return Hole(len(outputs) - 1)

            self.result = map_aggregate(_plain(found), out)
            for place, argument in enumerate(arguments):
                if isinstance(argument, FunctionalTensor) and torch._functionalize_mutation_counter(argument.elem):  # type: ignore[attr-defined]
                    self.writes.append((place, len(outputs)))
                    self.aliases.append(place)
                    outputs.append(argument)
            return [_value(each) for each in outputs]


def _do_not_record_sizes() -> None:
    """Arithmetic on sizes is not recorded: a third of the time with symbolic shapes, for nodes that nobody reads.

    Where a size becomes an argument, make_fx builds it from its expression, or fails; then the graph is traced as a whole.
    """
    mode = get_proxy_mode()
    if mode is not None:
        mode.__sym_dispatch__ = lambda function, types, args, kwargs: function(*args, **kwargs)  # type: ignore[method-assign]


def _called(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_method":
        return lambda this, *args, **kwargs: getattr(this, str(node.target))(*args, **kwargs)
    return _number_as_tensor if node.target is torch.tensor else node.target  # type: ignore[return-value]


def _number_as_tensor(number: Any, *, dtype: Any = None, device: Any = None, **_how: Any) -> torch.Tensor:
    """torch.tensor(number): what it says, instead of a constant whose value is not to be seen."""
    return torch.full((), number, dtype=dtype, device=device)


def _plain(value: Any) -> Any:
    """torch.Size and named tuples as tuples, whose items may be anything."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _value(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return torch._from_functional_tensor(value.elem)


def _storage(tensor: FunctionalTensor) -> int:
    return int(tensor.untyped_storage()._cdata)
