"""`torch.logsumexp(scores, dim)` beside an attention of the same scores: the row statistic that its kernel keeps anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.patterns.axes import free, refined
from flashfuse.patterns.calls import bind, is_tensor, normal_dim, shape, value_of
from flashfuse.patterns.empty_rows import may_be_nan
from flashfuse.patterns.frame import Frame
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.operands import View
from flashfuse.patterns.roles import Roles
from flashfuse.patterns.softmax import COPIES, same_elements
from flashfuse.patterns.spellings import CASTS

aten = torch.ops.aten


@dataclass(frozen=True)
class Statistic:
    """The node that is the logsumexp of the scores over the keys, and the view from `[B, H, M]` to its own layout."""

    node: fx.Node
    view: View


def find_statistic(frame: Frame, roles: Roles, spec: AttentionSpec, flow: GradientFlow) -> Statistic | None:
    """The logsumexp that the graph takes of an attention's scores, if its kernel has just that; None otherwise.

    A sink would be in the kernel's sum, a term that cancels in the softmax would be missing, and of a row that may have no
    finite score the kernel's statistic is no logarithm.
    """
    softmax = frame.softmax
    if softmax is None or softmax.exponential or softmax.late is not None or frame.sink is not None or frame.shifts:
        return None
    if spec.sink is not None or spec.empty_rows is EmptyRows.ZERO:
        return None
    if spec.empty_rows is EmptyRows.EXACT and may_be_nan(spec):
        return None
    node = _logsumexp(same_elements(softmax.scores)[0], softmax.dim)
    if node is None or flow.stops_at(node):
        return None
    view = _view(frame, roles, node, softmax.dim)
    return None if view is None else Statistic(node, view)


def _logsumexp(scores: fx.Node, dim: int) -> fx.Node | None:
    """A logsumexp over one dim of a tensor, perhaps cast or copied before."""
    stack = [scores]
    while stack:
        tensor = stack.pop()
        for user in tensor.users:
            if user.target is aten.logsumexp.default and user.args[0] is tensor:
                dims = bind(user, ("self", "dim", "keepdim"))["dim"]
                if [normal_dim(each, len(shape(tensor))) for each in dims] == [dim]:
                    return user
            moved = user.target in CASTS | COPIES and user.args[0] is tensor and is_tensor(user)
            if moved and value_of(user).dtype.is_floating_point:
                stack.append(user)
    return None


def _view(frame: Frame, roles: Roles, node: fx.Node, dim: int) -> View | None:
    canonical = (*refined(roles.batch), *refined(roles.heads), *refined(roles.queries))
    rows = [axis for place, own in enumerate(frame.score_index) if place != dim for axis in refined(own)]  # type: ignore[arg-type]
    if set(rows) != set(canonical) or len(free(rows)) != len(rows):
        return None
    return View(
        split=tuple(axis.size for axis in canonical),
        order=tuple(canonical.index(axis) for axis in rows),
        insert=(),
        expand=tuple(-1 for _ in rows),
        merge=shape(node),
    )
