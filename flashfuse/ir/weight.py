"""Weights: what the probabilities are multiplied by between the softmax and the product with the value.

A weight is a program from one probability to the weighted probability: dropout, a 0/1 mask, a factor a head. It must be
proportional to the probability, since kernels apply it before they divide by the row's sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from flashfuse.ir.score_program import ScoreProgram, Statement


def is_proportional(program: ScoreProgram) -> bool:
    """Whether the result is the leaf `probability` times something that does not depend on it."""
    return _degrees(program)[program.result] == 1


@lru_cache(maxsize=1024)
def _degrees(program: ScoreProgram) -> tuple[int | None, ...]:
    """Of each statement: 0 if it does not read the probability, 1 if it is proportional to it, None if neither."""
    found: list[int | None] = []
    for statement in program.statements:
        degrees = [found[operand] for operand in statement.operands]
        zero = [_is_zero(program.statements[operand]) for operand in statement.operands]
        if statement.op == "probability":
            found.append(1)
        elif not any(degree != 0 for degree in degrees):
            found.append(0)
        elif statement.op == "where" and degrees[0] == 0:
            fits = all(degree == 1 or none for degree, none in zip(degrees[1:], zero[1:], strict=True))
            found.append(1 if fits else None)
        elif statement.op in ("add", "sub", "neg"):
            found.append(1 if all(degree == 1 for degree in degrees) else None)
        elif statement.op == "mul":
            found.append(1 if sorted(degrees, key=str) == [0, 1] else None)
        else:
            found.append(1 if statement.op == "div" and degrees == [1, 0] else None)
    return tuple(found)


def _is_zero(statement: Statement) -> bool:
    return statement.op == "const" and statement.attribute == 0  # the attribute of a load is its capture's number


def zero_choices(program: ScoreProgram) -> tuple[tuple[int, bool], ...]:
    """Choices that put zero in a probability's place: (condition, the value of it that keeps the probability).

    They differ from a product with zero where the probability is NaN.
    """
    degrees = _degrees(program)
    found: list[tuple[int, bool]] = []
    for statement in program.statements:
        if statement.op != "where":
            continue
        condition, first, second = statement.operands
        if degrees[first] == 1 and degrees[second] == 0:
            found.append((condition, True))
        if degrees[second] == 1 and degrees[first] == 0:
            found.append((condition, False))
    return tuple(found)


def vanishes(program: ScoreProgram, known: Mapping[int, bool]) -> bool:
    """Whether the result is zero, even of a probability that is NaN, if the `known` statements have those values."""
    found: list[bool] = []
    for statement in program.statements:
        zero = [found[operand] for operand in statement.operands]
        if statement.op == "const":
            found.append(_is_zero(statement))
        elif statement.op == "where":
            chosen = known.get(statement.operands[0])
            found.append(all(zero[1:]) if chosen is None else zero[1] if chosen else zero[2])
        elif statement.op == "mul":
            found.append(any(zero))
        elif statement.op == "div":
            found.append(zero[0])
        else:
            found.append(statement.op in ("add", "sub", "neg") and all(zero))
    return found[program.result]
