"""What the rows of a softmax give that have no key, or whose scores all lie far from zero: `EmptyRows` of a spec.

The kernels take a row's logarithm of the sum apart from its largest score (`PLANES == 2`) only where a row can lie far from
zero: beside a score of 10,000 float32 does not hold the logarithm of a few keys.
"""

from __future__ import annotations

import math

from flashfuse.ir.affine import rows_never_empty
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.mask import LOW_SCORE
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.ir.weight import vanishes, zero_choices
from flashfuse.patterns.frame import Frame
from flashfuse.patterns.sinks import is_ordinary
from flashfuse.refusal import Refused

_BOUNDED = frozenset({"tanh", "sigmoid", "erf", "sin", "cos"})
_STEEP = frozenset({"exp", "log", "rsqrt"})


def empty_rows(spec: AttentionSpec, frame: Frame, *, square: bool) -> EmptyRows:
    """What empty rows of a spec give; `square`: it has as many queries as keys. Refuses (FF401, FF402) what is not certain."""
    kept = spec.split.kept
    ordinary = is_ordinary(spec)
    never_empty = ordinary or spec.split.keep is None or rows_never_empty(spec.split.keep, square=square)
    if never_empty and not _reach_far(kept):
        return EmptyRows.IMPOSSIBLE
    if ordinary:
        return EmptyRows.EXACT
    assert frame.softmax is not None
    if frame.softmax.subtracted and (_reach_far(kept) or spec.split.fill > float("-inf")):
        raise Refused("FF402", frame.softmax.anchor, "exp(x - logsumexp(x)) does not sum to one where x is far from zero")
    return _without_nan(spec, frame) if frame.zeroes_nan else _with_choices(spec, frame)


def _without_nan(spec: AttentionSpec, frame: Frame) -> EmptyRows:
    """What empty rows give whose NaN is turned into zero. Refuses (FF402) where data may make a row of -inf."""
    kept = spec.split.kept
    if any(capture.kind is Kind.FLOAT for capture in spec.captures):
        raise Refused("FF402", frame.output, "rows of NaN become zero, and a bias handed in may be -inf for a whole row")
    constants = (s.attribute for s in kept.statements if s.op == "const" and s.kind is Kind.FLOAT)
    finite = all(math.isfinite(float(each)) for each in constants)  # type: ignore[arg-type]
    if not finite or _degrees(kept)[kept.result] > 1:
        raise Refused("FF402", frame.output, "rows of NaN become zero, and scores are computed that may be infinite")
    if spec.split.keep is None or spec.split.fill > float("-inf"):
        return EmptyRows.EXACT  # there are none
    if _reach_far(kept):
        raise Refused("FF402", frame.output, "rows of NaN become zero, and scores may lie far from zero")
    return EmptyRows.ZERO


def _with_choices(spec: AttentionSpec, frame: Frame) -> EmptyRows:
    """What empty rows give if probabilities are replaced by zero and not multiplied by it, which differs for NaN.

    A row of NaN all of whose keys are replaced is zero. Where the choices replace just the keys that the mask gave a finite
    score there is no such row: with a replaced key it has a finite score, without one no choice changes it. Where neither is
    certain the rows that the mask empties are computed whole (`AttentionSpec.has_choices`); without a mask it is refused (FF401).
    """
    choices = () if spec.weight is None else zero_choices(spec.weight)
    if not choices or not may_be_nan(spec):
        return EmptyRows.EXACT
    builder = Builder()
    keep = None if spec.split.keep is None else builder.include(spec.split.keep)[spec.split.keep.result]
    values = builder.include(spec.weight)  # type: ignore[arg-type]
    kept = {c: values[c] if wanted else builder.op("not", values[c]) for c, wanted in choices}
    dropped = {c: not wanted for c, wanted in choices if keep is not None and kept[c].number == keep.number}
    if len(dropped) == len(choices) and _fills_what_it_drops(builder, spec, keep):
        return EmptyRows.EXACT
    if not _reach_far(spec.split.kept) and vanishes(spec.weight, dropped):  # type: ignore[arg-type]
        return EmptyRows.ZERO
    if keep is not None:
        return EmptyRows.EXACT
    found = "rows without keys are NaN, and it is not certain that a choice after the softmax makes the whole row zero"
    raise Refused("FF401", frame.path[-1], found)


def _fills_what_it_drops(builder: Builder, spec: AttentionSpec, keep: Value | None) -> bool:
    """Whether the last thing that happens to a score is that every element outside `keep` gets one finite number."""
    result = builder.include(spec.score)[spec.score.result]
    if keep is None or result.statement.op != "where":
        return False
    condition, first, second = result.operands
    kept, fill = (condition, second) if second.constant is not None else (builder.op("not", condition), first)
    return kept.number == keep.number and fill.constant is not None and math.isfinite(fill.constant)


def may_be_nan(spec: AttentionSpec) -> bool:
    """Whether all scores of a row can be -inf, or one of them infinite."""
    never, kept = float("-inf"), spec.split.kept
    if spec.split.keep is not None and spec.split.fill == never:
        return True
    loads = any(s.op == "load" and s.kind is Kind.FLOAT for s in kept.statements)
    return loads or any(s.op == "const" and s.attribute == never for s in kept.statements) or _degrees(kept)[kept.result] > 1


def _reach_far(kept: ScoreProgram) -> bool:
    """Whether kept scores can lie far from zero though raw ones do not: a constant, a tensor handed in, a steep function."""
    floats = [s for s in kept.statements if s.kind is Kind.FLOAT]
    far = any(s.op == "const" and not abs(float(s.attribute)) < -LOW_SCORE for s in floats)  # type: ignore[arg-type]
    return far or any(s.op == "load" for s in floats) or _degrees(kept)[kept.result] > 1


def _degrees(program: ScoreProgram) -> list[int]:
    """For each statement the power of the raw score with which it grows, 2 where it may be more or is not bounded anywhere."""
    degrees: list[int] = []
    for statement in program.statements:
        operands = [degrees[operand] for operand in statement.operands]
        degree = max(operands, default=int(statement.op == "score"))
        if statement.op in _BOUNDED or statement.kind is Kind.BOOL:
            degree = 0
        elif statement.op == "mul":
            degree = sum(operands)
        elif degree and (statement.op in _STEEP or (statement.op == "div" and operands[1])):
            degree = 2
        degrees.append(degree)
    return degrees
