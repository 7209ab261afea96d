"""Interval evaluation of a predicate over a block: certainly kept, possibly kept.

The second, weaker tool beside `ranges.py`, for predicates over captured vectors (document numbers, padding): interval
arithmetic by the rows' `interval` rules, from the smallest and largest value of each vector in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import ScoreProgram, Statement


@dataclass(frozen=True)
class Bounded:
    """What input number i of a certainty program stands for: the low or high bound of `statement` in a block.

    `statement` is `index m`, `index n` or a load by exactly one of m and n.
    """

    statement: Statement
    letter: str
    high: bool


@dataclass(frozen=True)
class Certainty:
    """`program` has results (certainly kept, possibly kept) for a block of queries and keys."""

    program: ScoreProgram
    inputs: tuple[Bounded, ...]

    @property
    def tells_something(self) -> bool:
        """Whether any block can be found empty or full."""
        return any(self.program.statements[result].op != "const" for result in self.program.results)


@lru_cache(maxsize=1024)
def block_certainty(keep: ScoreProgram) -> Certainty:
    """Interval evaluation of a predicate over one block; sound, never sharper than it can prove."""
    builder = Builder()
    exact = builder.include(keep)
    inputs: list[Bounded] = []
    unknown = (builder.const(False), builder.const(True))
    intervals: list[tuple[Value, Value] | None] = []
    for number, statement in enumerate(keep.statements):
        letters = set(index_letters(keep, number)) & {"m", "n"}
        if not letters:
            intervals.append((exact[number], exact[number]))
            continue
        found: tuple[Value, Value] | None = None
        # a vector of floats may hold NaN, which has no place between a smallest and a largest value
        ordered = statement.kind is not Kind.FLOAT and statement.op in ("index", "load")
        if ordered and len(letters) == 1:
            found = _bounded_leaf(builder, inputs, statement, letters.pop())
        elif statement.op in SCORE_OPS:
            row = SCORE_OPS[statement.op]
            operands = [intervals[operand] for operand in statement.operands]
            if row.interval is not None and all(operand is not None for operand in operands):
                found = row.interval(*operands)
        intervals.append(unknown if found is None and statement.kind is Kind.BOOL else found)
    certain, possible = intervals[keep.result] or unknown
    return Certainty(builder.program(certain, possible), tuple(inputs))


def _bounded_leaf(builder: Builder, inputs: list[Bounded], statement: Statement, letter: str) -> tuple[Value, Value]:
    low = builder.leaf("input", len(inputs), statement.kind)
    inputs.append(Bounded(statement, letter, high=False))
    high = builder.leaf("input", len(inputs), statement.kind)
    inputs.append(Bounded(statement, letter, high=True))
    return low, high
