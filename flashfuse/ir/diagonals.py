"""Values that depend on queries and keys through the distance n - m alone, as relative positions do.

Such a value has one element for each diagonal of a matrix of scores, M + N - 1 in all. A tensor of them has the elements
of distance -(M - 1) to N - 1 in its last dimension, and is read at `n - m + (M - 1)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import Statement


def diagonal_position(builder: Builder) -> Value:
    """Where a tensor of diagonals holds the element of (m, n)."""
    return (builder.leaf("index", "n") - builder.leaf("index", "m")) + (builder.leaf("length", "M") - 1)


def is_diagonal_position(statements: Sequence[Statement], number: int) -> bool:
    """Whether a statement is `diagonal_position`."""

    def parts(number: int, op: str) -> tuple[Statement, ...]:
        statement = statements[number]
        return tuple(statements[operand] for operand in statement.operands) if statement.op == op else ()

    if not parts(number, "add"):
        return False
    distance, last = statements[number].operands
    wanted = ([("index", "n"), ("index", "m")], [("length", "M"), ("const", 1)])
    return all(
        [(part.op, part.attribute) for part in parts(operand, "sub")] == expected
        for operand, expected in zip((distance, last), wanted, strict=True)
    )


def is_diagonal(statements: Sequence[Statement], number: int) -> bool:
    """Whether a value is the same at (m + 1, n + 1) as at (m, n), whatever the data, and no constant of both."""
    drifts: list[int | None] = [None] * (number + 1)  # what a step along the diagonal adds to each value; None: not known
    moves = [False] * (number + 1)
    for place, statement in enumerate(statements[: number + 1]):
        drifts[place] = _drift(statement, [drifts[operand] for operand in statement.operands], statements)
        own = statement.op == "index" and statement.attribute in ("m", "n")
        moves[place] = own or any(moves[operand] for operand in statement.operands)
    return drifts[number] == 0 and moves[number]


def _drift(statement: Statement, drifts: list[int | None], statements: Sequence[Statement]) -> int | None:
    if statement.op == "index":
        return 1 if statement.attribute in ("m", "n") else 0
    if statement.op in ("score", "probability", "grad", "input"):
        return None
    if all(drift == 0 for drift in drifts):
        return 0
    if statement.kind is not Kind.INT or None in drifts:
        return None
    if statement.op == "add":
        return drifts[0] + drifts[1]  # type: ignore[operator]
    if statement.op == "sub":
        return drifts[0] - drifts[1]  # type: ignore[operator]
    if statement.op == "neg":
        return -drifts[0]  # type: ignore[operator]
    if statement.op == "mul":
        factors = [statements[operand] for operand in statement.operands]
        for one, other in ((0, 1), (1, 0)):
            if factors[one].op == "const":
                return int(factors[one].attribute) * drifts[other]  # type: ignore[arg-type, operator]
    return None


def diagonal_sums(tile: Tensor) -> Tensor:
    """`[..., R, C]` to `[..., R + C - 1]`: the sum of the elements of each distance n - m, from -(R - 1) on."""
    rows, columns = tile.shape[-2:]
    width = rows + columns
    # rows in reverse, each followed by R zeros and cut into pieces of one less: every row starts one column further on
    skewed = pad(tile.flip(-2), (0, rows)).flatten(-2)[..., : rows * (width - 1)]
    return skewed.unflatten(-1, (rows, width - 1)).sum(-2)
