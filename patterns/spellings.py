"""What each ATen operation means to the matcher: one row a target.

A row either maps the index of its result to the index of its input (`index`: the operation only moves elements), or
lifts one element of its result into the score program (`lift`). Products of two tensors are in `contraction.py`.
A row names every argument that it reads; any other argument must have its default, or the node is refused.

A new spelling is one new row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.patterns import axes
from flashfuse.patterns.axes import Index
from flashfuse.patterns.calls import Call, bind, normal_dim, shape, static_sizes, value_of
from flashfuse.patterns.functions import FUNCTIONS, Function
from flashfuse.refusal import Refused

if TYPE_CHECKING:
    from flashfuse.patterns.score_cone import Lifter

aten = torch.ops.aten
IndexMap = Callable[["Lifter | None", Call, Index], Index]
Lift = Callable[["Lifter", Call, Index], Value]


@dataclass(frozen=True)
class Row:
    """One target's meaning. Exactly one of `index` and `lift` is given.

    `makes_mask`: a predicate or a choice by one; worth lifting even where its result is a mere vector. `weighs`: may be
    applied to probabilities between the softmax and the product with the value.
    """

    target: Any
    reads: tuple[str, ...]
    index: IndexMap | None = None
    lift: Lift | None = None
    makes_mask: bool = False
    weighs: bool = False


# ------------------------------------------------------------------------------------------------ moving elements


def _same(_lifter: Any, call: Call, index: Index) -> Index:
    return index


def _reshape(lifter: Any, call: Call, index: Index) -> Index:
    result, operand = shape(call.node), shape(call["self"])
    if any(isinstance(dim, Value) for dim in index) and lifter is not None:
        index = lifter.computed(index)
    return axes.reshape(index, result, operand)


def _permute(_lifter: Any, call: Call, index: Index) -> Index:
    rank = len(index)
    operand: list[Any] = [()] * rank
    for place, dim in enumerate(call["dims"]):
        operand[normal_dim(dim, rank)] = index[place]
    return tuple(operand)


def _transpose(first: str, second: str) -> IndexMap:
    def swap(_lifter: Any, call: Call, index: Index) -> Index:
        dims = list(index)
        a, b = normal_dim(call[first], len(dims)), normal_dim(call[second], len(dims))
        dims[a], dims[b] = dims[b], dims[a]
        return tuple(dims)

    return swap


def _swap_last(_lifter: Any, call: Call, index: Index) -> Index:
    return (*index[:-2], index[-1], index[-2]) if len(index) >= 2 else index


def _movedim(_lifter: Any, call: Call, index: Index) -> Index:
    rank = len(index)
    source, destination = call["source"], call["destination"]
    source = [source] if isinstance(source, int) else list(source)
    destination = [destination] if isinstance(destination, int) else list(destination)
    moved = dict(zip((normal_dim(d, rank) for d in destination), (normal_dim(s, rank) for s in source), strict=True))
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    operand: list[Any] = [()] * rank
    for place in range(rank):
        operand[moved[place] if place in moved else next(rest)] = index[place]
    return tuple(operand)


def _unsqueeze(_lifter: Any, call: Call, index: Index) -> Index:
    place = normal_dim(call["dim"], len(index))
    return (*index[:place], *index[place + 1 :])


def _squeeze(_lifter: Any, call: Call, index: Index) -> Index:
    sizes = shape(call["self"])
    wanted = call.get("dim")
    dims = range(len(sizes)) if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    dropped = {normal_dim(dim, len(sizes)) for dim in dims}
    left = iter(index)
    return tuple(() if place in dropped and axes.is_one(size) else next(left) for place, size in enumerate(sizes))


def _expand(_lifter: Any, call: Call, index: Index) -> Index:
    return axes.broadcast(index, shape(call["self"]))


def _slice(lifter: Any, call: Call, index: Index) -> Index:
    place = normal_dim(call["dim"], len(index))
    before, after = shape(call["self"])[place], shape(call.node)[place]
    start, step = value_of(call["start"]) or 0, value_of(call["step"])
    if step == 1 and axes.same_size(before, after):
        return index
    if isinstance(start, int) and start < 0:
        start = start + before
    if lifter is None:
        raise axes.LayoutError("a slice is no layout of its input")
    position = lifter.position(index[place]) * lifter.size(step) if step != 1 else lifter.position(index[place])
    return (*index[:place], position + lifter.size(start), *index[place + 1 :])


def _select(lifter: Any, call: Call, index: Index) -> Index:
    sizes = shape(call["self"])
    place = normal_dim(call["dim"], len(sizes))
    position = value_of(call["index"])
    if axes.is_one(sizes[place]):
        return (*index[:place], (), *index[place:])
    if lifter is None:
        raise axes.LayoutError("a selection is no layout of its input")
    if isinstance(position, int) and position < 0:
        position = position + sizes[place]
    return (*index[:place], lifter.size(position), *index[place:])


def _repeat(_lifter: Any, call: Call, index: Index) -> Index:
    """`repeat`: the copies are the major part of each dimension, and leading new dimensions are all copies."""
    sizes = shape(call["self"])
    repeats = static_sizes(call["repeats"] if "repeats" in call.arguments else call["dims"])
    repeats = [1] * (len(sizes) - len(repeats)) + list(repeats)  # `tile` may name the last dimensions alone
    new = len(repeats) - len(sizes)
    operand = []
    for dim, size, count in zip(index[new:], sizes, repeats[new:], strict=True):
        operand.append(dim if count == 1 else axes.reshape((dim,), (size * count,), (count, size))[1])
    return tuple(operand)


def _repeat_interleave(_lifter: Any, call: Call, index: Index) -> Index:
    """`repeat_interleave(n, dim)`: the copies are the minor part of the dimension."""
    if call["dim"] is None:
        raise axes.LayoutError("repeat_interleave without a dim flattens")
    sizes = shape(call["self"])
    place, count = normal_dim(call["dim"], len(sizes)), value_of(call["repeats"])
    major = axes.reshape((index[place],), (sizes[place] * count,), (sizes[place], count))[0]
    return (*index[:place], major, *index[place + 1 :])


# ------------------------------------------------------------------------------------------------ computing elements


def _pointwise(name: str, *operands: str) -> Lift:
    """The row `name` of score_ops on these arguments, in the kind of the result's dtype."""

    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        kind = lifter.kind(call.node)
        values = [lifter.as_kind(lifter.operand(call[operand], index), kind) for operand in operands]
        return lifter.builder.op(name, *values)

    return lift


def _compare(name: str) -> Lift:
    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        a, b = lifter.operand(call["self"], index), lifter.operand(call["other"], index)
        kinds = {a.kind, b.kind}
        common = Kind.FLOAT if Kind.FLOAT in kinds else Kind.INT if len(kinds) > 1 else a.kind
        return lifter.builder.op(name, lifter.as_kind(a, common), lifter.as_kind(b, common))

    return lift


def _logic(name: str, *operands: str) -> Lift:
    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        return lifter.builder.op(name, *(lifter.as_bool(lifter.operand(call[operand], index)) for operand in operands))

    return lift


def _bitwise(name: str, *operands: str) -> Lift:
    logic = _logic(name, *operands)

    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        if lifter.kind(call.node) is not Kind.BOOL:
            raise Refused("FF401", call.node, "bitwise arithmetic on integers")
        return logic(lifter, call, index)

    return lift


def _sum(sign: int) -> Lift:
    """add and sub with `alpha`."""
    name = "add" if sign > 0 else "sub"

    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        kind = lifter.kind(call.node)
        a, b = (lifter.as_kind(lifter.operand(call[operand], index), kind) for operand in ("self", "other"))
        alpha = value_of(call["alpha"])
        if alpha != 1:
            b = b * lifter.as_kind(lifter.operand(alpha, index), kind)
        return lifter.builder.op(name, a, b)

    return lift


def _rsub(lifter: Lifter, call: Call, index: Index) -> Value:
    kind = lifter.kind(call.node)
    a, b = (lifter.as_kind(lifter.operand(call[operand], index), kind) for operand in ("self", "other"))
    if value_of(call["alpha"]) != 1:
        a = a * lifter.as_kind(lifter.operand(value_of(call["alpha"]), index), kind)
    return b - a


def _divide_mode(lifter: Lifter, call: Call, index: Index) -> Value:
    mode, kind = call["rounding_mode"], lifter.kind(call.node)
    if mode is None:
        return _pointwise("div", "self", "other")(lifter, call, index)
    if mode != "floor" or kind is not Kind.INT:
        raise Refused("FF402", call.node, f"division with rounding_mode={mode!r}")
    return _pointwise("floordiv", "self", "other")(lifter, call, index)


def _remainder(lifter: Lifter, call: Call, index: Index) -> Value:
    if lifter.kind(call.node) is not Kind.INT:
        raise Refused("FF401", call.node, "remainder of floats")
    return _pointwise("mod", "self", "other")(lifter, call, index)


def _clamp(lifter: Lifter, call: Call, index: Index) -> Value:
    kind = lifter.kind(call.node)
    value = lifter.as_kind(lifter.operand(call["self"], index), kind)
    for name, bound in (("clamp_min", call.get("min")), ("clamp_max", call.get("max"))):
        if bound is not None:
            limit = lifter.as_kind(lifter.operand(bound, index), kind)
            row = name if kind is Kind.FLOAT else {"clamp_min": "maximum", "clamp_max": "minimum"}[name]
            value = lifter.builder.op(row, value, limit)
    return value


def _reciprocal(lifter: Lifter, call: Call, index: Index) -> Value:
    return lifter.builder.op("div", 1.0, lifter.as_kind(lifter.operand(call["self"], index), Kind.FLOAT))


def _where(lifter: Lifter, call: Call, index: Index) -> Value:
    kind = lifter.kind(call.node)
    condition = lifter.as_bool(lifter.operand(call["condition"], index))
    a, b = (lifter.as_kind(lifter.operand(call[operand], index), kind) for operand in ("self", "other"))
    return lifter.builder.op("where", condition, a, b)


def _masked_fill(lifter: Lifter, call: Call, index: Index) -> Value:
    kind = lifter.kind(call.node)
    mask = lifter.as_bool(lifter.operand(call["mask"], index))
    fill = lifter.as_kind(lifter.operand(call["value"], index), kind)
    fill = lifter.cast(fill, value_of(call.node).dtype)
    return lifter.builder.op("where", mask, fill, lifter.as_kind(lifter.operand(call["self"], index), kind))


def _function(function: Function) -> Lift:
    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        return function(lifter.as_kind(lifter.operand(call["self"], index), Kind.FLOAT), call)

    return lift


def _addcmul(lifter: Lifter, call: Call, index: Index) -> Value:
    kind = lifter.kind(call.node)
    a, b, c = (lifter.as_kind(lifter.operand(call[name], index), kind) for name in ("self", "tensor1", "tensor2"))
    factor = lifter.as_kind(lifter.operand(call["value"], index), kind)
    return a + (b * c if factor.constant == 1 else b * c * factor)


def _lerp(lifter: Lifter, call: Call, index: Index) -> Value:
    start, end, weight = (lifter.as_kind(lifter.operand(call[n], index), Kind.FLOAT) for n in ("self", "end", "weight"))
    return start + weight * (end - start)


def _cast(lifter: Lifter, call: Call, index: Index) -> Value:
    value = lifter.operand(call["self"], index)
    return lifter.cast(lifter.as_kind(value, lifter.kind(call.node)), value_of(call.node).dtype)


def _dropout(lifter: Lifter, call: Call, index: Index) -> Value:
    value = lifter.operand(call["input"], index)
    return lifter.dropped(call.node, value, call["p"], index) if call["train"] else value


def _copied(lifter: Lifter, call: Call, index: Index) -> Value:
    """What is written over a whole tensor, in that tensor's dtype and shape."""
    value = lifter.operand(call["src"], index)
    return lifter.cast(lifter.as_kind(value, lifter.kind(call.node)), value_of(call.node).dtype)


def _scattered(lifter: Lifter, call: Call, index: Index) -> Value:
    if not overwrites_whole(call.node):
        raise Refused("FF401", call.node, "a part is written over")
    return _copied(lifter, call, index)


def overwrites_whole(node: fx.Node) -> bool:
    """Whether nothing is left of a node's first argument but its shape and dtype: what is written over it covers it."""
    if node.target is aten.copy.default:
        return True
    if node.target is not aten.slice_scatter.default:
        return False
    call = bind(node, ROWS[node.target].reads)
    place = normal_dim(call["dim"], len(shape(node)))
    return axes.same_size(shape(call["self"])[place], shape(call["src"])[place]) and value_of(call["step"]) == 1


# ------------------------------------------------------------------------------------------------ making elements


def _arange(lifter: Lifter, call: Call, index: Index) -> Value:
    if lifter.kind(call.node) is Kind.BOOL:
        raise Refused("FF402", call.node, "arange of bools")
    start, step = value_of(call.get("start", 0)) or 0, value_of(call.get("step", 1))
    step = 1 if step is None else step
    if not all(isinstance(bound, (int, torch.SymInt)) for bound in (start, step)):
        raise Refused("FF402", call.node, "arange over floats")
    position = lifter.position(index[0])
    scaled = position if step == 1 else position * lifter.size(step)
    return lifter.as_kind(scaled + lifter.size(start), lifter.kind(call.node))


def _filled(value: Any, name: str = "fill_value") -> Lift:
    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        fill = call[name] if value is None else value
        kind = lifter.kind(call.node)
        return lifter.cast(lifter.as_kind(lifter.operand(fill, index), kind), value_of(call.node).dtype)

    return lift


def _scalar_tensor(lifter: Lifter, call: Call, index: Index) -> Value:
    return lifter.as_kind(lifter.operand(call["s"], index), lifter.kind(call.node))


def _triangle(lower: bool) -> Lift:
    def lift(lifter: Lifter, call: Call, index: Index) -> Value:
        row, column = lifter.position(index[-2]), lifter.position(index[-1])
        diagonal = lifter.size(value_of(call["diagonal"]))
        inside = column - row <= diagonal if lower else column - row >= diagonal
        kind = lifter.kind(call.node)
        zero = lifter.builder.const(0, kind)
        return lifter.builder.op("where", inside, lifter.as_kind(lifter.operand(call["self"], index), kind), zero)

    return lift


def _diff(lifter: Lifter, call: Call, index: Index) -> Value:
    """First differences along a dim; with `prepend` of one element the result has the input's length."""
    source, prepend = call["self"], call["prepend"]
    place = normal_dim(call["dim"], len(index))
    if call["n"] != 1 or lifter.kind(source) is not Kind.INT or (prepend is not None and shape(prepend)[place] != 1):
        raise Refused("FF402", call.node, "differences of this form")
    position = lifter.position(index[place])

    def at(tensor: Any, where: Any) -> Value:
        return lifter.lift(tensor, (*index[:place], where, *index[place + 1 :]))

    if prepend is None:
        return at(source, position + 1) - at(source, position)
    first = at(source, lifter.builder.const(0)) - at(prepend, ())
    return lifter.builder.op("where", position <= 0, first, at(source, position) - at(source, position - 1))


def _cumsum(lifter: Lifter, call: Call, index: Index) -> Value:
    """The running sum of a constant; that of data has to be captured."""
    place = normal_dim(call["dim"], len(index))
    summand = lifter.lift(call["self"], index)
    if summand.constant is None or lifter.kind(call.node) is not Kind.INT:
        raise Refused("FF401", call.node, "a running sum of data")
    return (lifter.position(index[place]) + 1) * int(summand.constant)


def _index_tensor(lifter: Lifter, call: Call, index: Index) -> Value:
    """`x[i, j, ...]` with index tensors for the leading dimensions only."""
    indices = list(call["indices"])
    source = call["self"]
    if any(each is None for each in indices) or any(lifter.kind(each) is not Kind.INT for each in indices):
        raise Refused("FF402", call.node, "advanced indexing with gaps or by a mask")
    rest = len(shape(source)) - len(indices)
    own = index[: len(index) - rest]
    positions: list[Any] = []
    for each, size in zip(indices, shape(source), strict=False):
        value = lifter.operand(each, own)
        if not lifter.never_negative(value):
            value = lifter.builder.op("where", value < 0, value + lifter.size(size), value)
        positions.append(() if axes.is_one(size) else value)
    return lifter.lift(source, (*positions, *index[len(index) - rest :]))


def _embedding(lifter: Lifter, call: Call, index: Index) -> Value:
    """A row of a table, by an index that is never negative."""
    position: Any = lifter.operand(call["indices"], index[:-1])
    return lifter.lift(call["weight"], (() if axes.is_one(shape(call["weight"])[0]) else position, index[-1]))


_SELF = ("self",)
_PAIR = ("self", "other")
_VIEWS = (
    *(Row(t, (*_SELF, "size"), index=_reshape) for t in (aten.view.default, aten._unsafe_view.default)),
    Row(aten.reshape.default, (*_SELF, "shape"), index=_reshape),
    Row(aten.view_as.default, _PAIR, index=_reshape),
    Row(aten.reshape_as.default, _PAIR, index=_reshape),
    Row(aten.flatten.using_ints, (*_SELF, "start_dim", "end_dim"), index=_reshape),
    Row(aten.unflatten.int, (*_SELF, "dim", "sizes"), index=_reshape),
    Row(aten.permute.default, (*_SELF, "dims"), index=_permute),
    Row(aten.transpose.int, (*_SELF, "dim0", "dim1"), index=_transpose("dim0", "dim1")),
    Row(aten.swapaxes.default, (*_SELF, "axis0", "axis1"), index=_transpose("axis0", "axis1")),
    Row(aten.swapdims.default, (*_SELF, "dim0", "dim1"), index=_transpose("dim0", "dim1")),
    *(Row(t, _SELF, index=_swap_last) for t in (aten.t.default, aten.mT.default, aten.adjoint.default)),
    Row(aten.movedim.int, (*_SELF, "source", "destination"), index=_movedim),
    Row(aten.movedim.intlist, (*_SELF, "source", "destination"), index=_movedim),
    Row(aten.unsqueeze.default, (*_SELF, "dim"), index=_unsqueeze),
    Row(aten.squeeze.default, _SELF, index=_squeeze),
    Row(aten.squeeze.dim, (*_SELF, "dim"), index=_squeeze),
    Row(aten.squeeze.dims, (*_SELF, "dim"), index=_squeeze),
    Row(aten.expand.default, (*_SELF, "size", "implicit"), index=_expand),
    Row(aten.expand_as.default, _PAIR, index=_expand),
    Row(aten.broadcast_to.default, (*_SELF, "size"), index=_expand),
    Row(aten.slice.Tensor, (*_SELF, "dim", "start", "end", "step"), index=_slice),
    Row(aten.select.int, (*_SELF, "dim", "index"), index=_select),
    Row(aten.repeat.default, (*_SELF, "repeats"), index=_repeat),
    Row(aten.tile.default, (*_SELF, "dims"), index=_repeat),
    Row(aten.repeat_interleave.self_int, (*_SELF, "repeats", "dim", "output_size"), index=_repeat_interleave),
    *(
        Row(t, _SELF, index=_same)
        for t in (
            aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
            aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.detach_.default,
        )
    ),
)  # fmt: skip

_COMPUTED = (
    Row(aten.add.Tensor, (*_PAIR, "alpha"), lift=_sum(1)),
    Row(aten.add.Scalar, (*_PAIR, "alpha"), lift=_sum(1)),
    Row(aten.sub.Tensor, (*_PAIR, "alpha"), lift=_sum(-1)),
    Row(aten.sub.Scalar, (*_PAIR, "alpha"), lift=_sum(-1)),
    Row(aten.rsub.Tensor, (*_PAIR, "alpha"), lift=_rsub),
    Row(aten.rsub.Scalar, (*_PAIR, "alpha"), lift=_rsub),
    *(Row(t, _PAIR, lift=_pointwise("mul", *_PAIR), weighs=True) for t in (aten.mul.Tensor, aten.mul.Scalar)),
    *(Row(t, _PAIR, lift=_pointwise("div", *_PAIR), weighs=True) for t in (aten.div.Tensor, aten.div.Scalar)),
    Row(aten.div.Tensor_mode, (*_PAIR, "rounding_mode"), lift=_divide_mode),
    Row(aten.div.Scalar_mode, (*_PAIR, "rounding_mode"), lift=_divide_mode),
    Row(aten.floor_divide.default, _PAIR, lift=_pointwise("floordiv", *_PAIR)),
    Row(aten.floor_divide.Scalar, _PAIR, lift=_pointwise("floordiv", *_PAIR)),
    Row(aten.remainder.Scalar, _PAIR, lift=_remainder),
    Row(aten.remainder.Tensor, _PAIR, lift=_remainder),
    Row(aten.neg.default, _SELF, lift=_pointwise("neg", "self")),
    Row(aten.abs.default, _SELF, lift=_pointwise("abs", "self")),
    Row(aten.exp.default, _SELF, lift=_pointwise("exp", "self")),
    Row(aten.log.default, _SELF, lift=_pointwise("log", "self")),
    Row(aten.sqrt.default, _SELF, lift=_pointwise("sqrt", "self")),
    Row(aten.rsqrt.default, _SELF, lift=_pointwise("rsqrt", "self")),
    Row(aten.tanh.default, _SELF, lift=_pointwise("tanh", "self")),
    Row(aten.sigmoid.default, _SELF, lift=_pointwise("sigmoid", "self")),
    Row(aten.reciprocal.default, _SELF, lift=_reciprocal),
    *(Row(t, _PAIR, lift=_pointwise("minimum", *_PAIR)) for t in (aten.minimum.default, aten.min.other)),
    *(Row(t, _PAIR, lift=_pointwise("maximum", *_PAIR)) for t in (aten.maximum.default, aten.max.other)),
    *(Row(t, (*_SELF, "min", "max"), lift=_clamp) for t in (aten.clamp.default, aten.clamp.Tensor)),
    *(Row(t, (*_SELF, "min"), lift=_clamp) for t in (aten.clamp_min.default, aten.clamp_min.Tensor)),
    *(Row(t, (*_SELF, "max"), lift=_clamp) for t in (aten.clamp_max.default, aten.clamp_max.Tensor)),
    *(
        Row(getattr(getattr(aten, name), overload), _PAIR, lift=_compare(name), makes_mask=True)
        for name in ("lt", "le", "gt", "ge", "eq", "ne")
        for overload in ("Tensor", "Scalar")
    ),
    *(
        Row(getattr(aten, f"logical_{name}").default, _PAIR, lift=_logic(name, *_PAIR), makes_mask=True)
        for name in ("and", "or", "xor")
    ),
    Row(aten.logical_not.default, _SELF, lift=_logic("not", "self"), makes_mask=True),
    *(
        Row(getattr(getattr(aten, f"bitwise_{name}"), overload), _PAIR, lift=_bitwise(name, *_PAIR), makes_mask=True)
        for name in ("and", "or", "xor")
        for overload in ("Tensor", "Scalar")
    ),
    *(
        Row(getattr(aten, name).Tensor, _PAIR, lift=_bitwise(meaning, *_PAIR), makes_mask=True)
        for name, meaning in (("__and__", "and"), ("__or__", "or"), ("__xor__", "xor"))
    ),
    Row(aten.bitwise_not.default, _SELF, lift=_bitwise("not", "self"), makes_mask=True),
    *(
        Row(t, ("condition", *_PAIR), lift=_where, makes_mask=True, weighs=True)
        for t in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
    ),
    *(
        Row(t, (*_SELF, "mask", "value"), lift=_masked_fill, makes_mask=True, weighs=True)
        for t in (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    ),
    *(Row(target, (*_SELF, *reads), lift=_function(function)) for target, reads, function in FUNCTIONS),
    Row(aten.addcmul.default, (*_SELF, "tensor1", "tensor2", "value"), lift=_addcmul),
    *(Row(t, (*_SELF, "end", "weight"), lift=_lerp) for t in (aten.lerp.Scalar, aten.lerp.Tensor)),
    Row(aten.to.dtype, (*_SELF, "dtype"), lift=_cast),
    Row(aten.to.dtype_layout, (*_SELF, "dtype"), lift=_cast),
    Row(aten.to.device, (*_SELF, "dtype"), lift=_cast),
    Row(aten.to.other, _PAIR, lift=_cast),
    Row(aten._to_copy.default, (*_SELF, "dtype"), lift=_cast),
    Row(aten.type_as.default, _PAIR, lift=_cast),
    Row(aten.copy.default, (*_SELF, "src"), lift=_copied),
    Row(aten.slice_scatter.default, (*_SELF, "src", "dim", "start", "end", "step"), lift=_scattered),
    Row(aten.dropout.default, ("input", "p", "train"), lift=_dropout, weighs=True),
)  # fmt: skip

_MADE = (
    Row(aten.arange.default, ("end", "dtype"), lift=_arange),
    Row(aten.arange.start, ("start", "end", "dtype"), lift=_arange),
    Row(aten.arange.start_step, ("start", "end", "step", "dtype"), lift=_arange),
    Row(aten.full.default, ("size", "fill_value", "dtype"), lift=_filled(None)),
    Row(aten.new_full.default, (*_SELF, "size", "fill_value", "dtype"), lift=_filled(None)),
    Row(aten.full_like.default, (*_SELF, "fill_value", "dtype"), lift=_filled(None)),
    *(Row(t, ("size", "dtype"), lift=_filled(v)) for t, v in ((aten.zeros.default, 0), (aten.ones.default, 1))),
    *(Row(t, (*_SELF, "size", "dtype"), lift=_filled(v)) for t, v in ((aten.new_zeros.default, 0), (aten.new_ones.default, 1))),
    *(Row(t, (*_SELF, "dtype"), lift=_filled(v)) for t, v in ((aten.zeros_like.default, 0), (aten.ones_like.default, 1))),
    *(Row(t, (*_SELF, "value"), lift=_filled(None, "value")) for t in (aten.fill.Scalar, aten.fill.Tensor)),
    Row(aten.scalar_tensor.default, ("s", "dtype"), lift=_scalar_tensor),
    Row(aten.tril.default, (*_SELF, "diagonal"), lift=_triangle(lower=True), makes_mask=True, weighs=True),
    Row(aten.triu.default, (*_SELF, "diagonal"), lift=_triangle(lower=False), makes_mask=True, weighs=True),
    Row(aten.index.Tensor, (*_SELF, "indices"), lift=_index_tensor),
    Row(aten.embedding.default, ("weight", "indices"), lift=_embedding),
    Row(aten.diff.default, (*_SELF, "n", "dim", "prepend"), lift=_diff),
    Row(aten.cumsum.default, (*_SELF, "dim", "dtype"), lift=_cumsum),
)

ROWS: dict[Any, Row] = {row.target: row for row in (*_VIEWS, *_COMPUTED, *_MADE)}

# Rows that change a dtype and nothing else.
CASTS = frozenset(row.target for row in _COMPUTED if row.lift is _cast)

# Rows whose result depends on nothing but positions and numbers.
CREATIONS = frozenset(row.target for row in _MADE if row.reads[0] != "self" or "size" in row.reads or "_like" in str(row.target))
