"""The normal form: one spelling per meaning, for reading only.

Dynamo's graph is re-traced to pre-dispatch ATen (one node per user operation; `@`, `torch.matmul` and `.matmul` are one),
functionalised, with the user's file and line kept on every node. Since functionalising hides writes, the normal form is
never handed on. Instead `NormalForm` remembers which value of the captured graph each of its nodes stands for, and
when tensors were written, so that a match can be mapped back to the captured graph exactly.

Calls that cannot be traced (higher-order operators) are opaque leaves: their results enter as inputs, and the writes
they may do are assumed on all of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Origin:
    """A value of the captured graph: result `path` of `node`, as it was at `time`.

    The captured node number t reads its arguments at time 2t - 1 and writes and gives its result at time 2t.
    """

    node: fx.Node
    path: tuple[int, ...]
    time: int
    storage: int


@dataclass
class NormalForm:
    """`graph` is functional ATen. `origins[node]` are the captured values equal to a node, oldest first."""

    graph: fx.Graph
    origins: dict[fx.Node, list[Origin]] = field(default_factory=dict)
    produced: dict[fx.Node, fx.Node] = field(default_factory=dict)  # node -> captured node that ran when it was made
    times: dict[fx.Node, int] = field(default_factory=dict)  # captured node -> time of its result
    writes: list[tuple[int, int]] = field(default_factory=list)  # (time, storage)
    written_inputs: set[fx.Node] = field(default_factory=set)  # captured placeholders written in place
    without_grad: set[fx.Node] = field(default_factory=set)  # nodes made while grad mode was off
    gradients: bool = True  # whether grad mode is on anywhere

    def origin(self, node: fx.Node, at: int) -> Origin | None:
        """A captured value that equals `node` and still does at time `at`; None if there is none."""
        for origin in self.origins.get(node, ()):
            if origin.time <= at and not self.written(origin.storage, origin.time, at):
                return origin
        return None

    def captured_names(self, *names: str) -> tuple[str, ...]:
        """The captured nodes that ran when the nodes of these names were made."""
        found = [self.produced.get(node) for node in self.graph.nodes if str(node) in names]
        return tuple(dict.fromkeys(str(node) for node in found if node is not None))

    def written(self, storage: int, after: int, until: int) -> bool:
        """Whether a storage is written at a time t with after < t <= until."""
        return any(after < time <= until for time, written in self.writes if written == storage)


def is_opaque(node: fx.Node) -> bool:
    """Whether a captured node is kept as a leaf."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def normalise(module: fx.GraphModule, *, writes_of: Callable[[fx.Node], bool]) -> NormalForm:
    """The normal form of a captured graph whose nodes carry fake values in meta["example_value"].

    `writes_of(node)` tells whether an opaque node may write its arguments. Raises whatever tracing raises.
    """
    reader = _Reader(module, writes_of)
    arguments = [reader.example(node) for node in reader.leaves]
    if reader.fake_mode is None:
        raise RuntimeError("the captured graph has no fake inputs")
    with reader.fake_mode, torch.fx.traceback.preserve_node_meta(), _restored_modes(), enable_python_dispatcher():
        traced = make_fx(reader.trace, pre_dispatch=True)(*arguments)
    form = reader.form
    form.graph = traced.graph
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for leaf, placeholder in zip(reader.leaves, placeholders, strict=False):
        placeholder.meta.setdefault("val", reader.example(leaf))
    _note_grad_mode(form)
    traced.graph.eliminate_dead_code()
    _apply_autocast(form, reader.fake_mode)
    alive = set(traced.graph.nodes)
    form.origins = {node: origins for node, origins in form.origins.items() if node in alive}
    return form


def _note_grad_mode(form: NormalForm) -> None:
    """Which nodes ran under `no_grad`. (The captured value of a view made there does not tell.)"""
    form.gradients = enabled = torch.is_grad_enabled()
    for node in form.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            form.gradients |= enabled
        elif not enabled and node.op == "call_function":
            form.without_grad.add(node)


def _apply_autocast(form: NormalForm, fake_mode: FakeTensorMode) -> None:
    """Give nodes the dtypes that they have under autocast, which the trace does not see but Dynamo's values show."""
    for node, origins in form.origins.items():
        val = node.meta.get("val")
        for origin in origins:
            shown = origin.node.meta.get("example_value")
            for place in origin.path:
                shown = shown[place] if isinstance(shown, (tuple, list)) else None
            if not isinstance(shown, torch.Tensor) or not isinstance(val, torch.Tensor) or origin.node.op == "get_attr":
                continue
            if shown.dtype != val.dtype and form.produced.get(node) is origin.node:
                with fake_mode:
                    node.meta["val"] = val.to(shown.dtype)


@contextmanager
def _restored_modes() -> Iterator[None]:
    """Grad mode and autocast as they were: the captured graph may switch them while it is read."""
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


class _Reader(fx.Interpreter):
    """Runs the captured graph on functional fake tensors and notes what became of every value."""

    def __init__(self, module: fx.GraphModule, writes_of: Callable[[fx.Node], bool]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.writes_of = writes_of
        self.form = NormalForm(fx.Graph())
        self.time = 0
        self.fake_mode = _fake_mode(module.graph)
        self.leaves = [node for node in module.graph.nodes if self._is_leaf(node)]
        self._leaf_values: dict[fx.Node, Any] = {}
        self._counters: dict[int, int] = {}
        self._handed_over: list[Any] = []  # what opaque nodes read: used, although the trace does not see by what

    def _is_leaf(self, node: fx.Node) -> bool:
        if node.op == "placeholder" or is_opaque(node):
            return True
        return node.op == "get_attr" and isinstance(self.fetch_attr(str(node.target)), torch.Tensor)

    def example(self, node: fx.Node) -> Any:
        """The fake value of a leaf."""
        if "example_value" in node.meta:
            return node.meta["example_value"]
        if node.op == "get_attr" and self.fake_mode is not None:
            return self.fake_mode.from_tensor(self.fetch_attr(str(node.target)))
        if node.op == "get_attr":
            return self.fetch_attr(str(node.target))
        raise RuntimeError(f"captured node {node} carries no example value")

    # ---------------------------------------------------------------------------------------------- tracing

    def trace(self, *arguments: Any) -> list[Any]:
        """Run under make_fx; returns the outputs, the last value of every written input, and what opaque nodes read."""
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with above, mode:
            wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, list(arguments))
            self._leaf_values = dict(zip(self.leaves, wrapped, strict=True))
            outputs = self.run(*[self._leaf_values[node] for node in self.leaves if node.op == "placeholder"])
            written = [self._leaf_values[node] for node in self.leaves if node in self.form.written_inputs]
            results = [_functional_value(leaf) for leaf in pytree.tree_leaves((outputs, written))]
            return [*results, *self._handed_over]

    def run_node(self, node: fx.Node) -> Any:
        self.time += 1
        before = self._note_arguments(node)
        self.time += 1
        self.form.times[node] = self.time
        if is_opaque(node):
            self._handed_over += [_functional_value(tensor) for leaves in before.values() for _path, tensor in leaves]
        mode = get_proxy_mode()
        graph_end = None if mode is None else next(iter(reversed(mode.tracer.graph.nodes)), None)
        if node in self._leaf_values:
            result = self._leaf_values[node]
        elif node.op == "get_attr":
            result = self.fetch_attr(str(node.target))
        else:
            result = super().run_node(node)
        self._note_writes(node, before)
        self._note_result(node, result)
        self._note_produced(node, graph_end)
        return result

    def _note_arguments(self, node: fx.Node) -> dict[fx.Node, list[tuple[tuple[int, ...], Any]]]:
        before = {}
        for argument in node.all_input_nodes:
            if node.op == "output":
                break
            leaves = _tensor_leaves(self.env[argument])
            before[argument] = leaves
            for path, tensor in leaves:
                self._note_value(argument, path, tensor)
        return before

    def _note_result(self, node: fx.Node, result: Any) -> None:
        if node.op == "output":
            return
        for path, tensor in _tensor_leaves(result):
            self._note_value(node, path, tensor)

    def _note_value(self, node: fx.Node, path: tuple[int, ...], tensor: Any) -> None:
        found = _traced_node(tensor)
        if found is None:
            return
        known = self.form.origins.setdefault(found, [])
        if not any(origin.node is node and origin.path == path for origin in known):
            known.append(Origin(node, path, self.time, _storage(tensor)))

    def _note_writes(self, node: fx.Node, before: dict[fx.Node, list[tuple[tuple[int, ...], Any]]]) -> None:
        opaque_writes = is_opaque(node) and self.writes_of(node)
        for leaves in before.values():
            for _path, tensor in leaves:
                storage = _storage(tensor)
                count = torch._functionalize_mutation_counter(tensor.elem)  # type: ignore[attr-defined]
                if opaque_writes or count != self._counters.get(storage, 0):
                    self._counters[storage] = count
                    if (self.time, storage) not in self.form.writes:
                        self.form.writes.append((self.time, storage))
                    self._note_written_inputs(storage)

    def _note_written_inputs(self, storage: int) -> None:
        for leaf, value in self._leaf_values.items():
            if any(_storage(tensor) == storage for _path, tensor in _tensor_leaves(value)):
                self.form.written_inputs.add(leaf)

    def _note_produced(self, node: fx.Node, graph_end: fx.Node | None) -> None:
        mode = get_proxy_mode()
        if mode is None:
            return
        for traced in reversed(mode.tracer.graph.nodes):
            if traced is graph_end:
                break
            self.form.produced[traced] = node


def _fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode of the captured values. (The tracing context's may be another one, made for the backend.)"""
    examples = (node.meta.get("example_value") for node in graph.nodes)
    return next((example.fake_mode for example in examples if isinstance(example, FakeTensor)), None)


def _tensor_leaves(value: Any) -> list[tuple[tuple[int, ...], FunctionalTensor]]:
    """Tensors of a value with their path of item positions; dictionaries and objects are not looked into."""
    if isinstance(value, FunctionalTensor):
        return [((), value)]
    if not isinstance(value, (tuple, list)):
        return []
    return [((place, *path), leaf) for place, item in enumerate(value) for path, leaf in _tensor_leaves(item)]


def _functional_value(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return torch._from_functional_tensor(value.elem)


def _traced_node(tensor: FunctionalTensor) -> fx.Node | None:
    mode = get_proxy_mode()
    if mode is None:
        return None
    slot = get_proxy_slot(_functional_value(tensor), mode.tracer, None)
    return None if slot is None else slot.proxy.node  # type: ignore[attr-defined]


def _storage(tensor: FunctionalTensor) -> int:
    return int(tensor.untyped_storage()._cdata)
