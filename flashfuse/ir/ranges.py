"""Which keys a block of queries can see, read off the keep-predicate in closed form.

`key_ranges(keep)` gives a program over the first and last query of a block with four results `lo, hi, full_lo, full_hi`:
no key outside `[lo, hi)` is kept for any query of the block, and every key inside `[full_lo, full_hi)` is kept for all
of them. Comparisons that are affine in m and n with unit coefficients are solved; anything else is "possible
everywhere, certain nowhere", which is always sound. `query_ranges` is the same with m and n exchanged.

`block_certainty` is the second, weaker tool, for predicates over captured vectors (document numbers, padding): interval
arithmetic by the rows' `interval` rules, from the smallest and largest value of each vector in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import ScoreProgram, Statement

_FLIPPED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


# ------------------------------------------------------------------------------------------------ affine forms


@dataclass(frozen=True)
class Affine:
    """`m * index_m + n * index_n + constant + sum(coefficient * statement)`, the last over statements without m and n."""

    m: int
    n: int
    constant: int
    rest: tuple[tuple[int, int], ...]  # (statement number, coefficient)


def affine(program: ScoreProgram, number: int) -> Affine | None:
    """The affine form of an integer statement, or None if it has none."""
    statement = program.statements[number]
    if statement.kind is not Kind.INT:
        return None
    if statement.op == "const":
        return Affine(0, 0, int(statement.attribute), ())  # type: ignore[arg-type]
    if statement.op == "index" and statement.attribute in ("m", "n"):
        return Affine(int(statement.attribute == "m"), int(statement.attribute == "n"), 0, ())
    letters = index_letters(program, number)
    if "m" not in letters and "n" not in letters:
        return Affine(0, 0, 0, ((number, 1),))
    parts = [affine(program, operand) for operand in statement.operands]
    if any(part is None for part in parts):
        return None
    if statement.op == "add":
        return _combine(parts[0], parts[1], 1)  # type: ignore[arg-type]
    if statement.op == "sub":
        return _combine(parts[0], parts[1], -1)  # type: ignore[arg-type]
    if statement.op == "neg":
        return _combine(Affine(0, 0, 0, ()), parts[0], -1)  # type: ignore[arg-type]
    return None


def not_negative(program: ScoreProgram, op: str, operands: tuple[int, ...]) -> Affine | None:
    """The form that is at least 0 exactly where the integer comparison `op` (lt, le, gt, ge) holds, or None."""
    left, right = (affine(program, operand) for operand in operands)
    if left is None or right is None or op not in ("lt", "le", "gt", "ge"):
        return None
    difference = _combine(left, right, -1) if op in ("gt", "ge") else _combine(right, left, -1)
    return _combine(difference, Affine(0, 0, 1, ()), -1) if op in ("lt", "gt") else difference


def is_causal(keep: ScoreProgram) -> bool:
    """Whether a predicate is `n <= m`, in whatever way it is written."""
    number, wanted = keep.result, True
    while keep.statements[number].op == "not":
        number, wanted = keep.statements[number].operands[0], not wanted
    statement = keep.statements[number]
    op = statement.op if wanted else _FLIPPED.get(statement.op, "")
    return not_negative(keep, op, statement.operands) == Affine(1, -1, 0, ()) if op in _FLIPPED else False


def _combine(a: Affine, b: Affine, sign: int) -> Affine:
    rest = dict(a.rest)
    for number, coefficient in b.rest:
        rest[number] = rest.get(number, 0) + sign * coefficient
    kept = tuple(sorted((number, coefficient) for number, coefficient in rest.items() if coefficient))
    return Affine(a.m + sign * b.m, a.n + sign * b.n, a.constant + sign * b.constant, kept)


def rows_never_empty(keep: ScoreProgram, *, square: bool) -> bool:
    """Whether every query provably keeps a key: key 0, or (if M == N) the key at its own position."""
    substitutions = [(0, 0)]  # n = 0 * m + 0
    if square:
        substitutions.append((1, 0))  # n = m
    return any(_holds(keep, keep.result, slope, offset) is True for slope, offset in substitutions)


def _holds(keep: ScoreProgram, number: int, slope: int, offset: int) -> bool | None:
    """Whether a predicate is true (or false) for all m when n = slope * m + offset; None if that cannot be told."""
    statement = keep.statements[number]
    if statement.op == "const":
        return bool(statement.attribute)
    operands = [_holds(keep, o, slope, offset) for o in statement.operands if keep.statements[o].kind is Kind.BOOL]
    if statement.op == "and":
        return False if False in operands else None if None in operands else True
    if statement.op == "or":
        return True if True in operands else None if None in operands else False
    if statement.op == "not":
        return None if operands[0] is None else not operands[0]
    if statement.op not in _FLIPPED:
        return None
    exact = keep.statements[statement.operands[0]].kind is not Kind.FLOAT  # NaN differs from itself
    if exact and (slope, offset) == (1, 0) and _same_on_diagonal(keep, *statement.operands):
        return statement.op in ("eq", "le", "ge")
    left, right = (affine(keep, operand) for operand in statement.operands)
    if left is None or right is None:
        return None
    difference = _combine(left, right, -1)
    return _sign_decides(keep, statement.op, difference, difference.m + slope * difference.n, offset * difference.n)


def _sign_decides(keep: ScoreProgram, op: str, form: Affine, per_row: int, shift: int) -> bool | None:
    """Whether `per_row * m + rest + constant (op) 0` for every m >= 0; lengths and sizes are not negative either."""
    if any(keep.statements[number].op not in ("length", "size") for number, _coefficient in form.rest):
        return None
    slopes = [per_row, *(coefficient for _number, coefficient in form.rest)]
    constant = form.constant + shift
    holds = bool(SCORE_OPS[op].torch(*_tensors(constant, 0)))
    if not any(slopes):
        return holds
    grows, falls = all(slope >= 0 for slope in slopes), all(slope <= 0 for slope in slopes)
    upward = op in ("ge", "gt")
    if (upward and grows) or (op in ("le", "lt") and falls):
        return True if holds else None
    if (upward and falls) or (op in ("le", "lt") and grows):
        return None if holds else False
    return None


def _same_on_diagonal(keep: ScoreProgram, a: int, b: int) -> bool:
    """Whether two statements are equal when n = m: the same operations on the same leaves, `index m` being `index n`."""
    x, y = keep.statements[a], keep.statements[b]
    if x.op == y.op == "index":
        return {x.attribute, y.attribute} <= {"m", "n"} or x.attribute == y.attribute
    if (x.op, x.attribute, x.kind, len(x.operands)) != (y.op, y.attribute, y.kind, len(y.operands)):
        return False
    return all(_same_on_diagonal(keep, p, q) for p, q in zip(x.operands, y.operands, strict=True))


def _tensors(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


# ------------------------------------------------------------------------------------------------ closed-form ranges


@dataclass(frozen=True)
class Ranges:
    """`program` has inputs 0 and 1 (first and last index of the block) and results lo, hi, full_lo, full_hi.

    `closed` tells whether every part of the predicate was solved; if not, `[full_lo, full_hi)` may be needlessly
    small and `[lo, hi)` needlessly large.
    """

    program: ScoreProgram
    closed: bool


@dataclass(frozen=True)
class _Range:
    lo: Value
    hi: Value
    full_lo: Value
    full_hi: Value


class _Solver:
    """Solves for `along` ("n": the keys of a block of queries; "m": the queries of a block of keys)."""

    def __init__(self, keep: ScoreProgram, along: str) -> None:
        self.keep = keep
        self.along = along
        self.closed = True
        self.builder = Builder()
        # ranges only ever use statements without m and n, so including all of them is harmless: unused ones are dropped
        self.values = self.builder.include(keep)
        self.first = self.builder.leaf("input", 0, Kind.INT)
        self.last = self.builder.leaf("input", 1, Kind.INT)
        self.zero = self.builder.const(0)
        self.length = self.builder.leaf("length", "N" if along == "n" else "M")

    def everything(self) -> _Range:
        return _Range(self.zero, self.length, self.zero, self.length)

    def nothing(self) -> _Range:
        return _Range(self.zero, self.zero, self.zero, self.zero)

    def unknown(self) -> _Range:
        self.closed = False
        return _Range(self.zero, self.length, self.zero, self.zero)

    def solve(self, number: int, wanted: bool = True) -> _Range:
        """The range where statement `number` is `wanted`."""
        statement = self.keep.statements[number]
        if statement.op == "const":
            return self.everything() if bool(statement.attribute) is wanted else self.nothing()
        if statement.op == "not":
            return self.solve(statement.operands[0], not wanted)
        if statement.op in ("and", "or"):
            a, b = (self.solve(operand, wanted) for operand in statement.operands)
            return self.both(a, b) if (statement.op == "and") is wanted else self.either(a, b)
        if statement.op in _FLIPPED:
            return self.compare(statement.op if wanted else _FLIPPED[statement.op], statement.operands)
        if not set(index_letters(self.keep, number)) & {"m", "n"}:
            value = self.values[number]
            return self.guarded(value if wanted else value.apply("not", value))
        return self.unknown()

    def guarded(self, condition: Value) -> _Range:
        """Everything if a condition without m and n holds, else nothing."""
        end = condition.apply("where", condition, self.length, self.zero)
        return _Range(self.zero, end, self.zero, end)

    def both(self, a: _Range, b: _Range) -> _Range:
        return _Range(
            self.max(a.lo, b.lo), self.min(a.hi, b.hi), self.max(a.full_lo, b.full_lo), self.min(a.full_hi, b.full_hi)
        )

    def either(self, a: _Range, b: _Range) -> _Range:
        a_longer = (a.full_hi - a.full_lo) >= (b.full_hi - b.full_lo)
        # an empty side must not stretch the hull to its arbitrary ends
        a_empty, b_empty = a.lo >= a.hi, b.lo >= b.hi
        lo = a.lo.apply("where", a_empty, b.lo, a.lo.apply("where", b_empty, a.lo, self.min(a.lo, b.lo)))
        hi = a.hi.apply("where", a_empty, b.hi, a.hi.apply("where", b_empty, a.hi, self.max(a.hi, b.hi)))
        full_lo = a.full_lo.apply("where", a_longer, a.full_lo, b.full_lo)
        full_hi = a.full_hi.apply("where", a_longer, a.full_hi, b.full_hi)
        return _Range(lo, hi, full_lo, full_hi)

    def min(self, a: Value, b: Value) -> Value:
        return a if a.number == b.number else a.apply("minimum", a, b)

    def max(self, a: Value, b: Value) -> Value:
        return a if a.number == b.number else a.apply("maximum", a, b)

    def compare(self, op: str, operands: tuple[int, ...]) -> _Range:
        if op == "eq":
            return self.both(self.compare("le", operands), self.compare("ge", operands))
        form = not_negative(self.keep, op, operands)
        return self.unknown() if form is None else self.positive(form)

    def positive(self, form: Affine) -> _Range:
        """Where `form >= 0`."""
        own, other = (form.n, form.m) if self.along == "n" else (form.m, form.n)
        if own not in (-1, 0, 1) or other not in (-1, 0, 1):
            return self.unknown()
        rest: Value = self.builder.const(form.constant)
        for number, coefficient in form.rest:
            rest = rest + self.values[number] * coefficient
        # `rest + other * x` over the block's x in [first, last]
        least = rest if other == 0 else rest + self.first if other == 1 else rest - self.last
        most = rest if other == 0 else rest + self.last if other == 1 else rest - self.first
        if own == 0:
            return self.only_if(most >= 0, least >= 0)
        if own == 1:  # index >= -(...)
            return _Range(-most, self.length, -least, self.length)
        return _Range(self.zero, most + 1, self.zero, least + 1)  # index <= (...)

    def only_if(self, possible: Value, certain: Value) -> _Range:
        a, b = self.guarded(possible), self.guarded(certain)
        return _Range(a.lo, a.hi, b.full_lo, b.full_hi)

    def program(self) -> Ranges:
        found = self.solve(self.keep.result)
        lo, full_lo = self.max(found.lo, self.zero), self.max(found.full_lo, self.zero)
        hi, full_hi = self.min(found.hi, self.length), self.min(found.full_hi, self.length)
        return Ranges(self.builder.program(lo, hi, full_lo, full_hi), self.closed)


@lru_cache(maxsize=1024)
def key_ranges(keep: ScoreProgram) -> Ranges:
    """For a block of queries `[input0, input1]`: the keys that can be, and that must be, kept."""
    return _Solver(keep, "n").program()


@lru_cache(maxsize=1024)
def query_ranges(keep: ScoreProgram) -> Ranges:
    """For a block of keys `[input0, input1]`: the queries that can, and that must, keep them."""
    return _Solver(keep, "m").program()


# ------------------------------------------------------------------------------------------------ interval evaluation


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
