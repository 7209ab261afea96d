"""Sinks: a logit in each row's sum that has no value.

Two spellings: a column joined to the scores and cut off again after the softmax (gpt-oss), and a number in the sum of
exponentials (`exp(x) / (1 + exp(x).sum())`, "softmax plus one").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.mask import LOW_SCORE
from flashfuse.ir.scales import folded
from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Index, refined
from flashfuse.patterns.calls import bind, normal_dim, shape, value_of
from flashfuse.patterns.exponential import exponent
from flashfuse.patterns.row_shifts import takes_off_maximum
from flashfuse.patterns.score_cone import Lifter
from flashfuse.patterns.softmax import Softmax, same_elements
from flashfuse.patterns.spellings import ROWS
from flashfuse.patterns.user_code import describe
from flashfuse.refusal import Refused

aten = torch.ops.aten
_NOTHING = 2.0**-25


@dataclass(frozen=True)
class Cut:
    """A slice of the probabilities that leaves out keys: from `start` on, as many as the product with the value sums over."""

    node: fx.Node
    start: int


@dataclass(frozen=True)
class Sink:
    """`scores` without the sink's column, the column with its index (None: the number `constant`), and the joining nodes."""

    scores: fx.Node
    column: fx.Node | None = None
    index: Index = ()
    constant: float = 0.0
    nodes: tuple[fx.Node, ...] = ()


def cut_of(node: fx.Node, index: Index, keys: tuple[Axis, ...]) -> Cut | None:
    """The cut that a node on the way of the probabilities is, if it slices the keys; None if it does something else."""
    if node.target is not aten.slice.Tensor:
        return None
    call = bind(node, ROWS[node.target].reads)
    dim = normal_dim(call["dim"], len(index))
    start, step = value_of(call["start"]) or 0, value_of(call["step"])
    whole = axes.same_size(shape(call["self"])[dim], shape(node)[dim])
    if whole or step != 1 or refined(index[dim]) != refined(keys) or not isinstance(start, int):  # type: ignore[arg-type]
        return None
    return Cut(node, start)


def beside_sink(softmax: Softmax, shifts: dict[fx.Node, fx.Node]) -> tuple[Softmax, dict[fx.Node, fx.Node]]:
    """Of the terms that cancel in a softmax those that also do beside a number in its sum: the shift that the number has too.

    Beside exponentials of which the largest is 1, a number below float32's resolution is nothing. Refuses (FF401) another
    shift, which does not cancel.
    """
    if softmax.added is None:
        return softmax, shifts
    shifted = exponent(softmax.scores)
    if softmax.shifted and shifted in shifts:
        return softmax, {shifted: shifts[shifted]}
    if softmax.shifted or shifts:
        by_maximum = set(shifts) == {shifted} and softmax.scores.target is aten.exp.default and takes_off_maximum(shifted)
        if softmax.shifted or softmax.added > _NOTHING or not by_maximum:
            raise Refused("FF401", softmax.anchor, "a number in the sum of exponentials of scores less something else")
        return replace(softmax, added=None), shifts
    return softmax, shifts


def find_sink(softmax: Softmax, cut: Cut | None, shifts: dict[fx.Node, fx.Node], index: Index) -> Sink | None:
    """The sink of a softmax whose input has this index. Refuses (FF401) a cut that cuts off anything else."""
    if cut is None:
        return None if softmax.added is None else Sink(softmax.scores, constant=math.log(softmax.added))
    node, passed = softmax.scores, []
    while node.target not in (aten.cat.default, aten.pad.default):
        inner = shifts.get(node) or (same_elements(node)[0] if same_elements(node)[1] else None)
        if inner is None or softmax.exponential or softmax.added is not None:
            raise Refused("FF401", cut.node, "keys are cut off after the softmax that are no column joined to the scores")
        passed.append(node)
        node = inner
    if node.target is aten.pad.default:
        return _padded(node, softmax, cut, tuple(passed))
    call = bind(node, ("tensors", "dim"))
    parts, dim = list(call["tensors"]), normal_dim(call["dim"], len(index))
    if len(parts) != 2 or dim != softmax.dim or cut.start not in (0, 1):
        raise Refused("FF401", node, "what is cut off after the softmax is not the one column joined to the scores")
    scores, column = parts if cut.start == 0 else reversed(parts)
    keys = axes.product([axis.size for axis in refined(index[dim])])  # type: ignore[arg-type]
    if not axes.is_one(shape(column)[dim]) or not axes.same_size(shape(scores)[dim], keys):
        raise Refused("FF401", node, "what is cut off after the softmax is not the one column joined to the scores")
    own = axes.broadcast((*index[:dim], (), *index[dim + 1 :]), shape(column))
    return Sink(scores, column, own, nodes=(*passed, node))


def _padded(node: fx.Node, softmax: Softmax, cut: Cut, passed: tuple[fx.Node, ...]) -> Sink:
    """A column of one number that `F.pad` put before or behind the scores."""
    call = bind(node, ("self", "pad", "mode", "value"))
    value = call["value"] or 0.0
    wanted = [0, 1] if cut.start == 0 else [1, 0]
    last = softmax.dim == len(shape(node)) - 1
    if list(call["pad"]) != wanted or call["mode"] != "constant" or not last or not isinstance(value, (int, float)):
        raise Refused("FF401", cut.node, "what is cut off after the softmax is not the one column joined to the scores")
    return Sink(call["self"], constant=float(value), nodes=(*passed, node))


def lift_sink(lifter: Lifter, sink: Sink | None) -> Value | None:
    """The sink of a row as a value. Refuses (FF401) one that depends on the scores."""
    if sink is None:
        return None
    if sink.column is None:
        return lifter.builder.const(sink.constant)
    value = lifter.as_kind(lifter.operand(sink.column, sink.index), Kind.FLOAT)
    program = lifter.builder.program(value)
    if program.uses("score") or "n" in index_letters(program, program.result):
        raise Refused("FF401", sink.column, f"{describe(sink.column)} makes a sink that depends on the scores or the key")
    return value


def sink_program(value: Value | None) -> ScoreProgram | None:
    """The sink of a spec."""
    return None if value is None else folded(value.builder.program(value))


def is_ordinary(spec: AttentionSpec) -> bool:
    """Whether the sink alone keeps every row from being empty or far below zero."""
    if spec.sink is None:
        return False
    statement = spec.sink.statements[spec.sink.result]
    return statement.op == "const" and abs(float(statement.attribute)) < -LOW_SCORE  # type: ignore[arg-type]
