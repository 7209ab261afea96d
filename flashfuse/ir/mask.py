"""From a score program to a keep-predicate and a mask-free score.

People write masks as `where(keep, s, -inf)`, `masked_fill(s, drop, -1e9)`, `s + where(keep, 0, finfo.min)` and mixtures.
`split_mask` separates such a program into the predicate and the score of a kept element. In a row whose largest kept
score lies well above the fill, a masked element's probability is exactly zero in float32, so kernels may leave it out
altogether. Rows for which that is not so (no kept key, or only hopeless ones) are computed from the whole program; see
`AttentionSpec.empty_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram

# A fill at or below this is a mask. fp16's own minimum (-65504) is; -10000, which a score can come near to, is not:
# such a fill is computed as the ordinary number that it is.
MASK_FILL = -3.0e4

# A row whose largest kept score is not above this is computed from the whole program. Above it a masked element, whose
# score is at most MASK_FILL plus the size of an ordinary score, has probability zero in float32. So is a row whose largest
# score is not below the opposite: its logsumexp would be rounded to more than the scores' differences. Both are "low".
LOW_SCORE = -5.0e3


@dataclass(frozen=True)
class SplitScore:
    """`keep` (None: everything is kept) has kind BOOL; `kept` is the score wherever `keep` holds.

    `fill` is the largest score that a masked element can be given (-inf for masks that are exact in any row).
    """

    keep: ScoreProgram | None
    kept: ScoreProgram
    fill: float


@dataclass(frozen=True)
class _Stripped:
    kept: Value | None  # None: nothing is kept
    keep: Value | None  # None: everything is kept
    fill: float  # upper bound of a masked element's value


@lru_cache(maxsize=1024)
def split_mask(program: ScoreProgram) -> SplitScore:
    """Separate the predicate. A program without a recognisable mask comes back whole, with `keep` None."""
    builder = Builder()
    values = builder.include(program)
    whole = SplitScore(None, program, float("-inf"))
    stripped = _strip(values[program.result], {})
    if stripped.keep is None or stripped.kept is None or stripped.fill > MASK_FILL:
        return whole
    return SplitScore(builder.program(stripped.keep), builder.program(stripped.kept), stripped.fill)


def _strip(value: Value, known: dict[int, _Stripped]) -> _Stripped:
    if value.number not in known:
        known[value.number] = _strip_new(value, known)
    return known[value.number]


def _strip_new(value: Value, known: dict[int, _Stripped]) -> _Stripped:
    plain = _Stripped(value, None, float("-inf"))
    constant = value.constant
    if value.kind is not Kind.FLOAT:
        return plain
    if constant is not None:
        return _Stripped(None, None, float(constant)) if constant <= MASK_FILL else plain
    name, operands = value.statement.op, value.operands
    if name == "where":
        return _strip_where(value, known)
    if name == "add":
        return _strip_add(value, _strip(operands[0], known), _strip(operands[1], known))
    if name == "sub" and _strip(operands[1], known).keep is None and _strip(operands[1], known).kept is not None:
        return _rebuild(value, "sub", _strip(operands[0], known), operands[1], lambda fill: fill)
    other = operands[1].constant if len(operands) == 2 else None
    if name in ("mul", "div") and other is not None and other > 0:
        factor = float(other) if name == "mul" else 1.0 / float(other)
        return _rebuild(value, name, _strip(operands[0], known), operands[1], lambda fill: fill * factor)
    if name in ("maximum", "clamp_min") and other is not None and other <= MASK_FILL:
        return _rebuild(value, name, _strip(operands[0], known), operands[1], lambda fill: max(fill, float(other)))
    return plain


def _rebuild(value: Value, name: str, inner: _Stripped, operand: Value, refill) -> _Stripped:  # type: ignore[no-untyped-def]
    if inner.kept is not None and inner.keep is None:
        return _Stripped(value, None, float("-inf"))
    kept = None if inner.kept is None else value.apply(name, inner.kept, operand)
    return _Stripped(kept, inner.keep, refill(inner.fill))


def _strip_where(value: Value, known: dict[int, _Stripped]) -> _Stripped:
    condition, first, second = value.operands
    a, b = _strip(first, known), _strip(second, known)
    fill = max(a.fill, b.fill)
    if a.kept is None and b.kept is None:
        return _Stripped(None, None, fill)
    if a.kept is None or b.kept is None:
        inner = b if a.kept is None else a
        chosen = value.apply("not", condition) if a.kept is None else condition
        keep = chosen if inner.keep is None else chosen & inner.keep
        return _Stripped(inner.kept, keep, fill)
    if a.keep is None and b.keep is None:
        return _Stripped(value, None, float("-inf"))
    true = value.builder.const(True)
    keep = value.apply("where", condition, a.keep or true, b.keep or true)
    return _Stripped(value.apply("where", condition, a.kept, b.kept), keep, fill)


def _strip_add(value: Value, a: _Stripped, b: _Stripped) -> _Stripped:
    if a.kept is None or b.kept is None:
        # a fill plus anything is still a fill; two fills may overflow to -inf, which is one too
        return _Stripped(None, None, max(side.fill for side in (a, b) if side.kept is None))
    if a.keep is None and b.keep is None:
        return _Stripped(value, None, float("-inf"))
    keep = a.keep & b.keep if a.keep is not None and b.keep is not None else a.keep or b.keep
    kept = next(
        (other.kept for one, other in ((a, b), (b, a)) if one.kept is not None and one.kept.constant == 0.0),
        None,
    )
    return _Stripped(kept if kept is not None else a.kept + b.kept, keep, max(a.fill, b.fill))
