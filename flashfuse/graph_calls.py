"""Calls added to a rewritten graph: the op, its views, the ATen calls that make an input again, symbolic integers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from flashfuse.block_ranges import wants_table
from flashfuse.diagonals import program_text
from flashfuse.patterns.attention import Input, Match
from flashfuse.patterns.axes import same_size
from flashfuse.patterns.calls import is_tensor, value_of
from flashfuse.patterns.captured import Captured, Diagonals
from flashfuse.patterns.operands import View
from flashfuse.patterns.output_layout import order_in_memory
from flashfuse.refusal import Refused

if TYPE_CHECKING:
    from flashfuse.rewrite import Rewriter

_OF_THE_USER = ("stack_trace", "nn_module_stack")  # what says to whose line and module a node belongs
_MOST_ADDED = 64  # ATen calls added for one input; more would mean recomputing part of the model


@dataclass
class GraphCalls:
    """Adds calls to the new graph just before `target`, reading values as they were at time `at`."""

    rewriter: Rewriter
    target: fx.Node
    at: int
    blame: fx.Node

    def __post_init__(self) -> None:
        self.made: list[fx.Node] = []
        self.seeds: dict[fx.Node, fx.Node] = {}
        self.attentions: list[tuple[Match, fx.Node]] = []  # the calls of the op
        self.meta = {key: self.blame.meta[key] for key in _OF_THE_USER if key in self.blame.meta}

    def undo(self) -> None:
        """Take back every call that was added."""
        gone = set(self.made)
        for node in reversed(self.made):
            self.rewriter.graph.erase_node(node)
        self.rewriter.added = {nf: new for nf, new in self.rewriter.added.items() if new not in gone}
        self.rewriter.tables = {mask: table for mask, table in self.rewriter.tables.items() if table not in gone}

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        graph = self.rewriter.graph
        with graph.inserting_before(self.target):
            node = graph.call_function(function, args, kwargs)
        node.meta.update(self.meta)
        self.made.append(node)
        return node

    def method(self, name: str, tensor: fx.Node, *args: Any) -> fx.Node:
        graph = self.rewriter.graph
        with graph.inserting_before(self.target):
            node = graph.call_method(name, (tensor, *args))
        node.meta.update(self.meta)
        self.made.append(node)
        return node

    # ------------------------------------------------------------------------------------------ values

    def value(self, node: fx.Node) -> fx.Node:
        """A node of the new graph that holds the value of a normal form node."""
        known = self.rewriter.added.get(node)
        if known is not None:
            return known
        origin = self.rewriter.form.origin(node, self.at)
        found = None if origin is None else self.rewriter.now(origin.node)
        if origin is not None and found is not None:
            for place in origin.path:
                found = self.call(operator.getitem, found, place)
            return found
        if self.rewriter.form.origins.get(node) and origin is None:
            raise Refused("FF303", node, "its value is overwritten before the attention is finished")
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            raise Refused("FF304", node, "the captured graph has no value for it")
        if len(self.made) > _MOST_ADDED or torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Refused("FF304", node, "making it again would repeat too much, or a random number")
        self.rewriter.added[node] = self.again(node)
        return self.rewriter.added[node]

    def again(self, node: fx.Node) -> fx.Node:
        """The same ATen call in the new graph."""
        args = fx.map_arg(node.args, self.argument)
        kwargs = fx.map_arg(node.kwargs, self.argument)
        made = self.call(node.target, *args, **kwargs)
        made.meta.update({key: node.meta[key] for key in _OF_THE_USER if key in node.meta})
        return made

    def argument(self, node: fx.Node) -> Any:
        if is_tensor(node):
            return self.value(node)
        number = value_of(node)
        if isinstance(number, (int, torch.SymInt)):
            return self.integer(number)
        if isinstance(number, (torch.SymFloat, float)):
            return self.scalar(node)
        return self.value(node)

    def integer(self, number: int | torch.SymInt) -> Any:
        """An int, or a node that computes a symbolic integer from the graph's inputs."""
        if isinstance(number, int):
            return number
        if number.node.maybe_as_int() is not None:
            return int(number.node.maybe_as_int())
        return self._expression(number.node.expr)

    def scalar(self, node: fx.Node) -> Any:
        """A node of the new graph that holds a symbolic float."""
        wanted = value_of(node)
        for original, copy in self.rewriter.copies.items():
            held = original.meta.get("example_value")
            if copy._erased or self.rewriter.form.times.get(original, self.at + 1) > self.at:
                continue
            if isinstance(held, torch.SymFloat) and held.node.expr == wanted.node.expr:
                return copy
        raise Refused("FF304", node, f"no captured value is {wanted}")

    def _expression(self, expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        known = self._symbol(expression)
        if known is not None:
            return known
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            join = operator.add if isinstance(expression, sympy.Add) else operator.mul
            total = self._expression(expression.args[0])
            for part in expression.args[1:]:
                total = self.call(join, total, self._expression(part))
            return total
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            base = total = self._expression(expression.base)
            for _ in range(int(expression.exp) - 1):
                total = self.call(operator.mul, total, base)
            return total
        if type(expression).__name__ in ("FloorDiv", "CleanDiv", "PythonMod", "Mod"):
            join = operator.mod if "Mod" in type(expression).__name__ else operator.floordiv
            return self.call(join, *(self._expression(part) for part in expression.args))
        raise Refused("FF304", self.blame, f"no captured value is {expression}")

    def _symbol(self, expression: Any) -> Any:
        """A captured integer, or a length of a captured tensor, with this value."""
        for original, copy in self.rewriter.copies.items():
            if copy._erased or self.rewriter.form.times.get(original, self.at + 1) > self.at:
                continue
            held = original.meta.get("example_value")
            if isinstance(held, torch.SymInt) and held.node.expr == expression:
                return copy
            if original.op == "placeholder" and isinstance(held, torch.Tensor):
                for dim, size in enumerate(held.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == expression:
                        return self.call(torch.ops.aten.sym_size.int, copy, dim)
        return None

    # ------------------------------------------------------------------------------------------ the call

    def attention(self, match: Match) -> fx.Node:
        """The op on the match's inputs, and the views to the output's own layout; of a sum, all its terms added up.

        The backward reads the op's result, unlike that of a product: where the model writes into it, it writes into a copy.
        """
        if not match.terms:
            form, result = self.rewriter.form, self._attention(match)
            return self.method("clone", result) if form.gradients and form.overwritten(match.output) else result
        total: fx.Node | None = None
        for term in match.terms:
            own = self._attention(term)
            if abs(term.scale) != 1 or (total is None and term.scale < 0):
                own = self.call(torch.mul, own, term.scale)
            add = torch.sub if term.scale == -1 else torch.add
            total = own if total is None else self.call(add, total, own)
        assert total is not None
        return self.method("to", total, value_of(match.output).dtype)

    def _attention(self, match: Match) -> fx.Node:
        tensors = [self.operand(side) for side in (match.query, match.key, match.value)]
        captures = [self._capture(side, match) for side in match.captures]
        sizes = [self.integer(size) for size in match.sizes]
        function = torch.ops.flashfuse.attention.default
        ranges = self._ranges(match, captures, sizes)
        both = self.call(function, *tensors, captures, sizes, match.spec.to_text(), match.layout, *ranges)
        self.attentions.append((match, both))
        result = self.call(operator.getitem, both, 0)
        for factor in match.factors:
            other = self.value(factor.node)
            other = self.view(other, factor.view, copy=True, shape=tuple(value_of(factor.node).shape))
            result = self.call({"mul": torch.mul, "div": torch.div}[factor.name], result, other)
        result = self.view(result, match.out_view, copy=True, shape=[match.dims[letter] for letter in "BHME"])
        return result if match.out_order is None else self.lying(result, match.out_order)

    def lying(self, tensor: fx.Node, order: tuple[int, ...]) -> fx.Node:
        """A tensor, copied if its dimensions do not lie in memory in this order."""
        lying = self.method("contiguous", self.method("permute", tensor, order))
        return self.method("permute", lying, [order.index(dim) for dim in range(len(order))])

    def statistic(self, match: Match, both: fx.Node) -> fx.Node:
        """The rows' logsumexp in its own layout: a tensor of its own, since the user may write into it."""
        assert match.statistic is not None
        stats = self.call(operator.getitem, both, 1)
        sums = self.method("select", stats, 0, 0)
        shifted = match.spec.planes == 2
        whole = self.call(torch.add, sums, self.method("select", stats, 0, 1)) if shifted else self.method("clone", sums)
        shown = self.view(whole, match.statistic.view, copy=True, shape=[match.dims[letter] for letter in "BHM"])
        moved, order = match.statistic.view.order, order_in_memory(match.statistic.node)
        if any(list(each) != sorted(each) for each in (moved, order)):
            shown = self.lying(shown, order)
        wanted = value_of(match.statistic.node).dtype
        return shown if wanted is torch.float32 else self.method("to", shown, wanted)

    def _ranges(self, match: Match, captures: list[fx.Node], sizes: list[Any]) -> tuple[fx.Node, ...]:
        """The range table of the match's mask, if its kernels read one: made here, or that of an earlier match."""
        device = value_of(match.query.node).device
        mask_alone = match.spec.mask_alone
        if mask_alone is None or not wants_table(match.spec, device, match.dims["M"]):
            return ()
        spec, read = mask_alone
        shape = tuple(match.dims[letter] for letter in "BHMN")
        sides = tuple((side.node, str(side.view), side.diagonals) for side in (match.captures[place] for place in read))
        identity = (spec.key, sides, str(shape), str(match.sizes), device)
        known = self.rewriter.tables.get(identity)
        if known is None or not known < self.target:
            own = [captures[place] for place in read]
            function = torch.ops.flashfuse.block_ranges.default
            known = self.call(function, own, sizes, [self.integer(size) for size in shape], spec.to_text(), device)
            self.rewriter.tables[identity] = known
        return (known,)

    def _seed(self, node: fx.Node) -> fx.Node:
        """The seed in the place of the random numbers that a node draws, from torch's generator of its device: a node of its own,
        which CUDA graphs and checkpoints replay. Terms of a sum may share it."""
        if node not in self.seeds:
            self.seeds[node] = self.call(torch.randint, 2**63 - 1, (), dtype=torch.int64, device=value_of(node).device)
        return self.seeds[node]

    def _capture(self, side: Input | Captured, match: Match) -> fx.Node:
        if side.seed:
            return self._seed(side.node)
        if side.diagonals is not None:
            return self._diagonals(side.diagonals, match)
        if not is_tensor(side.node):
            return self.call(torch.scalar_tensor, self.scalar(side.node), dtype=torch.float32)
        node = self.value(side.node)
        if value_of(side.node).dtype.is_floating_point and side.node in self.rewriter.form.without_grad:
            node = self.method("detach", node)  # a view that `no_grad` made of a parameter says that it requires a gradient
        return node if side.view is None else self.view(node, side.view, copy=True, shape=tuple(value_of(side.node).shape))

    def _diagonals(self, table: Diagonals, match: Match) -> fx.Node:
        """A tensor with an element for each distance of a query and a key."""
        captures = [self._capture(each, match) for each in table.captures]
        sizes = [self.integer(size) for size in table.sizes]
        shape = [self.integer(match.dims[letter]) for letter in "BHMN"]
        device = value_of(match.query.node).device
        function = torch.ops.flashfuse.diagonals.default
        return self.call(function, captures, sizes, shape, table.letters, program_text(table.program), device)

    def operand(self, side: Input) -> fx.Node:
        """Query, key or value in canonical form."""
        if side.more:
            parts = [self.operand(part) for part in (replace(side, more=()), *side.more)]
            return self.call(torch.cat, parts, -1)
        node = self.value(side.node)
        if side.cast is not None and value_of(side.node).dtype != side.cast:
            node = self.method("to", node, side.cast)
        assert side.view is not None
        return self.view(node, side.view, copy=side.copy, shape=tuple(value_of(side.node).shape))

    def view(self, node: fx.Node, view: View, *, copy: bool, shape: Sequence[Any] | None = None) -> fx.Node:
        """The steps of a view, without those that do nothing."""
        in_place = view.order == tuple(range(len(view.order))) and not (view.insert or view.fixed)
        if in_place and shape is not None and _equal(shape, view.merge):
            return node
        if shape is None or not _equal(shape, view.split):
            node = self.method("view", node, [self.integer(size) for size in view.split])
        for place, at in view.fixed:
            node = self.method("select", node, place, at)
        if view.order != tuple(range(len(view.order))):
            node = self.method("permute", node, list(view.order))
        for place in view.insert:
            node = self.method("unsqueeze", node, place)
        if any(not isinstance(size, int) or size != -1 for size in view.expand):
            node = self.method("expand", node, [self.integer(size) for size in view.expand])
        unmerged = [view.kept[place] for place in view.order]
        if view.insert or not _equal(unmerged, view.merge):
            node = self.method("reshape" if copy else "view", node, [self.integer(size) for size in view.merge])
        return node


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))
