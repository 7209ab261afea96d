"""The same score at less cost an element: its scale taken out, positions turned into floats before they are subtracted.

What kernels compute for every query and key is bound by instructions as much as by matrix products, so each one counts.
A scale that is taken out is multiplied into the exponential's argument, where a multiplication stands anyway.
"""

from __future__ import annotations

import math

from flashfuse.ir.affine import Affine, affine
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import LEAVES, ScoreProgram, Statement

LONGEST = 1 << 23  # lengths up to which floats hold the positions that `positions_in_float` subtracts

_FARTHEST = 1 << 22  # the constants beside them
_SMALLEST, _LARGEST = 1e-20, 1e20  # scales that are taken out
_ORDINARY = (1e-6, 1e6)  # constants whose product cannot leave float32's range where theirs with the score do not


def factored(program: ScoreProgram) -> tuple[float, ScoreProgram]:
    """(c, inner): the program is c times inner, c > 0; 1.0 where nothing is won."""
    merged = _merged(program)
    factors = _Factors(merged)
    scale, value = factors.of(merged.result)
    if scale == 1.0 or not _SMALLEST < scale < _LARGEST:
        return 1.0, merged
    return scale, factors.builder.program(value)


def positions_in_float(program: ScoreProgram) -> ScoreProgram:
    """A program with the same values for lengths up to LONGEST, its distances differences of floats.

    `float(n - m)` is two instructions for every query and key, `float(n) - float(m)` one: the positions of a row and of a
    column are turned once. Integers below 2^24 are floats, so the result is the same.
    """
    builder = Builder()
    replaced: dict[int, Value] = {}
    for number, form in _distances(program).items():
        builder.source = program.statements[number].source
        replaced[number] = _difference(builder, form)
        if _is_size(program, program.statements[number].operands[0]):
            replaced[number] = builder.op("abs", replaced[number])
    if not replaced:
        return program
    values = builder.include(program, replaced)
    return builder.program(*(values[result] for result in program.results))


def subtracts_positions(program: ScoreProgram) -> bool:
    """Whether `positions_in_float` changes a program, so that its lengths are bounded."""
    return bool(_distances(program))


def _is_size(program: ScoreProgram, number: int) -> bool:
    return program.statements[number].op == "abs"


def _distances(program: ScoreProgram) -> dict[int, Affine]:
    """Statements that turn a distance, or its size, into a float, and the distance."""
    found = {}
    for number, statement in enumerate(program.statements):
        if statement.op != "to_float":
            continue
        operand = statement.operands[0]
        if _is_size(program, operand):
            operand = program.statements[operand].operands[0]
        form = affine(program, operand)
        if form is not None and _is_distance(form):
            found[number] = form
    return found


def _is_distance(form: Affine) -> bool:
    opposite = form.m == -form.n and abs(form.m) == 1
    return opposite and form.plain and not form.rest and abs(form.constant) <= _FARTHEST


def _difference(builder: Builder, form: Affine) -> Value:
    """The form as a difference of floats; the constant goes to the index that is added."""
    first, second = ("m", "n") if form.m == 1 else ("n", "m")
    left = builder.leaf("index", first) + form.constant
    return builder.op("to_float", left) - builder.op("to_float", builder.leaf("index", second))


def _merged(program: ScoreProgram) -> ScoreProgram:
    """The program with multiplications by several constants in a row made one."""
    builder = Builder()
    values: list[Value] = []
    for number, statement in enumerate(program.statements):
        builder.source = statement.source
        operand, constant = _constant_factor(program.statements, number)
        if constant is None:
            values.append(_copied(builder, statement, values))
            continue
        inner = values[operand]
        before, of = _constant_value(inner)
        both = all(_ORDINARY[0] <= abs(each) <= _ORDINARY[1] for each in (constant, before))
        if before != 1.0 and both:
            values.append(of * (before * constant))
        else:
            values.append(_copied(builder, statement, values))
    return builder.program(*(values[result] for result in program.results))


def _copied(builder: Builder, statement: Statement, values: list[Value]) -> Value:
    operands = [values[operand] for operand in statement.operands]
    if statement.op in LEAVES:
        return builder.leaf(statement.op, statement.attribute, statement.kind, operands)
    return builder.op(statement.op, *operands)


def _constant_factor(statements: tuple[Statement, ...], number: int) -> tuple[int, float | None]:
    """(x, c) if a float statement is x times c, or x divided by 1 / c; (number, None) otherwise."""
    statement = statements[number]
    if statement.kind is not Kind.FLOAT or statement.op not in ("mul", "div"):
        return number, None
    left, right = statement.operands
    if statement.op == "mul" and statements[left].op == "const":
        left, right = right, left
    if statements[right].op != "const" or statements[left].op == "const":
        return number, None
    constant = float(statements[right].attribute)  # type: ignore[arg-type]
    if statement.op == "div":
        constant = 1.0 / constant if constant else math.inf
    return left, constant


def _constant_value(value: Value) -> tuple[float, Value]:
    """(c, x) if a value under construction is x times c; (1, value) otherwise."""
    left, constant = _constant_factor(tuple(value.builder.statements), value.number)
    return (1.0, value) if constant is None else (constant, Value(value.builder, left))


class _Factors:
    """Divides values of a program by constants."""

    def __init__(self, program: ScoreProgram) -> None:
        self.program = program
        self.builder = Builder()
        self.values = self.builder.include(program)

    def of(self, number: int) -> tuple[float, Value]:
        """(c, value): the statement is c > 0 times value."""
        statement = self.program.statements[number]
        self.builder.source = statement.source
        operand, constant = _constant_factor(self.program.statements, number)
        if constant is not None and constant > 0.0 and math.isfinite(constant):
            scale, value = self.of(operand)
            return scale * constant, value
        if statement.op in ("add", "sub") and statement.kind is Kind.FLOAT:
            for place in (0, 1):
                found = self._shared(number, place)
                if found is not None:
                    return found
        return 1.0, self.values[number]

    def _shared(self, number: int, place: int) -> tuple[float, Value] | None:
        """The factor of one summand, where that is the scaled raw score and the other can be divided at no cost."""
        statement = self.program.statements[number]
        scale, value = self.of(statement.operands[place])
        if scale == 1.0 or value.statement.op != "score":
            return None
        other = self._divided(statement.operands[1 - place], scale)
        if other is None:
            return None
        operands = (value, other) if place == 0 else (other, value)
        self.builder.source = statement.source
        return scale, self.builder.op(statement.op, *operands)

    def _divided(self, number: int, by: float) -> Value | None:
        """A statement divided by a constant, if that costs nothing for every query and key."""
        statement = self.program.statements[number]
        if statement.kind is not Kind.FLOAT:
            return None
        if not {"m", "n"} <= set(index_letters(self.program, number)):
            return self.values[number] * (1.0 / by)
        if statement.op == "mul":
            for place in (0, 1):
                factor = self._divided(statement.operands[place], by)
                if factor is not None:
                    return factor * self.values[statement.operands[1 - place]]
        if statement.op == "neg":
            inner = self._divided(statement.operands[0], by)
            return None if inner is None else -inner
        if statement.op in ("add", "sub"):
            both = [self._divided(operand, by) for operand in statement.operands]
            if both[0] is not None and both[1] is not None:
                return self.builder.op(statement.op, *both)  # type: ignore[arg-type]
        return None
