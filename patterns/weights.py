"""What happens to the probabilities between the softmax and the product with the value, lifted into a weight.

Dropout, masks and factors: each node on the way must keep every probability in its place and be proportional to it.
Random numbers are drawn anew: a seed takes the place of dropout's own, so nobody else may see which elements it dropped.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from flashfuse.ir import philox
from flashfuse.ir.scales import folded
from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.ir.weight import is_proportional
from flashfuse.patterns.axes import Index, free, refined
from flashfuse.patterns.captured import Captured
from flashfuse.patterns.frame import Frame
from flashfuse.patterns.score_cone import Lifter
from flashfuse.patterns.user_code import describe
from flashfuse.patterns.ways import reads_only_metadata
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
