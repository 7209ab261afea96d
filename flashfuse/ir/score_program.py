"""The score program: a frozen SSA list of elementwise statements from the raw score to the final score.

Statement `%i` computes one value for each `(b, h, m, n)` from earlier values. Leaves are the raw score, the four
indices, the lengths M and N, constants, integers given at call time (`size`), elements of captured tensors (`load`),
and, in derivative programs, the incoming gradient. It is no sympy expression on purpose: sympy rewrites on construction
and so changes rounding.

`evaluate` is the specification: what a kernel computes is right if and only if it agrees with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from flashfuse.errors import InternalError
from flashfuse.ir.score_ops import SCORE_OPS, Kind

Number = int | float | bool
Attribute = int | float | bool | str | None

INDICES = ("b", "h", "m", "n")
LENGTHS = ("M", "N")


@dataclass(frozen=True)
class Leaf:
    """What a leaf is called, which attribute it carries, and its kind (None: the attribute or the caller decides)."""

    name: str
    attribute: type | None
    kind: Kind | None


LEAVES: dict[str, Leaf] = {
    leaf.name: leaf
    for leaf in (
        Leaf("score", None, Kind.FLOAT),  # q . k, before anything else
        Leaf("grad", None, Kind.FLOAT),  # derivative programs: the gradient of the final score
        Leaf("index", str, Kind.INT),  # attribute: one of INDICES
        Leaf("length", str, Kind.INT),  # attribute: "M" or "N"
        Leaf("const", None, None),
        Leaf("size", int, Kind.INT),  # attribute: position in the call's `sizes`
        Leaf("load", int, None),  # attribute: position in the call's `captures`; operands: one index a dimension
        Leaf("input", int, None),  # interval programs: a bound given from outside
    )
}


@dataclass(frozen=True)
class Statement:
    """One value. `operands` are the numbers of earlier statements; `source` is the user's line, for comments only."""

    op: str
    operands: tuple[int, ...]
    kind: Kind
    attribute: Attribute = None
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class ScoreProgram:
    """Statements in order and the numbers of those that are results. Hashable; equality ignores source lines."""

    statements: tuple[Statement, ...]
    results: tuple[int, ...]

    @property
    def result(self) -> int:
        """The only result. Raises InternalError if there are several."""
        if len(self.results) != 1:
            raise InternalError(f"a program with {len(self.results)} results has no single result")
        return self.results[0]

    def uses(self, op: str) -> bool:
        """Whether any statement is `op`."""
        return any(statement.op == op for statement in self.statements)

    def loads(self) -> tuple[int, ...]:
        """Which captures are read, in ascending order."""
        return tuple(sorted({int(s.attribute) for s in self.statements if s.op == "load"}))  # type: ignore[arg-type]

    def verify(self) -> None:
        """Raise InternalError naming the first statement that is not well formed."""
        for number, statement in enumerate(self.statements):
            problem = _problem(self.statements, number, statement)
            if problem:
                raise InternalError(f"score program statement %{number} = {statement.op}: {problem}")
        for result in self.results:
            if not 0 <= result < len(self.statements):
                raise InternalError(f"score program result %{result} does not exist")

    def pretty(self) -> str:
        """One statement a line, for people: `%3 = mul(%0, %2)  # model.py:41`."""
        lines = [_line(number, statement) for number, statement in enumerate(self.statements)]
        return "\n".join([*lines, "return " + ", ".join(f"%{result}" for result in self.results)])

    def formula(self, result: int | None = None, captures: Sequence[str] = ()) -> str:
        """The result as one formula in people's notation, e.g. `n <= m and m - n < 4096`."""
        return _formula(self, self.result if result is None else result, tuple(captures))


def _problem(statements: Sequence[Statement], number: int, statement: Statement) -> str | None:
    if any(not 0 <= operand < number for operand in statement.operands):
        return "uses a value that does not come before it"
    leaf = LEAVES.get(statement.op)
    if leaf is not None:
        return _leaf_problem(statements, statement, leaf)
    row = SCORE_OPS.get(statement.op)
    if row is None:
        return "no such operation"
    kinds = [statements[operand].kind for operand in statement.operands]
    if len(kinds) != row.arity:
        return f"takes {row.arity} operands, has {len(kinds)}"
    free = {kind for kind, wanted in zip(kinds, row.operands, strict=True) if wanted is None}
    if len(free) > 1:
        return f"mixes kinds {sorted(kind.value for kind in free)}"
    if any(wanted is not None and kind is not wanted for kind, wanted in zip(kinds, row.operands, strict=True)):
        return f"operands have kinds {[kind.value for kind in kinds]}"
    result = row.result or next(iter(free), None) or next(kind for kind in row.operands if kind is not None)
    return None if statement.kind is result else f"result has kind {statement.kind.value}, not {result.value}"


def _leaf_problem(statements: Sequence[Statement], statement: Statement, leaf: Leaf) -> str | None:
    if leaf.kind is not None and statement.kind is not leaf.kind:
        return f"has kind {statement.kind.value}, not {leaf.kind.value}"
    if leaf.attribute is not None and not isinstance(statement.attribute, leaf.attribute):
        return f"attribute {statement.attribute!r} is no {leaf.attribute.__name__}"
    if statement.op == "index" and statement.attribute not in INDICES:
        return f"no index {statement.attribute!r}"
    if statement.op == "length" and statement.attribute not in LENGTHS:
        return f"no length {statement.attribute!r}"
    if statement.op == "load" and any(statements[o].kind is not Kind.INT for o in statement.operands):
        return "is indexed by something that is no integer"
    if statement.op != "load" and statement.operands:
        return "a leaf takes no operands"
    return None


def _line(number: int, statement: Statement) -> str:
    parts = [f"%{operand}" for operand in statement.operands]
    attribute = "" if statement.attribute is None else f"[{json.dumps(_portable(statement.attribute))}]"
    comment = f"  # {statement.source}" if statement.source else ""
    return f"%{number} = {statement.op}{attribute}({', '.join(parts)}) : {statement.kind.value}{comment}"


# ------------------------------------------------------------------------------------------------ as text and as a formula


def _portable(attribute: Attribute) -> Attribute:
    """JSON has no infinities: spell them."""
    if isinstance(attribute, float) and not math.isfinite(attribute):
        return f"float:{attribute}"
    return attribute


def _restored(attribute: Attribute) -> Attribute:
    if isinstance(attribute, str) and attribute.startswith("float:"):
        return float(attribute.removeprefix("float:"))
    return attribute


def to_json(program: ScoreProgram) -> dict[str, Any]:
    """A JSON value from which `from_json` makes an equal program, source lines included."""
    rows = [[s.op, list(s.operands), s.kind.value, _portable(s.attribute), s.source] for s in program.statements]
    return {"statements": rows, "results": list(program.results)}


def from_json(value: Mapping[str, Any]) -> ScoreProgram:
    """The program that `to_json` wrote. Raises InternalError if it is not well formed."""
    statements = tuple(
        Statement(op, tuple(operands), Kind(kind), _restored(attribute), source)
        for op, operands, kind, attribute, source in value["statements"]
    )
    program = ScoreProgram(statements, tuple(value["results"]))
    program.verify()
    return program


def _formula(program: ScoreProgram, result: int, captures: tuple[str, ...]) -> str:
    @cache
    def text(number: int) -> str:
        statement = program.statements[number]
        operands = [text(operand) for operand in statement.operands]
        if statement.op == "score":
            return "s"
        if statement.op in ("index", "length"):
            return str(statement.attribute)
        if statement.op == "const":
            return _number(statement.attribute)
        if statement.op == "load":
            place = int(statement.attribute)  # type: ignore[arg-type]
            name = captures[place] if place < len(captures) else f"c{place}"
            return f"{name}[{', '.join(operands)}]" if operands else name
        if statement.op in LEAVES:
            return f"{statement.op}{'' if statement.attribute is None else statement.attribute}"
        infix = SCORE_OPS[statement.op].infix
        if infix is None:
            return f"{statement.op}({', '.join(operands)})"
        bracketed = [
            f"({word})" if " " in word and not word.endswith(("]", ")")) and infix != "{0}" else word
            for word in operands
        ]
        return infix.format(*bracketed)

    return text(result)


def _number(value: Attribute) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ building


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
        problem = _problem([*self.statements, statement], len(self.statements), statement)
        if problem:
            raise InternalError(f"{name}: {problem}")
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

    def program(self, *results: Value) -> ScoreProgram:
        """The program of these results, with only the statements that they need."""
        needed = _closure(self.statements, [value.number for value in results])
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


def _closure(statements: Sequence[Statement], results: Iterable[int]) -> list[int]:
    needed: set[int] = set()
    stack = list(results)
    while stack:
        number = stack.pop()
        if number not in needed:
            needed.add(number)
            stack.extend(statements[number].operands)
    return sorted(needed)


# ------------------------------------------------------------------------------------------------ meaning


def evaluate(
    program: ScoreProgram, leaf: Callable[[Statement, list[Any]], Any], dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    """Run the program on torch tensors (or numbers) that broadcast against each other.

    `leaf(statement, operands)` gives the value of every leaf except constants. `dtype` is what numbers become where no
    float tensor decides it (default: torch's default dtype).
    """
    values: list[Any] = []
    for statement in program.statements:
        operands = [values[operand] for operand in statement.operands]
        if statement.op == "const":
            values.append(statement.attribute)
        elif statement.op in LEAVES:
            values.append(leaf(statement, operands))
        else:
            kinds = [program.statements[operand].kind for operand in statement.operands]
            values.append(_apply(statement.op, operands, kinds, dtype or torch.get_default_dtype()))
    return tuple(values[result] for result in program.results)


def _apply(name: str, operands: list[Any], kinds: list[Kind], dtype: torch.dtype) -> Any:
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    if name == "to_float":
        return tensors[0].to(dtype) if tensors else torch.tensor(operands[0], dtype=dtype)
    device = tensors[0].device if tensors else None
    floating = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), dtype)
    wanted = {Kind.FLOAT: floating, Kind.INT: torch.int64, Kind.BOOL: torch.bool}
    return SCORE_OPS[name].torch(
        *(
            operand if isinstance(operand, torch.Tensor) else torch.tensor(operand, device=device, dtype=wanted[kind])
            for operand, kind in zip(operands, kinds, strict=True)
        )
    )
