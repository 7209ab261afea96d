"""The normal form call by call: every captured call's ATen calls are copied from its trace (`call_traces.py`)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from flashfuse.patterns.call_traces import (
    NUMBERS,
    CallTrace,
    Held,
    NotByCalls,
    filled,
    idle_dropout,
    same_call,
    trace_call,
    with_holes,
)
from flashfuse.patterns.normal_form import NormalForm, Origin, attribute, fake_mode_of, is_leaf, is_opaque, leaf_value
from flashfuse.patterns.vmap_sections import Section, loads_decompositions, trace_section, vmap_sections

_METADATA = frozenset({"size", "dim", "stride", "numel", "nelement", "ndimension", "storage_offset", "is_contiguous", getattr})


def read_calls(module: fx.GraphModule, writes_of: Callable[[fx.Node], bool]) -> NormalForm:
    """The normal form of a captured graph. Raises NotByCalls if the calls by themselves do not tell all."""
    reader = _CallReader(module, writes_of)
    for node in module.graph.nodes:
        reader.read(node)
    return reader.form


class _CallReader:
    """Walks over the captured graph. `env` holds what each captured node is in the normal form at this moment."""

    def __init__(self, module: fx.GraphModule, writes_of: Callable[[fx.Node], bool]) -> None:
        self.module = module
        self.writes_of = writes_of
        self.form = NormalForm(fx.Graph())
        self.graph = self.form.graph
        self.fake_mode = fake_mode_of(module.graph)
        if self.fake_mode is None:
            raise NotByCalls("the captured graph has no fake inputs")
        self.time = 0
        self.form.gradients = self.grad_mode = torch.is_grad_enabled()
        self.order = {node: place for place, node in enumerate(module.graph.nodes)}
        self.env: dict[fx.Node, Any] = {}
        self.traces: dict[Any, CallTrace] = {}
        self.storages: dict[int, int] = {}  # of Dynamo's fake values -> number here
        self.holders: dict[int, list[fx.Node]] = {}  # storage -> captured nodes whose result lies in it
        self.handed_over: list[Held] = []  # what opaque nodes and reads of numbers use: used, although not seen by what
        self.sections = {node: section for section in vmap_sections(module.graph) for node in section.nodes}
        self.leaves = [node for node in module.graph.nodes if is_leaf(module, node)]
        self.inputs = {leaf: self._input(leaf) for leaf in self.leaves}

    def _input(self, leaf: fx.Node) -> Any:
        """A leaf's result as placeholders of the normal form."""
        return self._held(leaf_value(self.module, leaf, self.fake_mode), leaf.name)

    def _held(self, value: Any, name: str) -> Any:
        def hold(item: Any) -> Any:
            if not isinstance(item, (torch.Tensor, *NUMBERS)):
                return item
            node = self._placeholder(name, item)
            return Held(node, item, self._storage_of(item) if isinstance(item, torch.Tensor) else -1)

        return map_aggregate(_as_plain(value), hold)

    def _placeholder(self, name: str, value: Any) -> fx.Node:
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), self.graph._root)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _storage_of(self, value: torch.Tensor) -> int:
        return self.storages.setdefault(int(value.untyped_storage()._cdata), len(self.storages))

    # ---------------------------------------------------------------------------------------------- one captured node

    def read(self, node: fx.Node) -> None:
        """The next captured node."""
        self.time += 2
        self.form.times[node] = self.time
        if node.op == "output":
            self._finish(node)
            return
        if node in self.sections:
            if node is self.sections[node].last:
                self._read_section(self.sections[node])
            return
        if node in self.inputs:
            self.env[node] = self.inputs[node]
            if is_opaque(node):
                self._hand_over(node)
        elif node.op == "get_attr":
            self.env[node] = attribute(self.module, node)
        elif node.op in ("call_function", "call_method"):
            self.env[node] = self._call(node)
        else:
            raise NotByCalls(f"{node.op} {node.target}")
        self._note(node, self.env[node])

    def _call(self, node: fx.Node) -> Any:
        if loads_decompositions(node):
            return None
        if node.target is torch._C._set_grad_enabled:
            self.grad_mode = bool(node.args[0])
            self.form.gradients |= self.grad_mode
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda argument: self.env[argument])
        if idle_dropout(node, args, kwargs):
            return args[0]
        skeleton, held = with_holes((args, kwargs))
        tensors = [each for each in held if _is_tensor(each)]
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return operator.getitem(*args)
        example = node.meta.get("example_value")
        if node.target is torch.tensor and not isinstance(args[0], (bool, int, float)):
            return self._held(example, node.name)  # a constant
        if not _has_tensor(example) and (example is not None or not tensors):
            if node.target not in _METADATA:
                self.handed_over += tensors
            return self._held(example, node.name)  # a size, a number, a switch of modes
        key = same_call(node, skeleton, held)
        found = self.traces.get(key) if key is not None else None
        if found is None:
            found = self._trace(node, skeleton, held)
            if key is not None:
                self.traces[key] = found
        return self._copied(node, found, held)

    def _read_section(self, section: Section) -> None:
        """A whole vmap as the call of its result."""
        assert self.fake_mode is not None
        skeleton, held = with_holes(tuple(self.env[node] for node in section.inputs))
        try:
            trace = trace_section(section, skeleton, held, self.fake_mode)
        except NotByCalls:
            raise
        except Exception as error:
            raise NotByCalls(f"a vmap: {type(error).__name__}: {error}") from error
        self.env[section.result] = self._copied(section.result, trace, held)
        self._note(section.result, self.env[section.result])

    def _trace(self, node: fx.Node, skeleton: Any, held: list[Held]) -> CallTrace:
        assert self.fake_mode is not None
        try:
            return trace_call(node, skeleton, held, self.fake_mode)
        except NotByCalls:
            raise
        except Exception as error:
            raise NotByCalls(f"{node.target}: {type(error).__name__}: {error}") from error

    # ---------------------------------------------------------------------------------------------- copying a trace

    def _copied(self, node: fx.Node, trace: CallTrace, held: list[Held]) -> Any:
        """The trace's calls on these arguments, and what they do to storages."""
        copies: dict[fx.Node, fx.Node] = {inner: each.node for inner, each in zip(trace.inputs, held, strict=True)}
        shown = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        for inner in trace.graph.nodes:
            if inner.op != "call_function":
                continue
            copies[inner] = self.graph.node_copy(inner, copies.__getitem__)
            copies[inner].meta = {"val": inner.meta.get("val"), **shown}
            self.form.produced[copies[inner]] = node
            if not self.grad_mode:
                self.form.without_grad.add(copies[inner])
        outputs = [copies[out] if isinstance(out, fx.Node) else out for out in trace.outputs]
        examples = _leaves(_as_plain(node.meta.get("example_value")))
        parts = [
            self._output(out, held, alias, _at(examples, place))
            for place, (out, alias) in enumerate(zip(outputs, trace.aliases, strict=True))
        ]
        self._write(node, [(held[place], parts[out]) for place, out in trace.writes], held)
        return filled(trace.result, parts)

    def _output(self, out: Any, held: list[Held], alias: int | None, example: Any) -> Any:
        if not isinstance(out, fx.Node):
            return out
        value = out.meta["val"]
        if not isinstance(value, torch.Tensor):
            return Held(out, value)
        same = isinstance(example, torch.Tensor) and example.shape == value.shape
        shown = None if not same else int(example.untyped_storage()._cdata)
        if alias is not None:
            storage = held[alias].storage
            if shown is not None:
                self.storages.setdefault(shown, storage)
        elif shown is not None:
            storage = self.storages.setdefault(shown, len(self.storages))
        else:
            storage = self.storages.setdefault(-len(self.storages) - 1, len(self.storages))
        return Held(out, example if same else value, storage)

    def _write(self, node: fx.Node, written: list[tuple[Held, Held]], held: list[Held]) -> None:
        """Tensors that got a new value: whatever else shows the storage must not be read any more."""
        for before, after in written:
            if sum(each.storage == before.storage for each in held) > 1:
                raise NotByCalls(f"{node.target} writes into what it also reads by another view")
            self.form.writes.append((self.time, before.storage))
            self._note_written_inputs(before.storage)
            for holder in self.holders.get(before.storage, ()):
                self._renew(node, holder, before, after)

    def _renew(self, writer: fx.Node, holder: fx.Node, before: Held, after: Held) -> None:
        def renewed(leaf: Any) -> Any:
            if not isinstance(leaf, Held) or leaf.storage != before.storage:
                return leaf
            if leaf.node is before.node:
                return Held(after.node, leaf.value, leaf.storage)
            if any(self.order[user] > self.order[writer] for user in holder.users) or holder in self.inputs:
                raise NotByCalls(f"{writer.target} writes into a storage of which {holder} is another view")
            return leaf

        self.env[holder] = map_aggregate(self.env[holder], renewed)
        self._note(holder, self.env[holder])

    def _hand_over(self, node: fx.Node) -> None:
        """An opaque call uses its arguments, and may write all of them: nothing read before still holds afterwards."""
        tensors = [each for argument in node.all_input_nodes for each in _leaves(self.env[argument]) if _is_tensor(each)]
        self.handed_over += tensors
        for each in tensors if self.writes_of(node) else ():
            self.form.writes.append((self.time, each.storage))
            self._note_written_inputs(each.storage)

    def _note_written_inputs(self, storage: int) -> None:
        for leaf, value in self.inputs.items():
            if any(isinstance(each, Held) and each.storage == storage for each in _leaves(value)):
                self.form.written_inputs.add(leaf)

    # ---------------------------------------------------------------------------------------------- notes

    def _note(self, node: fx.Node, value: Any, path: tuple[int, ...] = ()) -> None:
        """Which captured value a node of the normal form is, from this moment."""
        if isinstance(value, (tuple, list)):
            for place, item in enumerate(value):
                self._note(node, item, (*path, place))
        if not isinstance(value, Held) or value.storage < 0:
            return
        known = self.form.origins.setdefault(value.node, [])
        if not any(origin.node is node and origin.path == path for origin in known):
            known.append(Origin(node, path, self.time, value.storage))
        holders = self.holders.setdefault(value.storage, [])
        if node not in holders:
            holders.append(node)

    def _finish(self, node: fx.Node) -> None:
        results = [self.env[argument] for argument in node.all_input_nodes]
        written = [self.env[leaf] for leaf in self.leaves if leaf in self.form.written_inputs]
        nodes = [each.node for each in _leaves((results, written, self.handed_over)) if isinstance(each, Held)]
        self.graph.output(nodes)


def _as_plain(value: Any) -> Any:
    """torch.Size and named tuples as tuples."""
    if isinstance(value, tuple):
        return tuple(_as_plain(item) for item in value)
    return [_as_plain(item) for item in value] if isinstance(value, list) else value


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return list(_leaves(list(value.values()))) if isinstance(value, dict) else [value]


def _is_tensor(each: Any) -> bool:
    return isinstance(each, Held) and isinstance(each.value, torch.Tensor)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in _leaves(value))


def _at(items: list[Any], place: int) -> Any:
    return items[place] if place < len(items) else None
