"""What happens to the probabilities between the softmax and the product with the value, lifted into a weight.

Dropout, masks and factors: each node on the way must keep every probability in its place and be proportional to it.
Random numbers are drawn anew: a seed takes the place of dropout's own, so nobody else may see which elements it dropped.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from flashfuse.ir import philox
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.ir.weight import is_proportional, vanishes, zero_choices
from flashfuse.patterns.axes import Index, free, refined
from flashfuse.patterns.captured import Captured
from flashfuse.patterns.frame import Frame, reads_only_metadata
from flashfuse.patterns.score_cone import Lifter, describe, folded
from flashfuse.refusal import Refused


def lift_weight(lifter: Lifter, frame: Frame) -> Value | None:
    """The weighted probability as a program of the leaf `probability`; None if the probabilities are taken as they are.

    Refuses (FF401) what is not proportional to the probability.
    """
    plain = lifter.builder.leaf("probability")
    value = plain
    lifter.probabilities = frame.probabilities
    lifter.hold(frame.probabilities, frame.score_index, plain)
    lifter.carriers |= set(frame.path)
    for before, node, index in zip((frame.probabilities, *frame.path), frame.path, frame.path_index, strict=False):
        if node in frame.held:
            lifter.hold(node, index, value)
            continue
        if node in frame.passing:
            lifter.shifts = {**lifter.shifts, node: before}
        value = lifter.lift(node, index)
        if lifter.builder.program(value).uses("score"):
            raise Refused("FF401", node, f"{describe(node)} weighs the probabilities by the scores")
        if value.kind is not Kind.FLOAT or not is_proportional(lifter.builder.program(value)):
            raise Refused("FF401", node, f"{describe(node)} makes of the probabilities what is not proportional to them")
    return None if value.number == plain.number else value


def with_dropout(lifter: Lifter, path: tuple[fx.Node, ...], node: fx.Node, value: Value, rate: Any, index: Index) -> Value:
    """`value`, a probability at `index`, after dropout at `node` on their `path`. Refuses FF401, FF402 where that is not so."""
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:  # eager code raises an error, which must stay
        raise Refused("FF402", node, f"dropout with p={rate!r}")
    if rate == 0:
        return value
    if rate == 1:
        return value * 0.0
    own = {axis for dim in index if not isinstance(dim, Value) for axis in free(dim)}
    whole = {axis for group in lifter.positions.groups.values() for axis in refined(group)}
    if node not in path or own != whole:
        raise Refused("FF401", node, "random numbers that are not drawn for each probability")
    captured = Captured(node, seed=True)
    if captured not in lifter.captures:
        lifter.captures.append(captured)
    builder = lifter.builder
    seed = builder.leaf("load", lifter.captures.index(captured), Kind.INT)
    bits = builder.op("random_bits", seed, *(builder.leaf("index", letter) for letter in "bhmn"))
    threshold, factor = philox.dropping(rate)
    return value * builder.op("where", bits < threshold, 0.0, factor)


def weight_program(value: Value | None) -> ScoreProgram | None:
    """The weight of a spec."""
    return None if value is None else folded(value.builder.program(value))


def check_dropout_is_private(lifter: Lifter, frame: Frame) -> None:
    """Refuse (FF407) dropout whose result somebody else sees too: they would see another mask."""
    drawn = {captured.node for captured in lifter.captures if captured.seed}
    inside = {*frame.carriers, *frame.path, frame.output, *(() if frame.softmax is None else frame.softmax.inside)}
    inside |= set() if frame.sink is None else set(frame.sink.nodes)
    pending = list(drawn - {frame.output})
    seen = set(pending)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user not in inside and not reads_only_metadata(user, node):
                raise Refused("FF407", node, f"also used by {describe(user)}")
            if user is not frame.output and user not in seen:
                seen.add(user)
                pending.append(user)


def rows_with_choices(spec: AttentionSpec, frame: Frame) -> EmptyRows:
    """What empty rows give if probabilities are replaced by zero and not multiplied by it, which differs for NaN.

    A row of NaN all of whose keys are replaced is zero. Where the choices replace just the keys that the mask gave a finite
    score there is no such row: with a replaced key it has a finite score, without one no choice changes it. Refuses (FF401)
    where neither is certain.
    """
    choices = () if spec.weight is None else zero_choices(spec.weight)
    if not choices or spec.empty_rows is not EmptyRows.EXACT or not may_be_nan(spec):
        return spec.empty_rows
    builder = Builder()
    keep = None if spec.split.keep is None else builder.include(spec.split.keep)[spec.split.keep.result]
    values = builder.include(spec.weight)  # type: ignore[arg-type]
    kept = {c: values[c] if wanted else builder.op("not", values[c]) for c, wanted in choices}
    dropped = {c: not wanted for c, wanted in choices if keep is not None and kept[c].number == keep.number}
    if len(dropped) == len(choices) and _fills_what_it_drops(builder, spec, keep):
        return spec.empty_rows
    reads_data = any(statement.op == "load" and statement.kind is Kind.FLOAT for statement in spec.split.kept.statements)
    if reads_data or not vanishes(spec.weight, dropped):  # type: ignore[arg-type]
        found = "rows without keys are NaN, and it is not certain that a choice after the softmax makes the whole row zero"
        raise Refused("FF401", frame.path[-1], found)
    return EmptyRows.ZERO


def _fills_what_it_drops(builder: Builder, spec: AttentionSpec, keep: Value | None) -> bool:
    """Whether the last thing that happens to a score is that every element outside `keep` gets one finite number."""
    result = builder.include(spec.score)[spec.score.result]
    if keep is None or result.statement.op != "where":
        return False
    condition, first, second = result.operands
    kept, fill = (condition, second) if second.constant is not None else (builder.op("not", condition), first)
    return kept.number == keep.number and fill.constant is not None and math.isfinite(fill.constant)


def may_be_nan(spec: AttentionSpec) -> bool:
    """Whether all scores of a row can be -inf."""
    never = float("-inf")
    if spec.split.keep is not None and spec.split.fill == never:
        return True
    return any(
        (s.op == "load" and s.kind is Kind.FLOAT) or (s.op == "const" and s.attribute == never)
        for s in spec.split.kept.statements
    )
