"""Several products in one sum that are one product of a longer head dim: `q1 @ k1^T + q2 @ k2^T` is `[q1, q2] @ [k1, k2]^T`.

DeepSeek's attention adds the product of the rotated parts to that of the others so. Joining costs a copy of the length of queries
and keys; to capture all products but one would cost a tensor over queries and keys each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.patterns import axes, contraction
from flashfuse.patterns.calls import bind, is_tensor, shape, value_of

aten = torch.ops.aten
_ADDING = frozenset({aten.baddbmm.default, aten.addmm.default})


@dataclass(frozen=True)
class JoinedSum:
    """A node that is `factor` times the sum of `products`, all of its own shape and dtype."""

    node: fx.Node
    products: tuple[fx.Node, ...]
    factor: float


def largest_sum(product: fx.Node, carriers: Iterable[fx.Node]) -> JoinedSum | None:
    """The largest sum of two and more products that a product is a term of, among the nodes that carry the score."""
    found = [joined for node in (product, *carriers) for joined in [_sum(node)] if joined and product in joined.products]
    several = [joined for joined in found if len(set(joined.products)) > 1]
    return max(several, key=lambda joined: len(joined.products), default=None)


def _sum(node: fx.Node, most: int = 8) -> JoinedSum | None:
    """A node as a sum of products; None if it is anything else. Nothing may be scaled, masked or cast for one term alone."""
    if node.target in _ADDING:
        return _product_and_sum(node, most)
    if contraction.is_product(node):
        return JoinedSum(node, (node,), 1.0)
    if most == 0 or node.target not in _TERMS or not is_tensor(node):
        return None
    call = bind(node, ("self", "other", "alpha"))
    one, other = call["self"], call["other"]
    if node.target is aten.add.Tensor:
        return None if value_of(call["alpha"]) != 1 else _added(node, [_alike(node, term, most) for term in (one, other)])
    number = value_of(other)
    inner = _alike(node, one, most)
    if inner is None or not isinstance(number, (int, float)) or number == 0:
        return None
    factor = inner.factor * number if node.target in (aten.mul.Tensor, aten.mul.Scalar) else inner.factor / number
    return JoinedSum(node, inner.products, float(factor))


_TERMS = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


def _product_and_sum(node: fx.Node, most: int) -> JoinedSum | None:
    """`baddbmm` as its own product, added to others."""
    call = bind(node, ("self", "batch1", "batch2", "mat1", "mat2", "alpha", "beta"))
    alpha, beta = value_of(call["alpha"]), value_of(call["beta"])
    if alpha != 1 or beta not in (0, 1):
        return None
    own = JoinedSum(node, (node,), 1.0)
    return own if beta == 0 else _added(node, [_alike(node, call["self"], most), own])


def _alike(node: fx.Node, term: object, most: int) -> JoinedSum | None:
    """A term of a sum as a sum of products, if it is not broadcast or cast."""
    if not isinstance(term, fx.Node) or not is_tensor(term) or value_of(term).dtype != value_of(node).dtype:
        return None
    alike = len(shape(term)) == len(shape(node)) and all(map(axes.same_size, shape(term), shape(node)))
    return _sum(term, most - 1) if alike else None


def _added(node: fx.Node, terms: list[JoinedSum | None]) -> JoinedSum | None:
    first, second = terms
    if first is None or second is None or first.factor != second.factor or set(first.products) & set(second.products):
        return None
    return JoinedSum(node, (*first.products, *second.products), first.factor)
