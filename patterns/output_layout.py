"""How the op's result lies in memory: as eager's output does, or, where every use copies it first, as the copies do.

A model may rely on the order of its output in memory, by `view`, by `as_strided`, or after it left the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, refined
from flashfuse.patterns.calls import shape, value_of
from flashfuse.patterns.frame import Frame
from flashfuse.patterns.operands import View
from flashfuse.patterns.roles import Roles
from flashfuse.refusal import Refused

aten = torch.ops.aten
Order = tuple[int, ...]  # dimensions, the outermost in memory first

_LAYOUTS = ("bhme", "bmhe", "hbme", "hmbe", "mbhe", "mhbe")  # that the op knows
_COPIES = frozenset({aten.contiguous.default, aten.reshape.default, aten.clone.default, aten.flatten.using_ints})


def out_layout(frame: Frame, roles: Roles, value_dim: tuple[Axis, ...]) -> tuple[str, View, Order | None]:
    """The order in which the op should lay out its result, the view from there to the output's own dimensions, and in which
    order these have to be copied, if no layout of the op lies so."""
    canonical = (*roles.batch, *roles.heads, *roles.queries, *value_dim)
    own = [refined(dim) for dim in frame.out_index]  # type: ignore[arg-type]
    if {axis for dim in own for axis in dim} != set(canonical):
        raise Refused("FF204", frame.output, "the output lacks an axis of the scores")
    view = View(
        split=tuple(axis.size for axis in canonical),
        order=tuple(canonical.index(axis) for dim in own for axis in dim),
        insert=(),
        expand=tuple(-1 for dim in own for _ in dim),
        merge=shape(frame.output),
    )
    letters = {"b": roles.batch, "h": roles.heads, "m": roles.queries, "e": value_dim}
    lying = {tuple(axis for letter in layout for axis in letters[letter]): layout for layout in reversed(_LAYOUTS)}
    eager = order_in_memory(frame.output)
    for order in (_order_of_copies(frame.output), eager):
        layout = None if order is None else lying.get(tuple(axis for dim in order for axis in own[dim]))
        if layout is not None:
            return layout, view, None
    return "bhme", view, eager


def order_in_memory(node: fx.Node) -> Order:
    """The order in which a tensor's dimensions lie in memory; those of size 1 stay where they are."""
    sizes, strides = shape(node), value_of(node).stride()
    order: list[int] = []
    for dim in range(len(sizes)):
        place = len(order)
        while place and not axes.is_one(sizes[dim]) and _less(strides[order[place - 1]], strides[dim]):
            place -= 1
        order.insert(place, dim)
    return tuple(order)


def _less(stride: Any, other: Any) -> bool:
    """Whether a stride is less than another, without a guard: a tensor's dimensions lie in one order whatever its sizes are."""
    if statically_known_true(stride >= other):
        return False
    if statically_known_true(stride < other):
        return True
    seen, other_seen = (each if isinstance(each, int) else each.node.hint for each in (stride, other))
    return seen is not None and other_seen is not None and seen < other_seen


def _order_of_copies(output: fx.Node) -> Order | None:
    """The order in which all uses of an output copy it at once, which then costs nothing, or None."""
    found = _copied_orders(output, tuple(range(len(shape(output)))))
    return found.pop() if found is not None and len(found) == 1 else None


def _copied_orders(node: fx.Node, order: Order) -> set[Order] | None:
    """The orders of the output's dimensions in copies of a node that holds them in `order`; None if it is used in other ways."""
    found: set[Order] = set()
    for user in node.users:
        permuted = _permuted(user, order)
        if permuted is not None:
            inner = _copied_orders(user, permuted)
        else:
            copied = user.target in _COPIES and order_in_memory(user) == tuple(range(len(shape(user))))
            inner = {order} if copied else None
        if inner is None:
            return None
        found |= inner
    return found if node.users else None


def _permuted(user: fx.Node, order: Sequence[int]) -> Order | None:
    """The order after a transposition or permutation, or None if the user is neither."""
    dims = list(range(len(order)))
    if user.target is aten.transpose.int:
        first, second = (int(dim) % len(order) for dim in user.args[1:3])  # type: ignore[arg-type]
        dims[first], dims[second] = dims[second], dims[first]
    elif user.target is aten.permute.default:
        dims = [int(dim) % len(order) for dim in user.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        return None
    return tuple(order[dim] for dim in dims)
