"""The score program: a frozen SSA list of elementwise statements from the raw score to the final score.

Statement `%i` computes one value for each `(b, h, m, n)` from earlier values. Leaves are the raw score, the four
indices, the lengths M and N, constants, integers given at call time (`size`), elements of captured tensors (`load`),
and, in derivative programs, the incoming gradient. Weights (`flashfuse.ir.weight`) are such programs of a probability
instead of a score, sinks of neither. It is no sympy expression on purpose: sympy rewrites on construction
and so changes rounding.

`evaluate` is the specification: what a kernel computes is right if and only if it agrees with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        Leaf("probability", None, Kind.FLOAT),  # weights: an element of the softmax, before anything else
        Leaf("grad", None, Kind.FLOAT),  # derivative programs: the gradient of the program's result
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

    def with_only(self, captures: Sequence[int]) -> ScoreProgram:
        """The same program where only these captures are left, in this order; all that it reads must be among them."""
        place = {capture: new for new, capture in enumerate(captures)}
        moved = (replace(s, attribute=place[int(s.attribute)]) if s.op == "load" else s for s in self.statements)  # type: ignore[arg-type]
        return replace(self, statements=tuple(moved))

    def verify(self) -> None:
        """Raise InternalError naming the first statement that is not well formed."""
        for number, statement in enumerate(self.statements):
            wrong = problem(self.statements, number, statement)
            if wrong:
                raise InternalError(f"score program statement %{number} = {statement.op}: {wrong}")
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


def problem(statements: Sequence[Statement], number: int, statement: Statement) -> str | None:
    """What is wrong with a statement in its place, or None."""
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
        if statement.op in ("score", "probability"):
            return statement.op[0]
        if statement.op in ("index", "length"):
            return str(statement.attribute)
        if statement.op == "const":
            return number_text(statement.attribute)
        if statement.op == "load":
            place = int(statement.attribute)  # type: ignore[arg-type]
            name = captures[place] if place < len(captures) else f"c{place}"
            return f"{name}[{', '.join(operands)}]" if operands else name
        if statement.op in LEAVES:
            return f"{statement.op}{'' if statement.attribute is None else statement.attribute}"
        infix = SCORE_OPS[statement.op].infix
        if infix is None:
            return f"{statement.op}({', '.join(operands)})"
        encloses = infix == "{0}" or (infix[0] not in "({" and infix[-1] in ")|")
        return infix.format(*(word if encloses else bracketed(word) for word in operands))

    return text(result)


def bracketed(formula: str) -> str:
    """A formula as an operand: in brackets unless it is one word, one call or one element."""
    depth, bars = 0, False
    for letter in formula:
        depth += (letter in "([") - (letter in ")]")
        bars ^= letter == "|"
        if letter == " " and depth == 0 and not bars:
            return f"({formula})"
    return formula


def number_text(value: Attribute) -> str:
    """A constant as people write it, to six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
