"""Parts of scores and probabilities that a graph takes by position: `w[:, :, 0]`, `w.chunk(2, dim=1)`, `w[:, ::2]`.

A part whose length divides the dimension is a choice of one position of an axis: the dimension is split in two axes, of which
one is fixed. Softmax and products treat the parts of other axes than theirs apart, so that the part is an attention of its own,
of the same part of query and key.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Index, LayoutError, Size
from flashfuse.patterns.calls import bind, normal_dim, shape, value_of
from flashfuse.patterns.spellings import ROWS

aten = torch.ops.aten


def is_selection(node: fx.Node) -> bool:
    """Whether a node takes a part of a tensor by position, or is the call whose results are such parts."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and node.args[0].target in _SEVERAL
    return node.target in _ONE or node.target in _SEVERAL


def operand_index(node: fx.Node, index: Index) -> Index:
    """The index of the tensor that a selection or a view is of. Raises LayoutError where that cannot be said.

    The call that gives several parts has the index of its operand.
    """
    if node.target in _SEVERAL:
        return index
    if node.target is operator.getitem:
        call, place = node.args
        assert isinstance(call, fx.Node)
        return _SEVERAL[call.target](call, int(place), index)  # type: ignore[arg-type]
    if node.target in _ONE:
        return _ONE[node.target](node, index)
    row = ROWS[node.target]
    assert row.index is not None
    return row.index(None, bind(node, row.reads), index)


# ------------------------------------------------------------------------------------------------ one part


def _select(node: fx.Node, index: Index) -> Index:
    call = bind(node, ROWS[node.target].reads)
    sizes = shape(call["self"])
    place = normal_dim(call["dim"], len(sizes))
    return (*index[:place], _fixed(sizes[place], value_of(call["index"])), *index[place:])


def _slice(node: fx.Node, index: Index) -> Index:
    call = bind(node, ROWS[node.target].reads)
    place = normal_dim(call["dim"], len(index))
    whole, part = shape(call["self"])[place], shape(node)[place]
    start, step = value_of(call["start"]) or 0, value_of(call["step"])
    return _taken(index, place, whole, part, start, step)


def _taken(index: Index, place: int, whole: Size, part: Size, start: Size, step: Size = 1) -> Index:
    if step == 1 and axes.same_size(whole, part):
        return index
    whole, part, start, step = map(_number, (whole, part, start, step))
    if None in (whole, part, start, step) or whole <= 0 or part <= 0:
        raise LayoutError("a part whose length or place is not known")
    start = max(start + whole, 0) if start < 0 else start
    dim = index[place]
    if not isinstance(dim, tuple):
        raise LayoutError("a part of computed positions")
    if step != 1:
        if start >= step or part * step != whole:
            raise LayoutError(f"every {step}. of {whole} positions from {start} on is no axis")
        return (*index[:place], (*dim, *_fixed(step, start)), *index[place + 1 :])
    if whole % part or start % part:
        raise LayoutError(f"{part} of {whole} positions from {start} on are no part of equals")
    return (*index[:place], (*_fixed(whole // part, start // part), *dim), *index[place + 1 :])


def _fixed(size: Size, at: Size) -> tuple[axes.Axis, ...]:
    if axes.is_one(size):
        return ()
    number, position = _number(size), _number(at)
    if position is None or (position < 0 and number is None):
        raise LayoutError("a position that is not known")
    return axes.fixed(size, position if position >= 0 else position + number)  # type: ignore[operator]


def _number(size: Size) -> int | None:
    """A size as a number; None if it is not known before the call."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


_ONE: dict[object, Callable[[fx.Node, Index], Index]] = {aten.select.int: _select, aten.slice.Tensor: _slice}


# ------------------------------------------------------------------------------------------------ several parts


def _unbound(call: fx.Node, place: int, index: Index) -> Index:
    arguments = bind(call, ("self", "dim"))
    sizes = shape(arguments["self"])
    dim = normal_dim(arguments["dim"], len(sizes))
    return (*index[:dim], _fixed(sizes[dim], place), *index[dim:])


def _split(call: fx.Node, place: int, index: Index) -> Index:
    dim = bind(call, ("self", "split_size", "split_sizes", "chunks", "dim"))["dim"]
    tensor = call.args[0]
    dim = normal_dim(dim, len(index))
    parts = [each.shape[dim] for each in value_of(call)]
    return _taken(index, dim, shape(tensor)[dim], parts[place], sum(parts[:place]))


_SEVERAL: dict[object, Callable[[fx.Node, int, Index], Index]] = {
    aten.unbind.int: _unbound,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.split.sizes: _split,
    aten.chunk.default: _split,
}
