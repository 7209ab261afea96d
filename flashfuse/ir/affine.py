"""Comparisons of integers as affine forms of m and n, and what can be proved with them for every row of queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import ScoreProgram

FLIPPED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
_LARGEST_STEP = 1 << 30  # so that an end of a chunk fits into int32

Terms = tuple[tuple[int, int], ...]  # (statement number, coefficient), of statements without m and n


@dataclass(frozen=True)
class Step:
    """Of an index x: `floor((x + constant + sum(coefficient * statement)) / divisor)`; as it is made, x itself."""

    constant: int = 0
    rest: Terms = ()
    divisor: int = 1


@dataclass(frozen=True)
class Affine:
    """`m * index_m + n * index_n + constant + sum(coefficient * statement)`.

    An index may be taken in steps (`m // 256`), as chunked masks compare.
    """

    m: int
    n: int
    constant: int
    rest: Terms
    m_step: Step = Step()
    n_step: Step = Step()

    @property
    def plain(self) -> bool:
        """Whether both indices are taken as they are."""
        return self.m_step == self.n_step == Step()


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
    if statement.op == "floordiv":
        return _in_steps(*parts)  # type: ignore[arg-type]
    return None


def _in_steps(form: Affine, by: Affine) -> Affine | None:
    """`form // by` where that is one index in steps of a constant."""
    if not form.plain or (by.m, by.n, by.rest) != (0, 0, ()) or not 1 <= by.constant <= _LARGEST_STEP:
        return None
    step = Step(form.constant, form.rest, by.constant)
    if (form.m, form.n) == (1, 0):
        return Affine(1, 0, 0, (), m_step=step)
    return Affine(0, 1, 0, (), n_step=step) if (form.m, form.n) == (0, 1) else None


def not_negative(program: ScoreProgram, op: str, operands: tuple[int, ...], *, steps: bool = False) -> Affine | None:
    """The form that is at least 0 exactly where the integer comparison `op` (lt, le, gt, ge) holds, or None.

    Its indices are plain unless `steps` are allowed.
    """
    left, right = (affine(program, operand) for operand in operands)
    if left is None or right is None or op not in ("lt", "le", "gt", "ge"):
        return None
    difference = _combine(left, right, -1) if op in ("gt", "ge") else _combine(right, left, -1)
    if difference is None or not (steps or difference.plain):
        return None
    return replace(difference, constant=difference.constant - 1) if op in ("lt", "gt") else difference


def is_causal(keep: ScoreProgram) -> bool:
    """Whether a predicate is `n <= m`, in whatever way it is written."""
    number, wanted = keep.result, True
    while keep.statements[number].op == "not":
        number, wanted = keep.statements[number].operands[0], not wanted
    statement = keep.statements[number]
    op = statement.op if wanted else FLIPPED.get(statement.op, "")
    return not_negative(keep, op, statement.operands) == Affine(1, -1, 0, ()) if op in FLIPPED else False


def is_union(keep: ScoreProgram) -> bool:
    """Whether a predicate says "or", in whatever way, of something about positions or tensors."""
    return keep.uses("or") or keep.uses("xor") or keep.uses("where_bool") or (keep.uses("not") and keep.uses("and"))


def _combine(a: Affine, b: Affine, sign: int) -> Affine | None:
    """`a + sign * b`; None if an index would occur plain and in steps."""
    if (a.m and b.m and a.m_step != b.m_step) or (a.n and b.n and a.n_step != b.n_step):
        return None
    rest = dict(a.rest)
    for number, coefficient in b.rest:
        rest[number] = rest.get(number, 0) + sign * coefficient
    kept = tuple(sorted((number, coefficient) for number, coefficient in rest.items() if coefficient))
    m, n = a.m + sign * b.m, a.n + sign * b.n
    m_step, n_step = a.m_step if a.m else b.m_step, a.n_step if a.n else b.n_step
    return Affine(m, n, a.constant + sign * b.constant, kept, m_step if m else Step(), n_step if n else Step())


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
    if statement.op not in FLIPPED:
        return None
    exact = keep.statements[statement.operands[0]].kind is not Kind.FLOAT  # NaN differs from itself
    if exact and (slope, offset) == (1, 0) and _same_on_diagonal(keep, *statement.operands):
        return statement.op in ("eq", "le", "ge")
    left, right = (affine(keep, operand) for operand in statement.operands)
    if left is None or right is None:
        return None
    difference = _combine(left, right, -1)
    if difference is None or not difference.plain:
        return None
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
