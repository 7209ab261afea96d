"""Comparisons of distances as comparisons of a key with a number of the row, which cost an element one instruction less.

`m - n < 256` is computed for every query and key; `n >= m - 255` subtracts once a row.
"""

from __future__ import annotations

from flashfuse.ir.affine import not_negative
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_program import ScoreProgram

_LARGEST = 1 << 30  # so that a position and this stay within int32


def separated(keep: ScoreProgram) -> ScoreProgram:
    """A predicate with the same value, in which integers of a query and a key together are compared apart if that is exact."""
    builder = Builder()
    replaced: dict[int, Value] = {}
    for number, statement in enumerate(keep.statements):
        joined = any({"m", "n"} <= set(index_letters(keep, operand)) for operand in statement.operands)
        ordered = statement.op in ("lt", "le", "gt", "ge")
        found = _compared(builder, keep, number) if joined and ordered else None
        if found is not None:
            replaced[number] = found
    return builder.program(builder.include(keep, replaced)[keep.result])


def _compared(builder: Builder, keep: ScoreProgram, number: int) -> Value | None:
    """The comparison as `n <= row` or `n >= row`, or None where it is not one of m, n and a constant."""
    statement = keep.statements[number]
    form = not_negative(keep, statement.op, statement.operands)
    if form is None or form.rest or abs(form.m) != 1 or abs(form.n) != 1 or abs(form.constant) > _LARGEST:
        return None
    builder.source = statement.source
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    slope, constant = -form.m * form.n, -form.constant * form.n  # n (form.n * n >= ...) against slope * m + constant
    row = m + constant if slope == 1 else constant - m
    return n >= row if form.n == 1 else n <= row
