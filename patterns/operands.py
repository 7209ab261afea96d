"""Query, key and value: following an operand of a product up to the tensor that a kernel should read.

Peeling goes up through views, copies of views (`repeat_kv`'s expand and reshape), scales by a number and casts to a wider
dtype. Each step is a `Stage`; the deepest stage from which strided views lead to the canonical layout is taken, so that
nothing is copied that the user's code would not have copied anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Index, LayoutError, Size, refined
from flashfuse.patterns.calls import bind, is_tensor, kind_of, shape, sizes_key, value_of
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.spellings import CASTS, ROWS
from flashfuse.refusal import Refused

aten = torch.ops.aten
_SCALES = {aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div"}


@dataclass(frozen=True)
class Stage:
    """A node that holds the operand, the axes of its dimensions, and the scales passed on the way: ("mul", number)."""

    node: fx.Node
    index: Index
    scales: tuple[tuple[str, Any], ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return value_of(self.node).dtype

    def axes(self) -> tuple[Axis, ...]:
        """All axes in the order of the node's dimensions."""
        return tuple(axis for dim in self.index for axis in refined(dim))  # type: ignore[arg-type]


def peel(node: fx.Node, index: Index, flow: GradientFlow, *, linear: bool) -> list[Stage]:
    """The stages from the product's operand upwards. Scales and casts are passed only if `linear`.

    Passing a widening cast is exact: the product of the narrow values is what the wide product computes. Nothing is passed
    that stops a gradient.
    """
    stages = [Stage(node, index)]
    while True:
        following = None if flow.stops_at(stages[-1].node) else _next(stages[-1], linear)
        if following is None:
            return stages
        stages.append(following)


def _next(stage: Stage, linear: bool) -> Stage | None:
    node = stage.node
    if node.op != "call_function":
        return None
    row = ROWS.get(node.target)
    try:
        if row is not None and row.index is not None:
            call = bind(node, row.reads)
            return Stage(call["self"], row.index(None, call, stage.index), stage.scales)
        if linear and node.target in _SCALES:
            return _pass_scale(stage, bind(node, ("self", "other")))
        if linear and node.target in CASTS and row is not None:
            inner = bind(node, row.reads)["self"]
            narrow, wide = value_of(inner).dtype, value_of(node).dtype
            exact = narrow == wide or (narrow in (torch.float16, torch.bfloat16) and wide is torch.float32)
            return Stage(inner, stage.index, stage.scales) if exact else None
    except (LayoutError, Refused):
        return None
    return None


def _pass_scale(stage: Stage, call: Any) -> Stage | None:
    name = _SCALES[stage.node.target]
    tensor, factor = call["self"], call["other"]
    if not is_tensor(tensor) or (name == "mul" and is_tensor(factor) and not shape(tensor) and shape(factor)):
        tensor, factor = factor, tensor
    if name == "div" and tensor is not call["self"]:
        return None
    scalar = isinstance(value_of(factor), (int, float)) or (is_tensor(factor) and not shape(factor))
    same_rank = is_tensor(tensor) and len(shape(tensor)) == len(stage.index)
    if not scalar or not same_rank or value_of(tensor).dtype != value_of(stage.node).dtype:
        return None
    return Stage(tensor, stage.index, (*stage.scales, (name, factor)))


# ------------------------------------------------------------------------------------------------ views


@dataclass(frozen=True)
class View:
    """How a tensor becomes its canonical form by views alone.

    `split` (view to one dimension an axis), `fixed` ((dimension, position): selections, the last dimension first), `order`
    (permutation of the rest), `expand` (sizes, -1 to keep; new axes have been inserted with size 1 by `insert`), `merge` (the
    canonical sizes, reached by a view).
    """

    split: tuple[Size, ...]
    order: tuple[int, ...]
    insert: tuple[int, ...]
    expand: tuple[Size, ...]
    merge: tuple[Size, ...]
    fixed: tuple[tuple[int, int], ...] = ()

    @property
    def kept(self) -> tuple[Size, ...]:
        """The sizes of `split` without those of the dimensions that are fixed."""
        gone = {place for place, _at in self.fixed}
        return tuple(size for place, size in enumerate(self.split) if place not in gone)

    def apply(self, tensor: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
        """The canonical form. Raises RuntimeError if it is no view, unless a copy is allowed."""
        result = tensor.view(self.split)
        for place, at in self.fixed:
            result = result.select(place, at)
        result = result.permute(self.order)
        for place in self.insert:
            result = result.unsqueeze(place)
        result = result.expand(self.expand)
        return result.reshape(self.merge) if copy else result.view(self.merge)


def canonical_view(index: Index, groups: Sequence[Sequence[Axis]]) -> View:
    """The view from a tensor with this index to one dimension a group; axes that it lacks are expanded (stride 0), fixed ones
    selected.

    Raises LayoutError if the tensor has an axis that no group has, or one twice.
    """
    whole = [axis for dim in index for axis in refined(dim)]  # type: ignore[arg-type]
    own = [axis for axis in whole if axis.at is None]
    wanted = [axis for group in groups for axis in refined(group)]
    if len(set(own)) != len(own):
        raise LayoutError("an axis occurs twice (a diagonal)")
    if not set(own) <= set(wanted):
        raise LayoutError(f"axes {[a for a in own if a not in wanted]} have no place in the canonical layout")
    present = [axis for axis in wanted if axis in own]
    return View(
        split=tuple(axis.size for axis in whole),
        order=tuple(own.index(axis) for axis in present),
        insert=tuple(place for place, axis in enumerate(wanted) if axis not in own),
        expand=tuple(-1 if axis in own else axis.size for axis in wanted),
        merge=tuple(axes.product([axis.size for axis in refined(group)]) for group in groups),
        fixed=tuple((place, axis.at) for place, axis in reversed(list(enumerate(whole))) if axis.at is not None),
    )


def is_viewable(stage: Stage, view: View) -> bool:
    """Whether the view needs no copy, tried on the stage's fake tensor, once for all layers that are alike."""
    fake = value_of(stage.node)
    known = _viewable.setdefault(fake.fake_mode, {})
    key = (kind_of(fake), view.order, view.insert, view.fixed, *map(sizes_key, (view.split, view.expand, view.merge)))
    if key not in known:
        known[key] = _applies(view, fake)
    return known[key]


_viewable: WeakKeyDictionary[FakeTensorMode, dict[Any, bool]] = WeakKeyDictionary()


def _applies(view: View, fake: FakeTensor) -> bool:
    try:
        with fake.fake_mode:
            view.apply(fake)
    except (RuntimeError, ValueError):
        return False
    return True
