"""Sums of probabilities: `(softmax(S1) - lambda * softmax(S2)) @ V`, as differential attention has it.

The product with the value is linear in the probabilities, so each softmax is an attention of its own and the outputs are summed
(Ye et al. 2024, "Differential Transformer", equation 1). A way from a softmax to the product passes sums; each sum that it passes
must have all its terms from softmaxes that are understood too, or all of them are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Index, refined
from flashfuse.patterns.calls import bind, is_tensor, shape, value_of
from flashfuse.patterns.selections import is_selection
from flashfuse.patterns.spellings import CASTS, ROWS
from flashfuse.patterns.user_code import describe
from flashfuse.refusal import Refused

aten = torch.ops.aten
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor})


@dataclass(frozen=True)
class Edge:
    """A sum and the place of the term by which a way enters it."""

    node: fx.Node
    place: int

    @property
    def scale(self) -> float:
        """The number that the sum multiplies this term by."""
        alpha = float(value_of(bind(self.node, ("self", "other", "alpha"))["alpha"]))
        signs = {aten.add.Tensor: (1.0, alpha), aten.sub.Tensor: (1.0, -alpha), aten.rsub.Tensor: (-alpha, 1.0)}
        return signs[self.node.target][self.place]


@dataclass(frozen=True)
class Factor:
    """A tensor without the keys that a term's output is multiplied (`name` "mul") or divided by, with its index.

    `node` is the call on the way of the probabilities.
    """

    node: fx.Node
    name: str
    tensor: fx.Node
    index: Index


def edge_of(user: fx.Node, node: fx.Node) -> Edge | None:
    """The edge by which `node` enters a sum of two other tensors of its own shape; None if the user is no such sum."""
    if user.target not in _SUMS:
        return None
    call = bind(user, ("self", "other", "alpha"))
    terms = (call["self"], call["other"])
    if not all(is_tensor(term) for term in terms) or terms[0] is terms[1]:
        return None
    alike = all(len(shape(term)) == len(shape(user)) and all(map(axes.same_size, shape(term), shape(user))) for term in terms)
    number = isinstance(value_of(call["alpha"]), (int, float))
    return Edge(user, terms.index(node)) if alike and number else None


def check_terms(ways: Sequence[tuple[Edge, ...]]) -> None:
    """Refuse (FF401) ways to one product that are not, each once, the terms of the sums that they pass.

    A way is the sums from the softmax down. A product of two softmaxes among the terms shows as two ways by the same sums.
    """
    if len(ways) == 1 and not ways[0]:
        return
    last = next((way[-1].node for way in ways if way), None)
    assert last is not None
    terms = [[way[:-1] for way in ways if way and way[-1] == Edge(last, place)] for place in (0, 1)]
    if not all(terms) or sum(map(len, terms)) != len(ways):
        raise Refused("FF401", last, f"{describe(last)} on the probabilities")
    for own in terms:
        if len(own) > 1 and not all(own):
            raise Refused("FF401", last, f"{describe(last)} on a product of probabilities")
        check_terms(own)


def factors_behind(
    path: Sequence[fx.Node], before: Sequence[fx.Node], index: Sequence[Index], keys: tuple[Axis, ...]
) -> tuple[Factor, ...]:
    """The factors on the way of a term that may as well multiply its output: nothing behind them looks at single elements.

    `before` and `index`: what each node of the path is applied to, and the index of its result.
    """
    found: list[Factor] = []
    for node, operand, own in reversed(list(zip(path, before, index, strict=True))):
        factor = _factor(node, operand, own, keys)
        if factor is not None:
            found.append(factor)
        elif not _passes_factors(node, operand):
            break
    return tuple(found)


def _factor(node: fx.Node, operand: fx.Node, index: Index, keys: tuple[Axis, ...]) -> Factor | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    call = bind(node, ("self", "other"))
    name = "mul" if node.target is aten.mul.Tensor else "div"
    tensor = call["other"] if call["self"] is operand else call["self"]
    if not is_tensor(tensor) or tensor is operand or (name == "div" and tensor is not call["other"]):
        return None
    own = axes.broadcast(index, shape(tensor))
    over_keys = any(axis in refined(keys) for dim in own for axis in refined(dim))  # type: ignore[arg-type]
    return None if over_keys or not value_of(tensor).dtype.is_floating_point else Factor(node, name, tensor, own)


def _passes_factors(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a call gives the same whether a factor is applied before it or behind it."""
    if is_selection(node) or node.target in CASTS or node.target is aten.dropout.default or edge_of(node, operand) is not None:
        return True
    row = ROWS.get(node.target)
    if row is not None and row.index is not None:
        return True
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return sum(argument is operand for argument in node.args) == 1
    return node.target in (aten.div.Tensor, aten.div.Scalar) and node.args[0] is operand is not node.args[1]
