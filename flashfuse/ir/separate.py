"""Comparisons of a query's and a key's positions in the form that costs an element least.

One end: `m - n >= 3` is computed for every query and key; `n <= m - 3` subtracts once a row. Two ends, a window: both are
written of one difference, `m - n >= 0` and `m - n <= 255`, of which a compiler makes one unsigned comparison.
"""

from __future__ import annotations

from flashfuse.ir.affine import Affine, not_negative
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_program import ScoreProgram

_LARGEST = 1 << 30  # so that a position and this stay within int32


def separated(keep: ScoreProgram) -> ScoreProgram:
    """A predicate with the same value, its comparisons of m, n and a constant in the cheaper form."""
    forms = {number: form for number in range(len(keep.statements)) if (form := _form(keep, number)) is not None}
    ends = {form.m for form in forms.values() if form.m == -form.n}  # 1: the difference is bounded from below, -1: from above
    builder = Builder()
    replaced: dict[int, Value] = {}
    for number, form in forms.items():
        builder.source = keep.statements[number].source
        window = form.m == -form.n and len(ends) == 2
        replaced[number] = (_of_the_difference if window else _of_the_key)(builder, form)
    return builder.program(builder.include(keep, replaced)[keep.result])


def _form(keep: ScoreProgram, number: int) -> Affine | None:
    """What is at least 0 where a comparison holds, if it is one of m, n (each once) and a constant."""
    statement = keep.statements[number]
    if statement.op not in ("lt", "le", "gt", "ge"):
        return None
    form = not_negative(keep, statement.op, statement.operands)
    if form is None or form.rest or abs(form.m) != 1 or abs(form.n) != 1 or abs(form.constant) > _LARGEST:
        return None
    return form


def _of_the_difference(builder: Builder, form: Affine) -> Value:
    """`m - n` against a constant."""
    difference = builder.leaf("index", "m") - builder.leaf("index", "n")
    return difference >= -form.constant if form.m == 1 else difference <= form.constant


def _of_the_key(builder: Builder, form: Affine) -> Value:
    """`n` against a number of the row."""
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    slope, constant = -form.m * form.n, -form.constant * form.n  # of n itself, which is compared with slope * m + constant
    row = m + constant if slope == 1 else constant - m
    return n >= row if form.n == 1 else n <= row
