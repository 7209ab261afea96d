"""Terms of the scores that cancel in a softmax: statistics of their own rows."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Index, refined
from flashfuse.patterns.calls import is_tensor, shape
from flashfuse.patterns.exponential import exponential_nodes
from flashfuse.patterns.selections import operand_index
from flashfuse.patterns.softmax import LOG_SUMS, Softmax, same_elements, upwards
from flashfuse.patterns.spellings import CASTS, ROWS

aten = torch.ops.aten


def row_shifts(softmax: Softmax, index: Index, keys: tuple[Axis, ...]) -> dict[fx.Node, fx.Node]:
    """Sums of which one term is a statistic of the other that is the same for a whole row: {sum: the term that stays}.

    Softmax does not change when a row's maximum is subtracted. Only a statistic of the very scores is passed over: any
    other tensor may hold numbers so large that eager code rounds the scores away.
    """
    found: dict[fx.Node, fx.Node] = {}
    node, own = softmax.scores, index
    if softmax.exponential:
        node = exponential_nodes(node)[-1].args[0]  # type: ignore[assignment]
    while node.op == "call_function" and node.target in ROWS:
        row = ROWS[node.target]
        following: Any = None
        if row.index is not None:
            following, own = node.args[0], operand_index(node, own)
        elif node.target in CASTS:
            following = node.args[0]
        elif node.target in (aten.sub.Tensor, aten.add.Tensor):
            following = _without_statistic(node, own, keys)
            if following is not None:
                found[node] = following
        elif node.target in _ROW_SCALES:
            following = _without_factor(node, own, keys)
        if following is None:
            break
        node = following
        own = own if len(own) == len(shape(node)) else axes.broadcast(own, shape(node))
    return found


_ROW_SCALES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


def _without_statistic(node: fx.Node, index: Index, keys: tuple[Axis, ...]) -> fx.Node | None:
    tensor, other = node.args[:2]
    if not is_tensor(tensor) or not is_tensor(other) or node.kwargs:
        return None
    if _runs_over(axes.broadcast(index, shape(other)), keys):
        return None
    source, _own, _passed = upwards(other, axes.broadcast(index, shape(other)))
    if source is not None and source.target is operator.getitem and source.args[1] == 0:
        source = source.args[0]  # type: ignore[assignment]
    if source is None or source.target not in _STATISTICS:
        return None
    return tensor if same_elements(source.args[0])[0] is same_elements(tensor)[0] else None  # type: ignore[arg-type, return-value]


def takes_off_maximum(node: fx.Node) -> bool:
    """Whether a sum whose other term cancels (see `row_shifts`) is a tensor less its own rows' maximum."""
    source, _own, _passed = upwards(node.args[1], tuple(axes.fresh("r", size) for size in shape(node.args[1])))  # type: ignore[arg-type]
    if source is not None and source.target is operator.getitem:
        source = source.args[0]  # type: ignore[assignment]
    return node.target is aten.sub.Tensor and source is not None and source.target in _STATISTICS - LOG_SUMS


_STATISTICS = frozenset({aten.amax.default, aten.max.dim, aten.max.default}) | LOG_SUMS


def _without_factor(node: fx.Node, index: Index, keys: tuple[Axis, ...]) -> fx.Node | None:
    tensor, factor = node.args[:2]
    if not is_tensor(tensor):
        return None
    if is_tensor(factor) and _runs_over(axes.broadcast(index, shape(factor)), keys):
        return None
    return tensor  # type: ignore[return-value]


def _runs_over(index: Index, keys: tuple[Axis, ...]) -> bool:
    return any(axis in refined(keys) for dim in index for axis in refined(dim))  # type: ignore[arg-type]
