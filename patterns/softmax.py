"""Every way to write a softmax, read as `exp(x)` divided by its own sum over one dimension.

`recognise(node)` tells whether a node is the last of a softmax: the call itself, `log_softmax(x).exp()`,
`exp(x - logsumexp(x))`, `e / e.sum()` with `e = exp(x)`, or a product with a value that is divided by the sum of its factor
`e` only afterwards (late normalisation). A term of x that is the same for a whole row, such as its maximum, cancels and is
passed over; so written without the maximum, where eager code may overflow, the stable value is what is computed.

A new spelling is one new row in `_FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashfuse.patterns import axes, contraction
from flashfuse.patterns.axes import Index, refined
from flashfuse.patterns.calls import bind, is_tensor, normal_dim, shape
from flashfuse.patterns.exponential import exponent, exponential_nodes
from flashfuse.patterns.selections import is_selection
from flashfuse.patterns.spellings import CASTS, ROWS
from flashfuse.refusal import Refused

aten = torch.ops.aten
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})


@dataclass(frozen=True)
class LateSum:
    """Late normalisation: `output = dividend / sum`; `path` leads from the exponentials to the product.

    The dividend is the product or a view of it.
    """

    output: fx.Node
    dividend: fx.Node
    product: fx.Node
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Softmax:
    """A softmax over dimension `dim` of `scores`, or, if `exponential`, of the logarithm of `scores`.

    `anchor` holds the probabilities, or with `late` the normalised output. `inside` are the other nodes that belong to it.
    `added`: a positive number in the sum of exponentials, which is divided by the exponential of the row's shift if `shifted`.
    """

    anchor: fx.Node
    scores: fx.Node
    dim: int
    exponential: bool = False
    inside: tuple[fx.Node, ...] = ()
    late: LateSum | None = None
    added: float | None = None
    shifted: bool = False
    subtracted: bool = False  # the logarithm of the sum is subtracted as it is, rounded to the size of the scores


def recognise(node: fx.Node) -> Softmax | None:
    """The softmax that ends in a node, or None."""
    form = _FORMS.get(node.target)
    return None if form is None else form(node)


def leads_to_product(node: fx.Node) -> bool:
    """Whether a product consumes a value, perhaps after elementwise operations and views."""
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        if contraction.is_product(user):
            return True
        same_shape = is_tensor(user) and len(shape(user)) == len(shape(node)) and shape(user) == shape(node)
        if user.target in ROWS or same_shape or is_selection(user):
            stack.extend(user.users)
    return False


# ------------------------------------------------------------------------------------------------ one call


def _softmax_call(node: fx.Node) -> Softmax:
    call = bind(node, ("self", "dim", "dtype", "half_to_float"))
    return Softmax(node, call["self"], normal_dim(call["dim"], len(shape(node))))


def _exponential(node: fx.Node) -> Softmax | None:
    """`log_softmax(x).exp()` and `exp(x - logsumexp(x))`."""
    source, passed = same_elements(bind(node, ("self",))["self"])
    if source.target in _LOG_SOFTMAX:
        call = bind(source, ("self", "dim", "dtype", "half_to_float"))
        dim = normal_dim(call["dim"], len(shape(source)))
        return Softmax(node, call["self"], dim, inside=(*passed, source))
    if source.target is not aten.sub.Tensor:
        return None
    call = bind(source, ("self", "other"))
    minuend, subtrahend = call["self"], call["other"]
    if not is_tensor(minuend) or not is_tensor(subtrahend):
        return None
    total = _reduction(node, subtrahend, LOG_SUMS, minuend)
    if total is None:
        return None
    return Softmax(node, minuend, total.dim, inside=(*passed, source, *total.nodes), subtracted=True)


_LOG_SOFTMAX = frozenset({aten.log_softmax.int, aten._log_softmax.default})
LOG_SUMS = frozenset({aten.logsumexp.default})


# ------------------------------------------------------------------------------------------------ exponentials and their sum


def _divided(node: fx.Node) -> Softmax | None:
    call = bind(node, ("self", "other"))
    return _normalised(node, call["self"], call["other"])


def _multiplied(node: fx.Node) -> Softmax | None:
    """`e * (1 / e.sum())`, the factors in any order."""
    call = bind(node, ("self", "other"))
    for tensor, factor in ((call["self"], call["other"]), (call["other"], call["self"])):
        total = _inverted(factor)
        if total is not None:
            return _normalised(node, tensor, total)
    return None


def _inverted(factor: Any) -> Any:
    """x if a factor is 1 / x."""
    if not is_tensor(factor):
        return None
    source, _passed = same_elements(factor)
    first, second = (*source.args, None, None)[:2]
    if source.target is aten.mul.Tensor and _is_number(second, 1):  # `1.0 / x` is x.reciprocal() * 1.0
        return _inverted(first)
    inverts = source.target is aten.reciprocal.default or (source.target is aten.pow.Tensor_Scalar and _is_number(second, -1))
    return first if inverts else None


def _is_number(x: Any, number: int) -> bool:
    return isinstance(x, (int, float)) and x == number


def _normalised(node: fx.Node, tensor: Any, divisor: Any) -> Softmax | None:
    if not is_tensor(tensor) or not is_tensor(divisor):
        return None
    numerator, passed = same_elements(tensor)
    if exponent(numerator) is not None:
        divisor, more = _without_addend(divisor, numerator)
        total = _reduction(node, divisor, _SUMS, numerator)
        if total is None:
            return None
        inside = (*passed, *total.nodes, *more.nodes)
        return Softmax(node, numerator, total.dim, exponential=True, inside=inside, added=more.number, shifted=more.shifted)
    return _late(node, tensor, divisor)


_SUMS = frozenset({aten.sum.dim_IntList})


@dataclass(frozen=True)
class _Addend:
    """A number in a sum of exponentials, see `Softmax.added`."""

    number: float | None = None
    shifted: bool = False
    nodes: tuple[fx.Node, ...] = ()


def _without_addend(divisor: fx.Node, numerator: fx.Node) -> tuple[fx.Node, _Addend]:
    """`sum + c` as the sum and c, `sum + exp(-shift)`, with the shift that was taken off the scores, as the sum and 1."""
    if divisor.target not in (aten.add.Tensor, aten.add.Scalar) or divisor.kwargs:
        return divisor, _Addend()
    total, number = divisor.args[:2]
    if isinstance(number, (int, float)) and is_tensor(total):
        return (total, _Addend(float(number), False, (divisor,))) if number > 0 else (divisor, _Addend())  # type: ignore[return-value]
    shift = exponential_nodes(numerator)[-1].args[0]
    for one, other in ((total, number), (number, total)):
        if not is_tensor(one) or not is_tensor(other) or other.target is not aten.exp.default:  # type: ignore[union-attr]
            continue
        negated = other.args[0]  # type: ignore[union-attr]
        taken = shift.target is aten.sub.Tensor and not shift.kwargs and negated.target is aten.neg.default  # type: ignore[union-attr]
        if taken and negated.args[0] is shift.args[1] and shape(other) == shape(one):  # type: ignore[union-attr]
            return one, _Addend(1.0, True, (divisor, other, negated))  # type: ignore[return-value]
    return divisor, _Addend()


def _late(node: fx.Node, tensor: fx.Node, divisor: fx.Node) -> Softmax | None:
    """`(e @ value) / e.sum()`: the division's sum must run over what the product sums, row by row."""
    index: Index = tuple(axes.fresh(f"r{place}_", size) for place, size in enumerate(shape(node)))
    product, own, above = upwards(tensor, axes.broadcast(index, shape(tensor)))
    if product is None or not contraction.is_product(product):
        return None
    summing, sum_index, chain = upwards(divisor, axes.broadcast(index, shape(divisor)))
    if summing is None or summing.target not in _SUMS:
        return None
    operands = contraction.operands(product, own, "n")
    for factor, factor_index in ((operands.left, operands.left_index), (operands.right, operands.right_index)):
        numerator, found, path = upwards(factor, factor_index)
        source, inner = same_elements(summing.args[0])  # type: ignore[arg-type]
        if numerator is None or source is not numerator or exponent(numerator) is None:
            continue
        dim = _summed_dim(summing, sum_index, found)
        if dim is None:
            raise Refused("FF202", node, "the output is not divided by the sums of its own rows")
        late = LateSum(node, tensor, product, tuple(reversed(path)))
        inside = (*above, product, *path, *chain, summing, *inner)
        return Softmax(node, numerator, dim, exponential=True, inside=inside, late=late)
    return None


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class _Reduction:
    dim: int
    nodes: tuple[fx.Node, ...]


def _reduction(blame: fx.Node, tensor: fx.Node, targets: frozenset[Any], source: fx.Node) -> _Reduction | None:
    """`tensor` as a reduction of `source` over one dim, row by row in source's own shape; None if it is not one.

    Refuses (FF202) a reduction of the same tensor that is combined with other rows than its own in `blame`, if a product
    consumes that.
    """
    index: Index = tuple(axes.fresh(f"r{place}_", size) for place, size in enumerate(shape(source)))
    if len(shape(tensor)) > len(index):
        return None
    node, own, passed = upwards(tensor, axes.broadcast(index, shape(tensor)))
    if node is None or node.target not in targets:
        return None
    operand, inner = same_elements(node.args[0])  # type: ignore[arg-type]
    if operand is not same_elements(source)[0]:
        return None
    dim = _summed_dim(node, own, index)
    if dim is None and not leads_to_product(blame):
        return None
    if dim is None:
        raise Refused("FF202", node, f"{node.target} over a dim whose result does not belong to the same rows")
    return _Reduction(dim, (*passed, node, *inner))


def _summed_dim(reduction: fx.Node, own: Index, source: Index) -> int | None:
    """The one dim that a reduction removes, if its result at `own` belongs to the row of `source`."""
    call = bind(reduction, ("self", "dim", "keepdim", "dtype"))
    dims = [call["dim"]] if isinstance(call["dim"], int) else list(call["dim"] or ())
    if len(dims) != 1:
        return None
    dim = normal_dim(dims[0], len(source))
    rest = (*own[:dim], *own[dim + 1 :]) if call["keepdim"] else own
    others = (*source[:dim], *source[dim + 1 :])
    same = len(rest) == len(others) and all(refined(a) == refined(b) for a, b in zip(rest, others, strict=True))  # type: ignore[arg-type]
    return dim if same else None


def upwards(node: fx.Node, index: Index) -> tuple[fx.Node | None, Index, list[fx.Node]]:
    """Through views and casts: the node that computes, its index, and the nodes passed."""
    passed: list[fx.Node] = []
    while True:
        row = ROWS.get(node.target)
        if node.target in CASTS:
            following = index
        elif row is not None and row.index is not None:
            try:
                following = row.index(None, bind(node, row.reads), index)
            except (Refused, axes.LayoutError):
                return None, index, passed
        else:
            return node, index, passed
        passed.append(node)
        node, index = node.args[0], following  # type: ignore[assignment]


def same_elements(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Through casts and copies, which keep every element in its place."""
    passed: list[fx.Node] = []
    while node.op == "call_function" and node.target in CASTS | COPIES:
        passed.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, tuple(passed)


_FORMS: dict[Any, Callable[[fx.Node], Softmax | None]] = {
    aten.softmax.int: _softmax_call,
    aten._softmax.default: _softmax_call,
    aten.exp.default: _exponential,
    aten.div.Tensor: _divided,
    aten.mul.Tensor: _multiplied,
}
