"""The normal form by one trace of the whole captured graph: for graphs with writes into views, and whatever is unusual.

The captured graph is run under make_fx on Dynamo's own fake values, functionalised. Calls that cannot be traced
(higher-order operators) are opaque leaves: their results enter as inputs, and the writes they may do are assumed on all of
their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree

from flashfuse.patterns.normal_form import NormalForm, Origin, fake_mode_of, is_leaf, is_opaque, leaf_value


def trace_whole(module: fx.GraphModule, writes_of: Callable[[fx.Node], bool]) -> NormalForm:
    """The normal form of a captured graph. Raises whatever tracing raises, with functorch's state as it was."""
    reader = _Reader(module, writes_of)
    arguments = [leaf_value(module, node, reader.fake_mode) for node in reader.leaves]
    if reader.fake_mode is None:
        raise RuntimeError("the captured graph has no fake inputs")
    with reader.fake_mode, torch.fx.traceback.preserve_node_meta(), _restored_modes(), enable_python_dispatcher():
        traced = make_fx(reader.trace, pre_dispatch=True)(*arguments)
    form = reader.form
    form.graph = traced.graph
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for leaf, placeholder in zip(reader.leaves, placeholders, strict=False):
        placeholder.meta.setdefault("val", leaf_value(module, leaf, reader.fake_mode))
    _note_grad_mode(form)
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


@contextmanager
def _restored_modes() -> Iterator[None]:
    """Grad mode and functorch's levels as they were: the captured graph may change them, and a trace may stop half way."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


class _Reader(fx.Interpreter):
    """Runs the captured graph on functional fake tensors and notes what became of every value."""

    def __init__(self, module: fx.GraphModule, writes_of: Callable[[fx.Node], bool]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.writes_of = writes_of
        self.form = NormalForm(fx.Graph())
        self.time = 0
        self.fake_mode = fake_mode_of(module.graph)
        self.leaves = [node for node in module.graph.nodes if is_leaf(module, node)]
        self._leaf_values: dict[fx.Node, Any] = {}
        self._counters: dict[int, int] = {}
        self._handed_over: list[Any] = []  # what opaque nodes read: used, although the trace does not see by what

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
