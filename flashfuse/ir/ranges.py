"""Which keys a block of queries can see, read off the keep-predicate in closed form.

`key_ranges(keep)` gives a program over the first and last query of a block with four results `lo, hi, full_lo, full_hi`:
no key outside `[lo, hi)` is kept for any query of the block, and every key inside `[full_lo, full_hi)` is kept for all
of them. Comparisons that are affine in m and n, or in m and n divided by a chunk's size, are solved; anything else is "possible
everywhere, certain nowhere", which is always sound. `query_ranges` is the same with m and n exchanged.

A union may leave a gap: sliding windows with sink tokens keep the first keys and the last. Programs of such predicates
have two more results `gap_lo, gap_hi`: no key inside `[gap_lo, gap_hi)` is kept either.

`certainty.py` is the second, weaker tool, for predicates over captured vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from flashfuse.ir.affine import FLIPPED, Affine, Step, not_negative
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram


@dataclass(frozen=True)
class Ranges:
    """`program` has inputs 0 and 1 (first and last index of the block) and results lo, hi, full_lo, full_hi.

    `closed` tells whether every part of the predicate was solved; if not, `[full_lo, full_hi)` may be needlessly
    small and `[lo, hi)` needlessly large.
    """

    program: ScoreProgram
    closed: bool

    @property
    def has_gap(self) -> bool:
        """Whether the program also gives gap_lo and gap_hi."""
        return len(self.program.results) == 6


@dataclass(frozen=True)
class _Range:
    """`whole`: `[lo, hi)` is everything or nothing. Ends are arbitrary numbers where a range is empty."""

    lo: Value
    hi: Value
    full_lo: Value
    full_hi: Value
    whole: bool = False
    gap: tuple[Value, Value] | None = None


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
        return _Range(self.zero, self.length, self.zero, self.length, whole=True)

    def nothing(self) -> _Range:
        return _Range(self.zero, self.zero, self.zero, self.zero, whole=True)

    def unknown(self) -> _Range:
        self.closed = False
        return _Range(self.zero, self.length, self.zero, self.zero, whole=True)

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
        if not set(index_letters(self.keep, number)) & {"m", "n"}:
            value = self.values[number]
            return self.guarded(value if wanted else value.apply("not", value))
        if statement.op in FLIPPED:
            return self.compare(statement.op if wanted else FLIPPED[statement.op], statement.operands)
        return self.unknown()

    def guarded(self, condition: Value) -> _Range:
        """Everything if a condition without m and n holds, else nothing."""
        end = condition.apply("where", condition, self.length, self.zero)
        return _Range(self.zero, end, self.zero, end, whole=True)

    # ------------------------------------------------------------------------------------------ joining

    def both(self, a: _Range, b: _Range) -> _Range:
        return _Range(
            self.max(a.lo, b.lo), self.min(a.hi, b.hi), self.max(a.full_lo, b.full_lo), self.min(a.full_hi, b.full_hi),
            a.whole and b.whole, self.longest([gap for gap in (a.gap, b.gap) if gap is not None]),
        )  # fmt: skip

    def either(self, a: _Range, b: _Range) -> _Range:
        # an empty side must not stretch the hull to its arbitrary ends
        a_empty, b_empty = a.lo >= a.hi, b.lo >= b.hi
        lo = self.where(a_empty, b.lo, self.where(b_empty, a.lo, self.min(a.lo, b.lo)))
        hi = self.where(a_empty, b.hi, self.where(b_empty, a.hi, self.max(a.hi, b.hi)))
        return _Range(lo, hi, *self.joined(a, b), a.whole and b.whole, self.longest(self.gaps(a, b, a_empty | b_empty)))

    def joined(self, a: _Range, b: _Range) -> tuple[Value, Value]:
        """A certain stretch of a union: both sides' if they touch, else the longer."""
        a_longer = (a.full_hi - a.full_lo) >= (b.full_hi - b.full_lo)
        lo, hi = self.where(a_longer, a.full_lo, b.full_lo), self.where(a_longer, a.full_hi, b.full_hi)
        if any(side.full_lo.number == side.full_hi.number for side in (a, b)):
            return lo, hi
        real = (a.full_lo < a.full_hi) & (b.full_lo < b.full_hi)
        touch = real & (a.full_lo <= b.full_hi) & (b.full_lo <= a.full_hi)
        return (
            self.where(touch, self.min(a.full_lo, b.full_lo), lo),
            self.where(touch, self.max(a.full_hi, b.full_hi), hi),
        )

    def gaps(self, a: _Range, b: _Range, one_empty: Value) -> list[tuple[Value, Value]]:
        """Stretches that a union leaves out: between its sides, and what a side leaves of the other's gap."""
        found: list[tuple[Value, Value]] = []
        ends_meet = a.lo.number == b.lo.number or a.hi.number == b.hi.number
        if not (a.whole or b.whole or ends_meet):
            start, stop = self.min(a.hi, b.hi), self.max(a.lo, b.lo)
            found.append((start, self.where(one_empty, start, stop)))
        for side, other in ((a, b), (b, a)):
            if side.gap is None:
                continue
            start, stop = side.gap
            empty = other.lo >= other.hi
            found.append((start, self.where(empty, stop, self.min(stop, other.lo))))
            found.append((self.where(empty, start, self.max(start, other.hi)), stop))
        return found

    def longest(self, gaps: list[tuple[Value, Value]]) -> tuple[Value, Value] | None:
        """The longest of some stretches."""
        if not gaps:
            return None
        start, stop = gaps[0]
        for other_start, other_stop in gaps[1:]:
            longer = (other_stop - other_start) > (stop - start)
            start, stop = self.where(longer, other_start, start), self.where(longer, other_stop, stop)
        return start, stop

    def min(self, a: Value, b: Value) -> Value:
        return a if a.number == b.number else a.apply("minimum", a, b)

    def max(self, a: Value, b: Value) -> Value:
        return a if a.number == b.number else a.apply("maximum", a, b)

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        return condition.apply("where", condition, a, b)

    # ------------------------------------------------------------------------------------------ comparisons

    def compare(self, op: str, operands: tuple[int, ...]) -> _Range:
        if op == "eq":
            return self.both(self.compare("le", operands), self.compare("ge", operands))
        if op == "ne":  # what lies between is less than a block
            return replace(self.either(self.compare("lt", operands), self.compare("gt", operands)), gap=None)
        form = not_negative(self.keep, op, operands, steps=True)
        return self.unknown() if form is None else self.positive(form)

    def positive(self, form: Affine) -> _Range:
        """Where `form >= 0`."""
        own, own_step, other, other_step = form.n, form.n_step, form.m, form.m_step
        if self.along == "m":
            own, own_step, other, other_step = other, other_step, own, own_step
        if own not in (-1, 0, 1):
            return self.unknown()
        rest = self.total(form.constant, form.rest)
        # `rest + other * x` over the block's x in [first, last]
        least = most = rest
        if other:
            low, high = (self.stepped(x, other_step) for x in (self.first, self.last))
            least = rest + low * other if other > 0 else rest - high * -other
            most = rest + high * other if other > 0 else rest - low * -other
        if own == 0:
            return self.only_if(most >= 0, least >= 0)
        if own == 1:
            return _Range(self.start(-most, own_step), self.length, self.start(-least, own_step), self.length)
        return _Range(self.zero, self.start(most + 1, own_step), self.zero, self.start(least + 1, own_step))

    def total(self, constant: int, rest: tuple[tuple[int, int], ...]) -> Value:
        """A constant plus multiples of statements without m and n."""
        value = self.builder.const(constant)
        for number, coefficient in rest:
            value = value + self.values[number] * coefficient
        return value

    def stepped(self, index: Value, step: Step) -> Value:
        """An index in steps: which step it lies in."""
        if step == Step():
            return index
        return index.apply("floordiv", index + self.total(step.constant, step.rest), step.divisor)

    def start(self, number: Value, step: Step) -> Value:
        """The first index of a step."""
        return number if step == Step() else number * step.divisor - self.total(step.constant, step.rest)

    def only_if(self, possible: Value, certain: Value) -> _Range:
        a, b = self.guarded(possible), self.guarded(certain)
        return _Range(a.lo, a.hi, b.full_lo, b.full_hi, whole=True)

    def program(self) -> Ranges:
        found = self.solve(self.keep.result)
        starts, stops = [found.lo, found.full_lo], [found.hi, found.full_hi]
        if found.gap is not None:
            starts.append(found.gap[0])
            stops.append(found.gap[1])
        ends = [
            end
            for start, stop in zip(starts, stops, strict=True)
            for end in (self.max(start, self.zero), self.min(stop, self.length))
        ]
        return Ranges(self.builder.program(*ends), self.closed)


@lru_cache(maxsize=1024)
def key_ranges(keep: ScoreProgram) -> Ranges:
    """For a block of queries `[input0, input1]`: the keys that can be, and that must be, kept."""
    return _Solver(keep, "n").program()


@lru_cache(maxsize=1024)
def query_ranges(keep: ScoreProgram) -> Ranges:
    """For a block of keys `[input0, input1]`: the queries that can, and that must, keep them."""
    return _Solver(keep, "m").program()