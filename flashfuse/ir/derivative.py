"""Reverse-mode derivative of a score program, by the rows of `score_ops`.

The result is itself a score program: given the raw score and the gradient of the final score (leaf `grad`) it computes
the gradient of the raw score and of every float element that the program loads. Of a weight, which is a program of a
probability, it computes the gradient of the probability in the raw score's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flashfuse.errors import InternalError
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import ScoreProgram


@dataclass(frozen=True)
class Derivative:
    """`program.results[0]` is the gradient of the raw score (of a weight: of the probability).

    `program.results[1 + i]` is that of load `loads[i]`: a capture's number and the index letters that its element depends on,
    in the order of INDICES. An element's gradient has to be summed over the letters that are missing.
    """

    program: ScoreProgram
    loads: tuple[tuple[int, str], ...]


def index_letters(program: ScoreProgram, number: int) -> str:
    """The index letters (of "bhmn") that statement `number` depends on."""
    return "".join(letter for letter in "bhmn" if letter in _letters(program)[number])


@lru_cache(maxsize=1024)
def _letters(program: ScoreProgram) -> tuple[frozenset[str], ...]:
    found: list[frozenset[str]] = []
    for statement in program.statements:
        letters = frozenset().union(*(found[operand] for operand in statement.operands))
        if statement.op == "index":
            letters |= {str(statement.attribute)}
        if statement.op in ("score", "probability", "grad"):
            letters |= set("bhmn")
        found.append(letters)
    return tuple(found)


@lru_cache(maxsize=1024)
def differentiate(program: ScoreProgram, captures: tuple[int, ...] = ()) -> Derivative:
    """The derivative with respect to the raw score (or probability) and to every float load of the given captures.

    Raises InternalError if an operation on the way has no derivative.
    """
    builder = Builder()
    values = builder.include(program)
    gradients: dict[int, Value] = {values[program.result].number: builder.leaf("grad")}
    for value in reversed(values):
        gradient = gradients.get(value.number)
        if gradient is None or value.kind is not Kind.FLOAT or not value.operands or value.statement.op == "load":
            continue
        row = SCORE_OPS[value.statement.op]
        if row.grad is None:
            raise InternalError(f"{row.name} has no derivative")
        parts = row.grad(gradient, value, *value.operands)
        for operand, part in zip(value.operands, parts, strict=True):
            if part is None or operand.kind is not Kind.FLOAT:
                continue
            known = gradients.get(operand.number)
            gradients[operand.number] = part if known is None else known + part
    zero = builder.const(0.0)
    scores = [value for value in values if value.statement.op in ("score", "probability")]
    results = [gradients.get(scores[0].number, zero) if scores else zero]
    loads: list[tuple[int, str]] = []
    for number, statement in enumerate(program.statements):
        if statement.op == "load" and statement.kind is Kind.FLOAT and statement.attribute in captures:
            loads.append((int(statement.attribute), index_letters(program, number)))  # type: ignore[arg-type]
            results.append(gradients.get(values[number].number, zero))
    return Derivative(builder.program(*results), tuple(loads))
