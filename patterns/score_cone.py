"""The score cone: everything between the product query @ key^T and the softmax, lifted into a score program.

`Lifter.lift(node, index)` gives one element of a node as a value of the program. Nodes that carry the score must have a
row. Side values (masks, biases, scales) are lifted as long as they depend on both the query and the key position, so
that no M x N tensor is needed for what the graph computes from smaller things; what remains is captured as a tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from flashfuse.ir.diagonals import diagonal_position, is_diagonal, is_diagonal_position
from flashfuse.ir.mask import MASK_FILL
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Dim, Index, refined
from flashfuse.patterns.calls import bind, is_tensor, shape, value_of
from flashfuse.patterns.captured import Captured, by_distance
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.positions import Positions
from flashfuse.patterns.selections import is_selection, operand_index
from flashfuse.patterns.spellings import CREATIONS, ROWS
from flashfuse.patterns.user_code import describe, user_line
from flashfuse.refusal import Refused


@dataclass
class Lifter:
    """Builds one score program. `captures` are the side tensors that it reads, `sizes` the symbolic integers."""

    positions: Positions
    product: fx.Node
    carriers: frozenset[fx.Node]
    flow: GradientFlow
    shifts: Mapping[fx.Node, fx.Node] = field(default_factory=dict)  # sums of which only one term counts
    score: Any = None  # gives the value of the product's element; set by the caller
    builder: Builder = field(default_factory=Builder)
    captures: list[Captured] = field(default_factory=list)
    sizes: list[torch.SymInt] = field(default_factory=list)
    probabilities: fx.Node | None = None  # set by the caller once the scores are lifted; their own element is then held
    dropped: Any = None  # gives the value of an element after dropout; set by the caller
    _known: dict[tuple[fx.Node, Any], Value] = field(default_factory=dict)
    _data: dict[fx.Node, bool] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ elements

    def hold(self, node: fx.Node, index: Index, value: Value) -> None:
        """Say what the element `node[index]` is, instead of lifting it."""
        self._known[self._key(node, index)] = value

    def _key(self, node: fx.Node, index: Index) -> tuple[fx.Node, Any]:
        return node, tuple(dim.number if isinstance(dim, Value) else refined(dim) for dim in index)

    def lift(self, node: fx.Node, index: Index) -> Value:
        """The element `node[index]`. Raises Refused at the node that has no meaning."""
        key = self._key(node, index)
        if key not in self._known:
            before, self.builder.source = self.builder.source, user_line(node)
            self._known[key] = self._lift_new(node, index)
            self.builder.source = before
        return self._known[key]

    def _lift_new(self, node: fx.Node, index: Index) -> Value:
        if node is self.probabilities:
            raise Refused("FF401", node, "the probabilities are read at other positions than their own")
        if node is self.product:
            return self.score(index)  # type: ignore[no-any-return]
        if node in self.shifts:
            return self.lift(self.shifts[node], index)
        if node in self.carriers:
            return self._by_row(node, index)
        if _is_the_traces_own(node):
            raise Refused("FF304", node, "a constant")
        if self.flow.written_unseen(node):
            return self._capture(node, index)
        marks = len(self.captures), len(self.sizes)
        try:
            lifted = self._by_row(node, index)
            table = None if self._reads_overwritten(lifted) else by_distance(self, node, lifted)
            if table is not None:
                self._forget(marks)
                return self._load_diagonals(table)
            worth = self._spans_both(node, index) or _is_mask(lifted) or _is_plain_load(lifted)
            if worth and not self._loses_gradient(node, lifted) and not self._reads_overwritten(lifted):
                return lifted
        except (Refused, axes.LayoutError):
            log.debug("%s is captured: it cannot be lifted", node)
        self._forget(marks)
        return self._capture(node, index)

    def _forget(self, marks: tuple[int, int]) -> None:
        """Take back the captures and sizes that were added since, and the values that read them."""
        del self.captures[marks[0] :], self.sizes[marks[1] :]
        self._known = {k: v for k, v in self._known.items() if not self._reads_beyond(v, marks)}

    def _load_diagonals(self, captured: Captured) -> Value:
        assert captured.diagonals is not None
        if captured not in self.captures:
            self.captures.append(captured)
        letters = [self.builder.leaf("index", letter) for letter in captured.diagonals.letters]
        position = diagonal_position(self.builder)
        return self.builder.leaf("load", self.captures.index(captured), Kind.FLOAT, [*letters, position])

    def _reads_beyond(self, value: Value, marks: tuple[int, int]) -> bool:
        stack, seen = [value.number], set()
        while stack:
            number = stack.pop()
            if number in seen:
                continue
            seen.add(number)
            statement = self.builder.statements[number]
            if statement.op == "load" and int(statement.attribute) >= marks[0]:  # type: ignore[arg-type]
                return True
            if statement.op == "size" and int(statement.attribute) >= marks[1]:  # type: ignore[arg-type]
                return True
            stack.extend(statement.operands)
        return False

    def _loses_gradient(self, node: fx.Node, lifted: Value) -> bool:
        """Whether a side value's gradient would be another one if the tensors below it were captured instead of it."""
        if lifted.kind is not Kind.FLOAT:
            return False
        loads = [s for s in self.builder.closure(lifted) if s.op == "load" and s.kind is Kind.FLOAT]
        needed = [s for s in loads if self.flow.needed(self.captures[int(s.attribute)].node)]  # type: ignore[arg-type]
        if not needed or not self.flow.needed(node):
            return bool(needed)
        positions = {o for s in needed for o in s.operands if self.builder.statements[o].op not in ("index", "const")}
        return not all(is_diagonal_position(self.builder.statements, o) for o in positions)

    def _reads_overwritten(self, lifted: Value) -> bool:
        """Whether a side value is computed in place from a tensor that it overwrites: then it is captured itself."""
        loads = [s for s in self.builder.closure(lifted) if s.op == "load"]
        return any(self.flow.overwritten(self.captures[int(s.attribute)].node) for s in loads)  # type: ignore[arg-type]

    def _by_row(self, node: fx.Node, index: Index) -> Value:
        row = ROWS.get(node.target)
        if node in self.carriers and is_selection(node):
            return self.lift(node.args[0], operand_index(node, index))  # type: ignore[arg-type]
        if row is None:
            raise Refused("FF401", node, describe(node))
        call = bind(node, row.reads)
        if row.lift is not None:
            return row.lift(self, call, index)
        assert row.index is not None
        return self.lift(call["self"], row.index(self, call, index))

    def _spans_both(self, node: fx.Node, index: Index) -> bool:
        """Whether a node depends on both the query and the key position, or on no data at all."""
        if not self.depends_on_data(node):
            return True
        letters = set().union(*(self.positions.letters(dim) for dim in index), set())
        return {"m", "n"} <= letters

    def depends_on_data(self, node: fx.Node) -> bool:
        """Whether a node's elements depend on anything but positions, sizes and numbers."""
        if node not in self._data:
            row = ROWS.get(node.target)
            if row is None:
                self._data[node] = isinstance(node.meta.get("val"), torch.Tensor)
            elif node.target in CREATIONS:
                self._data[node] = False
            else:
                self._data[node] = any(self.depends_on_data(argument) for argument in node.all_input_nodes)
        return self._data[node]

    def _capture(self, node: fx.Node, index: Index) -> Value:
        val = value_of(node)
        if not isinstance(val, torch.Tensor) or val.is_complex():
            raise Refused("FF401", node, f"{describe(node)} is no real tensor")
        stages = _behind_views(node, index, self.flow)
        plain = [stage for stage in stages if self.positions.are_plain(stage[1])]
        if self.flow.needed(node):  # a part of a tensor gets a gradient of its own: another part may be read too
            plain = [s for s in plain if is_tensor(s[0]) and not any(isinstance(d, Value) and d.constant for d in s[1])]
        node, index = (plain or stages)[-1]
        view = None
        if not plain and self.flow.needed(node) and not self._by_diagonal(index):
            node, index = stages[0]
            view, index = self.positions.canonical(index)
        captured = Captured(node, view)
        if captured not in self.captures:
            self.captures.append(captured)
        operands = [self.position(dim) for dim in index]
        return self.builder.leaf("load", self.captures.index(captured), self.kind(node), operands)

    def _by_diagonal(self, index: Index) -> bool:
        """Whether a position is computed from n - m alone: then what reads it may become a tensor of diagonals."""
        statements = self.builder.statements
        return any(isinstance(dim, Value) and is_diagonal(statements, dim.number) for dim in index)

    # ------------------------------------------------------------------------------------------ for rows

    def operand(self, x: Any, index: Index) -> Value:
        """An operand of an elementwise call: a tensor (broadcast to the index), a number, or a symbolic number."""
        if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor):
            return self.lift(x, axes.broadcast(index, shape(x)))
        number = value_of(x)
        if isinstance(number, (bool, int, float)):
            return self.builder.const(number)
        if isinstance(number, torch.SymInt):
            return self.size(number)
        if isinstance(number, torch.SymFloat) and isinstance(x, fx.Node):
            return self._capture_scalar(x)
        raise Refused("FF402", x, f"operand {number!r} of type {type(number).__name__}")

    def _capture_scalar(self, node: fx.Node) -> Value:
        captured = Captured(node)
        if captured not in self.captures:
            self.captures.append(captured)
        return self.builder.leaf("load", self.captures.index(captured), Kind.FLOAT)

    def kind(self, node: fx.Node) -> Kind:
        """The kind of a node's elements."""
        val = value_of(node)
        if isinstance(val, torch.SymFloat):
            return Kind.FLOAT
        dtype = val.dtype
        if dtype.is_floating_point:
            return Kind.FLOAT
        return Kind.BOOL if dtype is torch.bool else Kind.INT

    def as_kind(self, value: Value, kind: Kind) -> Value:
        """The value as torch's type promotion turns it into another kind."""
        if value.kind is kind:
            return value
        if value.constant is not None:
            return self.builder.const(value.constant, kind)
        if value.kind is Kind.BOOL:
            return self.builder.op("where", value, self.builder.const(1, kind), self.builder.const(0, kind))
        return self.builder.op({Kind.FLOAT: "to_float", Kind.INT: "to_int", Kind.BOOL: "to_bool"}[kind], value)

    def as_bool(self, value: Value) -> Value:
        return self.as_kind(value, Kind.BOOL)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """A float after conversion to a float dtype. Kernels keep float32; only constants feel the conversion.

        (finfo(float32).min becomes -inf in bfloat16, which turns a row without keys from a mean into NaN.)
        """
        if not dtype.is_floating_point or value.kind is not Kind.FLOAT:
            return value
        if value.constant is not None:
            return self.builder.const(float(torch.tensor(value.constant, dtype=torch.float64).to(dtype).item()))
        if value.statement.op == "where":
            condition, a, b = value.operands
            return self.builder.op("where", condition, self.cast(a, dtype), self.cast(b, dtype))
        return value

    def size(self, number: Any) -> Value:
        """An integer known at compile time or at call time."""
        number = value_of(number)
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise Refused("FF402", self.product, f"{number!r} where an integer is needed")
        if isinstance(number, int):
            return self.builder.const(number)
        if number.node.maybe_as_int() is not None:
            return self.builder.const(int(number.node.maybe_as_int()))
        for place, known in enumerate(self.sizes):
            if known.node.expr == number.node.expr:
                return self.builder.leaf("size", place)
        self.sizes.append(number)
        return self.builder.leaf("size", len(self.sizes) - 1)

    def position(self, dim: Dim) -> Value:
        """The integer position that a dimension stands for, from the canonical indices."""
        if isinstance(dim, Value):
            return dim
        total: Value | None = None
        for letter, start, run in self.positions.runs(refined(dim)):
            own = self._run_position(letter, start, run)
            total = own if total is None else total * self.size(axes.product([axis.size for axis in run])) + own
        return self.builder.const(0) if total is None else total

    def _run_position(self, letter: str, start: int, run: tuple[Axis, ...]) -> Value:
        """The position in a run of neighbouring axes of one canonical index."""
        if run[0].at is not None:
            return self.size(run[0].at)
        if not letter:
            raise Refused("FF204", self.product, f"an axis of size {run[0].size} that is no axis of the scores")
        value = self.builder.leaf("index", letter)
        below = axes.product([axis.size for axis in refined(self.positions.groups[letter])[start + len(run) :]])
        if not axes.is_one(below):
            value = self.builder.op("floordiv", value, self.size(below))
        if start > 0:
            value = self.builder.op("mod", value, self.size(axes.product([axis.size for axis in run])))
        return value

    def computed(self, index: Index) -> Index:
        """The index with every axis turned into its computed position."""
        return tuple(dim if isinstance(dim, Value) or not refined(dim) else self.position(dim) for dim in index)

    def never_negative(self, value: Value) -> bool:
        """Whether an integer is certainly not negative (so that it is no index from the end)."""
        statement = value.statement
        if statement.op in ("index", "length", "size"):
            return True
        if statement.op == "const":
            return int(statement.attribute) >= 0  # type: ignore[arg-type]
        return statement.op in ("add", "mul", "floordiv", "mod") and all(map(self.never_negative, value.operands))


log = logging.getLogger("flashfuse")


def _behind_views(node: fx.Node, index: Index, flow: GradientFlow) -> list[tuple[fx.Node, Index]]:
    """A tensor and those that it is a view of, each with its own index. Nothing is passed that stops a gradient."""
    stages = [(node, index)]
    while True:
        row = ROWS.get(node.target)
        if row is None or row.index is None or any(isinstance(dim, Value) for dim in index) or flow.stops_at(node):
            return stages
        try:
            call = bind(node, row.reads)
            inner = row.index(None, call, index)
        except (Refused, axes.LayoutError):
            return stages
        if _is_the_traces_own(call["self"]):
            return stages
        node, index = call["self"], inner
        stages.append((node, index))


def _is_the_traces_own(node: fx.Node) -> bool:
    """Whether a node is a constant as the trace keeps it (`torch.tensor(0.5)`): the captured graph names a later node."""
    lifted = node.target in (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)
    return node.op == "get_attr" or (lifted and any(user.target is torch.ops.aten.detach.default for user in node.users))


def _is_mask(value: Value) -> bool:
    """Whether a vector is worth lifting: a choice with a masking fill, or logic over smaller predicates."""
    if value.kind is Kind.BOOL:
        return value.statement.op in ("and", "or", "xor", "not") or _bounds_positions(value)
    if value.statement.op != "where":
        return False
    fills = [branch.constant for branch in value.operands[1:]]
    return any(fill is not None and fill <= MASK_FILL for fill in fills)


def _bounds_positions(value: Value) -> bool:
    """Whether a predicate reads data by batch and head only, like `n < lengths[b]`: then it has a closed form."""
    if value.statement.op == "load":
        return all(operand.statement.op == "const" or operand.statement.attribute in ("b", "h") for operand in value.operands)
    return all(_bounds_positions(operand) for operand in value.operands)


def _is_plain_load(value: Value) -> bool:
    """Whether a value is an element of a tensor at the canonical indices themselves."""
    plain = all(operand.statement.op in ("index", "const") for operand in value.operands)
    return value.statement.op == "load" and plain
