"""Making score programs: `Value`s with arithmetic, and the `Builder` that shares equal statements and folds constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from flashfuse.errors import InternalError
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import LEAVES, Attribute, Number, ScoreProgram, Statement, problem


class Value:
    """A value of a program under construction. Arithmetic and comparisons append statements."""

    __slots__ = ("builder", "number")

    def __init__(self, builder: Builder, number: int) -> None:
        self.builder = builder
        self.number = number

    @property
    def kind(self) -> Kind:
        return self.builder.statements[self.number].kind

    @property
    def statement(self) -> Statement:
        return self.builder.statements[self.number]

    @property
    def constant(self) -> Number | None:
        """The number if this is a constant, else None."""
        statement = self.statement
        return statement.attribute if statement.op == "const" else None  # type: ignore[return-value]

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(Value(self.builder, number) for number in self.statement.operands)

    def apply(self, name: str, *operands: Value | Number) -> Value:
        return self.builder.op(name, *operands)

    def __add__(self, other: Value | Number) -> Value:
        return self.apply("add", self, other)

    def __radd__(self, other: Number) -> Value:
        return self.apply("add", other, self)

    def __sub__(self, other: Value | Number) -> Value:
        return self.apply("sub", self, other)

    def __rsub__(self, other: Number) -> Value:
        return self.apply("sub", other, self)

    def __mul__(self, other: Value | Number) -> Value:
        return self.apply("mul", self, other)

    def __rmul__(self, other: Number) -> Value:
        return self.apply("mul", other, self)

    def __truediv__(self, other: Value | Number) -> Value:
        return self.apply("div", self, other)

    def __rtruediv__(self, other: Number) -> Value:
        return self.apply("div", other, self)

    def __neg__(self) -> Value:
        return self.apply("neg", self)

    def __lt__(self, other: Value | Number) -> Value:
        return self.apply("lt", self, other)

    def __le__(self, other: Value | Number) -> Value:
        return self.apply("le", self, other)

    def __gt__(self, other: Value | Number) -> Value:
        return self.apply("gt", self, other)

    def __ge__(self, other: Value | Number) -> Value:
        return self.apply("ge", self, other)

    def eq(self, other: Value | Number) -> Value:
        return self.apply("eq", self, other)

    def __and__(self, other: Value | Number) -> Value:
        return self.apply("and", self, other)

    def __or__(self, other: Value | Number) -> Value:
        return self.apply("or", self, other)


def _fold_logic(name: str, operands: tuple[Value, ...]) -> Value | None:
    """Identities that change no rounding: logic, and choices with a known condition or equal branches."""
    if name in ("and", "or"):
        neutral = name == "and"
        for one, other in (operands, operands[::-1]):
            if one.constant is neutral:
                return other
            if one.constant is (not neutral):
                return one
        return operands[0] if operands[0].number == operands[1].number else None
    if name == "not" and operands[0].statement.op == "not":
        return operands[0].operands[0]
    if name in ("where", "where_bool"):
        condition, a, b = operands
        if condition.constant is not None:
            return a if condition.constant else b
        if a.number == b.number:
            return a
    if name == "where_bool":
        return _fold_choice(*operands)
    return None


def _fold_choice(condition: Value, a: Value, b: Value) -> Value | None:
    """A choice between predicates of which one is constant is plain logic."""
    if a.constant is not None:
        return condition | b if a.constant else condition.apply("not", condition) & b
    if b.constant is not None:
        return condition.apply("not", condition) | a if b.constant else condition & a
    return None


def _linear(value: Value) -> dict[int | None, int]:
    """An integer as coefficients of statement numbers; None is the constant part."""
    if value.constant is not None:
        return {None: int(value.constant)}
    name, operands = value.statement.op, value.operands
    if name not in ("add", "sub"):
        return {value.number: 1}
    total = dict(_linear(operands[0]))
    for term, coefficient in _linear(operands[1]).items():
        total[term] = total.get(term, 0) + (coefficient if name == "add" else -coefficient)
    return total


def _difference(a: Value, b: Value) -> int | None:
    """a - b if that is the same number everywhere."""
    terms = _linear(a)
    for term, coefficient in _linear(b).items():
        terms[term] = terms.get(term, 0) - coefficient
    constant = terms.pop(None, 0)
    return constant if not any(terms.values()) else None


class Builder:
    """Makes programs: shares equal statements and folds constants (in float64, so never less exactly than at run time)."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self._known: dict[Statement, int] = {}
        self.source = ""

    def _append(self, statement: Statement) -> Value:
        number = self._known.get(statement)
        if number is None:
            number = len(self.statements)
            self.statements.append(statement)
            self._known[statement] = number
        return Value(self, number)

    def leaf(
        self, op: str, attribute: Attribute = None, kind: Kind | None = None, operands: Sequence[Value] = ()
    ) -> Value:
        kind = kind or LEAVES[op].kind
        if kind is None:
            raise InternalError(f"leaf {op} needs a kind")
        return self._append(Statement(op, tuple(v.number for v in operands), kind, attribute, self.source))

    def const(self, value: Number, kind: Kind | None = None) -> Value:
        if kind is None:
            kind = Kind.BOOL if isinstance(value, bool) else Kind.INT if isinstance(value, int) else Kind.FLOAT
        typed: Number = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}[kind](value)
        return self.leaf("const", typed, kind)

    def op(self, name: str, *operands: Value | Number) -> Value:
        """Apply a row. Python numbers become constants of the kind that the row or the other operands ask for."""
        row = SCORE_OPS[name]
        free = next(
            (v.kind for v, k in zip(operands, row.operands, strict=True) if isinstance(v, Value) and k is None), None
        )
        values = tuple(
            operand if isinstance(operand, Value) else self.const(operand, wanted or free)
            for operand, wanted in zip(operands, row.operands, strict=True)
        )
        if name == "where" and values[1].kind is Kind.BOOL:
            return self.op("where_bool", *values)
        folded = self._fold(name, values)
        if folded is not None:
            return folded
        kind = row.result or next((v.kind for v, k in zip(values, row.operands, strict=True) if k is None), None)
        kind = kind or next(k for k in row.operands if k is not None)
        statement = Statement(name, tuple(v.number for v in values), kind, None, self.source)
        wrong = problem([*self.statements, statement], len(self.statements), statement)
        if wrong:
            raise InternalError(f"{name}: {wrong}")
        return self._append(statement)

    def _fold(self, name: str, values: tuple[Value, ...]) -> Value | None:
        if name in ("to_float", "to_int", "to_bool") and values[0].kind is SCORE_OPS[name].result:
            return values[0]
        same = _fold_logic(name, values)
        if same is not None:
            return same
        constants = [value.constant for value in values]
        if all(constant is not None for constant in constants):
            return self._constant_result(name, constants)
        chosen = self._fold_into_choice(name, values)
        if chosen is not None:
            return chosen
        if name == "sub" and values[0].kind is Kind.INT:
            difference = _difference(*values)
            if difference is not None:
                return self.const(difference)
        if name in ("lt", "ge") and constants[1] == 0 and values[0].statement.op in ("index", "length"):
            return self.const(name == "ge")
        if name in ("add", "sub") and values[1].kind is Kind.INT and constants[1] == 0:
            return values[0]
        if name == "add" and values[0].kind is Kind.INT and constants[0] == 0:
            return values[1]
        if name == "mul" and values[0].kind is Kind.INT and 0 in constants:
            return self.const(0)
        if name == "mul" and values[0].kind is Kind.INT and 1 in constants:
            return values[1] if constants[0] == 1 else values[0]
        return None

    def _fold_into_choice(self, name: str, values: Sequence[Value]) -> Value | None:
        """An operation on a choice between constants is a choice between the results: `1 - (1 if c else 0)`."""
        choices = [value for value in values if value.statement.op == "where"]
        others = [value for value in values if value.statement.op != "where"]
        if len(choices) != 1 or name.startswith("where") or any(value.constant is None for value in others):
            return None
        condition, a, b = choices[0].operands
        if a.constant is None or b.constant is None:
            return None
        first, second = (
            self.op(name, *(branch if value is choices[0] else value for value in values)) for branch in (a, b)
        )
        return self.op("where", condition, first, second)

    def _constant_result(self, name: str, constants: Sequence[Number | None]) -> Value:
        row = SCORE_OPS[name]
        tensors = [
            torch.tensor(constant, dtype=torch.float64 if isinstance(constant, float) else None)
            for constant in constants
        ]
        value = row.torch(*tensors).item()
        kind = row.result or {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT}[type(value)]
        return self.const(value, kind)

    def closure(self, *results: Value) -> list[Statement]:
        """The statements that these results need, themselves included."""
        return [self.statements[number] for number in closure(self.statements, [value.number for value in results])]

    def program(self, *results: Value) -> ScoreProgram:
        """The program of these results, with only the statements that they need."""
        needed = closure(self.statements, [value.number for value in results])
        renumber = {old: new for new, old in enumerate(needed)}
        statements = tuple(
            Statement(s.op, tuple(renumber[o] for o in s.operands), s.kind, s.attribute, s.source)
            for s in (self.statements[old] for old in needed)
        )
        program = ScoreProgram(statements, tuple(renumber[value.number] for value in results))
        program.verify()
        return program

    def include(self, program: ScoreProgram, replace: Mapping[int, Value] | None = None) -> list[Value]:
        """Append another program's statements; `replace` gives values for some of them. Returns all its values."""
        values: list[Value] = []
        for number, statement in enumerate(program.statements):
            self.source = statement.source
            if replace and number in replace:
                values.append(replace[number])
            elif statement.op in LEAVES:
                operands = [values[operand] for operand in statement.operands]
                values.append(self.leaf(statement.op, statement.attribute, statement.kind, operands))
            else:
                values.append(self.op(statement.op, *(values[operand] for operand in statement.operands)))
        self.source = ""
        return values


def closure(statements: Sequence[Statement], results: Iterable[int]) -> list[int]:
    """The statements that results need, in order."""
    needed: set[int] = set()
    stack = list(results)
    while stack:
        number = stack.pop()
        if number not in needed:
            needed.add(number)
            stack.extend(statements[number].operands)
    return sorted(needed)
