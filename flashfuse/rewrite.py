"""From matches back to the captured graph: each output is replaced by one call of `flashfuse::attention`.

The captured graph is copied and only ever gains nodes before an output and loses nodes that nobody needs any more, so
every write, random number and mode switch of the original stays where it was. An input of the call is a value of the
captured graph that still has, at the place of the call, the value that the attention read; where the normal form has a
value that the captured graph does not name (a cast by autocast), the few ATen calls that make it are added.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from flashfuse.graph_calls import GraphCalls
from flashfuse.patterns.attention import Match
from flashfuse.patterns.calls import draws_random
from flashfuse.patterns.normal_form import NormalForm, Origin, is_opaque
from flashfuse.refusal import Refused


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
        self.tables: dict[tuple[Any, ...], fx.Node] = {}  # what decides a range table -> the node that makes it
        self.expanded: set[fx.Node] = set()
        self.drawn: set[fx.Node] = set()  # normal form nodes in whose place a seed was drawn
        self.sums: dict[fx.Node, list[fx.Node] | Exception] = {}  # output that is a sum of attentions -> what came of it
        self.results: set[fx.Node] = set()  # what now stands in the place of captured results
        self.given: set[fx.Node] = set()  # normal form nodes that an attention's row statistic stands for
        self.changed = False

    def finish(self) -> fx.GraphModule:
        """The new module. Raises if the graph is not well formed."""
        self.graph.lint()
        module = fx.GraphModule(self.module, self.graph, self.module.__class__.__name__)
        module.meta.update(getattr(self.module, "meta", {}))
        return module

    # ------------------------------------------------------------------------------------------ replacing

    def replace(self, match: Match) -> list[fx.Node]:
        """Put the op in the place of a match's output; returns the captured nodes that it stands for.

        A match that is a term of a sum stands for all of them. Raises Refused, and then leaves the graph as it was.
        """
        if match.terms:
            return self._replace_once(match)
        return self._replace(match)

    def _replace_once(self, match: Match) -> list[fx.Node]:
        if match.output not in self.sums:
            try:
                self.sums[match.output] = self._replace(match)
            except Exception as error:
                self.sums[match.output] = error
        found = self.sums[match.output]
        if isinstance(found, Exception):
            raise found
        return found

    def _replace(self, match: Match) -> list[fx.Node]:
        target, origin = self._place(match)
        at = self.form.times[origin.node] - 1
        builder = GraphCalls(self, target, at, match.anchor)
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
            self.effects.release(origin.node)
        self.results.add(result)
        self.changed = True
        self.drawn |= {side.node for each in match.terms or (match,) for side in each.captures if side.seed}
        gone = self._erase(origin.node)
        for term, call in builder.attentions:
            gone += self._give_statistic(term, call, result, at)
        return gone

    def _give_statistic(self, match: Match, call: fx.Node, result: fx.Node, at: int) -> list[fx.Node]:
        """Let the op's row statistic, made before `result`, stand for the graph's logsumexp; returns what that makes needless.

        The graph keeps its own where the op comes too late for a user, or where somebody writes into it.
        """
        if match.statistic is None:
            return []
        made_by = self.form.produced[match.statistic.node]
        origins = self.form.origins.get(match.statistic.node, ())
        named = any(origin.node is made_by and not origin.path for origin in origins)
        copy = self.copies[made_by]
        if not named or made_by in self.expanded or made_by in self.effects.storages or copy._erased:
            return []
        if not all(result < user for user in copy.users):
            return []
        known = GraphCalls(self, result, at, match.anchor).statistic(match, call)
        copy.replace_all_uses_with(known)
        self.replaced[made_by] = known
        self.given.add(match.statistic.node)
        return self._erase(made_by)

    def now(self, node: fx.Node) -> fx.Node | None:
        """What gives a captured node's result in the new graph; None if nothing does any more."""
        return self.replaced.get(node) or (None if self.copies[node]._erased else self.copies[node])

    def sweep(self) -> None:
        """Erase added calls that nothing uses. Only once all matches are replaced: a later one may use them."""
        stands_for = {copy: node for node, copy in self.added.items()}
        for node in reversed(list(self.graph.nodes)):
            functional = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
            if node in self.originals or node.users or not functional:
                continue
            if not draws_random(node) or stands_for.get(node) in self.drawn:
                self.graph.erase_node(node)

    def still_made(self, node: fx.Node) -> bool:
        """Whether the original code still makes a value of the normal form, after `sweep`."""
        made_by = self.form.produced[node]
        found = self.added.get(node) if made_by in self.expanded else self.copies[made_by]
        return found is not None and not found._erased

    def fence(self, anchor: fx.Node) -> bool:
        """Hide a softmax's result from Inductor's own attention matcher. False if the graph does not name it."""
        origins = [
            o for o in self.form.origins.get(anchor, ()) if o.node is self.form.produced.get(anchor) and not o.path
        ]
        if not origins or self.copies[origins[0].node]._erased:
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
        calls = GraphCalls(self, copy, self.form.times[node] - 1, node)
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
        self._drop_unused_items(copy)
        items = {user: (user.args[1],) for user in copy.users if user.target is operator.getitem}
        if () not in leaves and any(items.get(user) not in leaves for user in copy.users):
            raise Refused("FF304", node, f"the result of {node.target} is used in a way that was not understood")
        for user, path in items.items():
            if path in leaves:
                user.replace_all_uses_with(self.added[leaves[path]])  # type: ignore[index]
                self.graph.erase_node(user)
        if () in leaves:
            copy.replace_all_uses_with(self.added[leaves[()]])

    def _drop_unused_items(self, copy: fx.Node) -> None:
        """Erase what is made of a result and never read (the weights of an attention, say)."""
        for user in list(copy.users):
            self._drop_unused_items(user)
            original = self.originals.get(user)
            touched = original is None or original in self.effects.storages
            if original is not None and not touched and self._may_go(original, set()):
                self.graph.erase_node(user)

    # ------------------------------------------------------------------------------------------ erasing

    def _erase(self, last: fx.Node) -> list[fx.Node]:
        """Erase what only the replaced output needed, and return it: never a node whose effect somebody else can see.

        A node goes when its last user has gone; nodes that write to or show one written storage go together.
        """
        dead: set[fx.Node] = set()
        pending = [last]
        while pending:
            unit = self._with_users(self.effects.unit(pending.pop()), dead)
            if unit & dead or not all(self._may_go(node, dead | unit) for node in unit):
                continue
            dead |= unit
            pending.extend(argument for node in unit for argument in node.all_input_nodes)
        gone = sorted(dead, key=lambda node: self.form.times[node])
        for node in reversed(gone):
            if not self.copies[node]._erased:
                self.graph.erase_node(self.copies[node])
        return gone

    def _with_users(self, unit: set[fx.Node], dead: set[fx.Node]) -> set[fx.Node]:
        """A unit that writes, and all that is computed from it: what is written may be made of what was there before."""
        if not any(node in self.effects.storages for node in unit):
            return unit
        found: set[fx.Node] = set()
        stack = list(unit)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            users = (self.originals.get(user) for user in self.copies[node].users)
            stack.extend(each for each in (*self.effects.unit(node), *users) if each is not None and each not in dead)
        return found

    def _may_go(self, node: fx.Node, dead: set[fx.Node]) -> bool:
        if node.op not in ("call_function", "call_method") or is_opaque(node):
            return False
        if not self.effects.random.get(node, self.drawn) <= self.drawn:
            return False
        if node in self.effects.storages and not self.results.isdisjoint(self.copies[node].all_input_nodes):
            return False  # it shows or writes an attention's result, not what is to go
        return all(self.originals.get(user) in dead for user in self.copies[node].users)


class _Effects:
    """What captured nodes do besides giving a result: the written storages, and the use of random numbers."""

    def __init__(self, form: NormalForm) -> None:
        self.times = form.times
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
        self.random: dict[fx.Node, set[fx.Node]] = {}  # captured node -> the random numbers that it draws
        for node, made_by in form.produced.items():
            if draws_random(node):
                self.random.setdefault(made_by, set()).add(node)

    def release(self, node: fx.Node) -> None:
        """Note that something else gives a node's result: what shows or writes it later does so to the new result.

        A node that itself writes into, or shows, what was there before stays with it.
        """
        for storage in list(self.storages.get(node, ())):
            if all(self.times[node] <= self.times[other] for other in self.touching[storage]):
                self.touching[storage].discard(node)
                self.storages[node].remove(storage)
        if not self.storages.get(node, True):
            del self.storages[node]

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
