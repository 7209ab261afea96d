"""From matches back to the captured graph: each output is replaced by one call of `flashfuse::attention`.

The captured graph is copied and only ever gains nodes before an output and loses nodes that nobody needs any more, so
every write, random number and mode switch of the original stays where it was. An input of the call is a value of the
captured graph that still has, at the place of the call, the value that the attention read; where the normal form has a
value that the captured graph does not name (a cast by autocast), the few ATen calls that make it are added.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.patterns.attention import Input, Match
from flashfuse.patterns.calls import is_tensor, value_of
from flashfuse.patterns.normal_form import NormalForm, Origin, is_opaque
from flashfuse.patterns.operands import View
from flashfuse.refusal import Refused

_MOST_ADDED = 64  # ATen calls added for one input; more would mean recomputing part of the model


class Rewriter:
    """A copy of a captured graph in which matches are replaced one by one, in graph order."""

    def __init__(self, module: fx.GraphModule, form: NormalForm) -> None:
        self.form = form
        self.module = module
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(module.graph, self.copies)
        output = next(node for node in module.graph.nodes if node.op == "output")
        self.graph.output(result).meta.update(output.meta)
        self.originals = {copy: node for node, copy in self.copies.items()}
        self.effects = _Effects(form)
        self.added: dict[fx.Node, fx.Node] = {}  # normal form node -> node of the new graph
        self.replaced: dict[fx.Node, fx.Node] = {}  # captured node whose result an attention now gives -> that result
        self.expanded: set[fx.Node] = set()
        self.changed = False

    def finish(self) -> fx.GraphModule:
        """The new module. Raises if the graph is not well formed."""
        self.graph.lint()
        module = fx.GraphModule(self.module, self.graph, self.module.__class__.__name__)
        module.meta.update(getattr(self.module, "meta", {}))
        return module

    # ------------------------------------------------------------------------------------------ replacing

    def replace(self, match: Match) -> None:
        """Put the op in the place of a match's output. Raises Refused and leaves the graph as it was otherwise."""
        target, origin = self._place(match)
        at = self.form.times[origin.node] - 1
        builder = _Calls(self, target, at, match.anchor)
        try:
            result = builder.attention(match)
        except BaseException:
            builder.undo()
            raise
        if origin.path:
            for user in list(target.users):
                if user.target is operator.getitem and user.args[1] == origin.path[0]:
                    user.replace_all_uses_with(result)
        else:
            target.replace_all_uses_with(result)
            self.replaced[origin.node] = result
        self.changed = True
        self._erase(origin.node)

    def now(self, node: fx.Node) -> fx.Node | None:
        """What gives a captured node's result in the new graph; None if nothing does any more."""
        return self.replaced.get(node) or (None if self.copies[node]._erased else self.copies[node])

    def fence(self, anchor: fx.Node) -> bool:
        """Hide a softmax's result from Inductor's own attention matcher. False if the graph does not name it."""
        origins = [
            o for o in self.form.origins.get(anchor, ()) if o.node is self.form.produced.get(anchor) and not o.path
        ]
        if not origins or self.copies[origins[0].node].graph is not self.graph:
            return False
        target = self.copies[origins[0].node]
        with self.graph.inserting_after(target):
            fenced = self.graph.call_function(torch.ops.flashfuse.fence.default, (target,))
        fenced.meta = {key: target.meta[key] for key in ("stack_trace", "example_value") if key in target.meta}
        target.replace_all_uses_with(fenced, delete_user_cb=lambda user: user is not fenced)
        self.changed = True
        return True

    def _place(self, match: Match) -> tuple[fx.Node, Origin]:
        """Where the output is made: the captured node, expanded into ATen calls if it hides the attention."""
        made_by = self.form.produced[match.output]
        for origin in self.form.origins.get(match.output, ()):
            if origin.node is made_by and made_by not in self.expanded and len(origin.path) <= 1:
                return self.copies[made_by], origin
        self.expand(made_by)
        return self.added[match.output], Origin(made_by, (), self.form.times[made_by], 0)

    def expand(self, node: fx.Node) -> None:
        """Replace a captured call by the ATen calls that it stands for (once)."""
        if node in self.expanded:
            return
        if is_opaque(node) or any(time == self.form.times[node] for time, _storage in self.form.writes):
            raise Refused("FF304", node, f"{node.target} writes in place or cannot be looked into")
        copy = self.copies[node]
        calls = _Calls(self, copy, self.form.times[node] - 1, node)
        inside = [each for each in self.form.graph.nodes if self.form.produced.get(each) is node]
        try:
            for each in inside:
                self.added[each] = calls.again(each)
            self._take_over(node, copy)
        except BaseException:
            calls.undo()
            raise
        self.expanded.add(node)
        self.changed = True

    def _take_over(self, node: fx.Node, copy: fx.Node) -> None:
        leaves = {o.path: found for found, origins in self.form.origins.items() for o in origins
                  if o.node is node and found in self.added}  # fmt: skip
        for user in list(copy.users):
            if user.target is operator.getitem and (user.args[1],) in leaves:
                user.replace_all_uses_with(self.added[leaves[(user.args[1],)]])  # type: ignore[index]
                self.graph.erase_node(user)
        if () in leaves:
            copy.replace_all_uses_with(self.added[leaves[()]])
        if copy.users:
            raise Refused("FF304", node, f"the result of {node.target} is used in a way that was not understood")

    # ------------------------------------------------------------------------------------------ erasing

    def _erase(self, last: fx.Node) -> None:
        """Erase what only the replaced output needed: never a node whose effect somebody else can see.

        A node goes when its last user has gone; nodes that write to or show one written storage go together.
        """
        dead: set[fx.Node] = set()
        pending = [last]
        while pending:
            unit = self.effects.unit(pending.pop())
            if unit & dead or not all(self._may_go(node, dead | unit) for node in unit):
                continue
            dead |= unit
            pending.extend(argument for node in unit for argument in node.all_input_nodes)
        for node in sorted(dead, key=lambda node: self.form.times[node], reverse=True):
            if not self.copies[node]._erased:
                self.graph.erase_node(self.copies[node])

    def _may_go(self, node: fx.Node, dead: set[fx.Node]) -> bool:
        if node.op not in ("call_function", "call_method") or is_opaque(node) or node in self.effects.random:
            return False
        return all(self.originals.get(user) in dead for user in self.copies[node].users)


class _Effects:
    """What captured nodes do besides giving a result: the written storages, and the use of random numbers."""

    def __init__(self, form: NormalForm) -> None:
        by_time = {time: node for node, time in form.times.items()}
        self.touching: dict[int, set[fx.Node]] = {}  # written storage -> nodes that write or show it
        for time, storage in form.writes:
            self.touching.setdefault(storage, set()).add(by_time[time])
        for origins in form.origins.values():
            for origin in origins:
                if origin.storage in self.touching:
                    self.touching[origin.storage].add(origin.node)
        self.storages: dict[fx.Node, list[int]] = {}
        for storage, nodes in self.touching.items():
            for node in nodes:
                self.storages.setdefault(node, []).append(storage)
        self.random = {
            made_by
            for node, made_by in form.produced.items()
            if isinstance(node.target, torch._ops.OpOverload)
            and torch.Tag.nondeterministic_seeded in node.target.tags
            and not _is_idle_dropout(node)
        }

    def unit(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that can only go together with this one."""
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in found:
                found.add(current)
                for storage in self.storages.get(current, ()):
                    stack.extend(self.touching[storage])
        return found


def _is_idle_dropout(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.dropout.default:
        return False
    return not node.args[2] or node.args[1] == 0.0


@dataclass
class _Calls:
    """Adds calls to the new graph just before `target`, reading values as they were at time `at`."""

    rewriter: Rewriter
    target: fx.Node
    at: int
    blame: fx.Node

    def __post_init__(self) -> None:
        self.made: list[fx.Node] = []
        self.meta = {key: self.blame.meta[key] for key in ("stack_trace",) if key in self.blame.meta}

    def undo(self) -> None:
        """Take back every call that was added."""
        gone = set(self.made)
        for node in reversed(self.made):
            self.rewriter.graph.erase_node(node)
        self.rewriter.added = {nf: new for nf, new in self.rewriter.added.items() if new not in gone}

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
        made.meta.update({key: node.meta[key] for key in ("stack_trace",) if key in node.meta})
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
        """The op on the match's inputs, and the views to the output's own layout."""
        tensors = [self.operand(side) for side in (match.query, match.key, match.value)]
        captures = [self._capture(side.node) for side in match.captures]
        sizes = [self.integer(size) for size in match.sizes]
        function = torch.ops.flashfuse.attention.default
        both = self.call(function, *tensors, captures, sizes, match.spec.to_text(), match.layout)
        result = self.call(operator.getitem, both, 0)
        return self.view(result, match.out_view, copy=True, shape=[match.dims[letter] for letter in "BHME"])

    def _capture(self, node: fx.Node) -> fx.Node:
        if is_tensor(node):
            return self.value(node)
        return self.call(torch.scalar_tensor, self.scalar(node), dtype=torch.float32)

    def operand(self, side: Input) -> fx.Node:
        """Query, key or value in canonical form."""
        node = self.value(side.node)
        if side.cast is not None and value_of(side.node).dtype != side.cast:
            node = self.method("to", node, side.cast)
        assert side.view is not None
        return self.view(node, side.view, copy=side.copy, shape=tuple(value_of(side.node).shape))

    def view(self, node: fx.Node, view: View, *, copy: bool, shape: Sequence[Any] | None = None) -> fx.Node:
        """The steps of a view, without those that do nothing."""
        in_place = view.order == tuple(range(len(view.order))) and not view.insert
        if in_place and shape is not None and _equal(shape, view.merge):
            return node
        if shape is None or not _equal(shape, view.split):
            node = self.method("view", node, [self.integer(size) for size in view.split])
        if view.order != tuple(range(len(view.order))):
            node = self.method("permute", node, list(view.order))
        for place in view.insert:
            node = self.method("unsqueeze", node, place)
        if any(not isinstance(size, int) or size != -1 for size in view.expand):
            node = self.method("expand", node, [self.integer(size) for size in view.expand])
        unmerged = [view.split[place] for place in view.order]
        if view.insert or not _equal(unmerged, view.merge):
            node = self.method("reshape" if copy else "view", node, [self.integer(size) for size in view.merge])
        return node


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    from flashfuse.patterns.axes import same_size

    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))
