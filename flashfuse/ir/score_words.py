"""A score program and its predicate in the words of people who write attentions: `s * 0.125 -> softcap 30 -> + bias[h, m, n]`.

Words are for reports and for names of kernels only; nothing is decided by them. What has no word of its own is shown as
its formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from flashfuse.ir.affine import Affine, not_negative
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_ops import SCORE_OPS
from flashfuse.ir.score_program import ScoreProgram, bracketed, number_text

_FLIPPED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Words:
    """`text` is for reading; `labels` are single words (`causal`, `softcap`), the parts of a kernel's name."""

    text: str
    labels: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ the score


def score_words(program: ScoreProgram, captures: Sequence[str] = ()) -> Words:
    """The steps from raw to final score in order, or the whole formula where the way is not a single line of steps."""
    names = tuple(captures)
    steps: list[str] = []
    labels: list[str] = []
    number = program.result
    while program.statements[number].op != "score":
        cap = _softcap(program, number)
        if cap is not None:
            steps.append(f"softcap {number_text(cap.limit)}")
            labels.append("softcap")
            if not math.isclose(cap.scale, 1.0):
                steps.append(f"* {number_text(cap.scale)}")
            number = cap.inner
            continue
        found = _step(program, number, names)
        if found is None:
            return Words(program.formula(captures=names), ("score",))
        text, label, number = found
        steps.append(text)
        labels += [label] if label else []
    if steps and steps[-1].startswith(("* ", "/ ")):  # the usual scale reads as one with the score
        steps[-1] = f"s {steps[-1]}"
        return Words(" -> ".join(reversed(steps)), tuple(dict.fromkeys(reversed(labels))))
    return Words(" -> ".join(["s", *reversed(steps)]), tuple(dict.fromkeys(reversed(labels))))


@dataclass(frozen=True)
class _Softcap:
    limit: float
    scale: float  # of what is capped
    inner: int


def _softcap(program: ScoreProgram, number: int) -> _Softcap | None:
    """`limit * tanh(x * scale / limit)`, as `folded` leaves it."""
    outer = program.statements[number]
    if outer.op != "mul":
        return None
    tanh, limit = (program.statements[operand] for operand in outer.operands)
    if tanh.op != "tanh" or limit.op != "const":
        return None
    inner = program.statements[tanh.operands[0]]
    factor = program.statements[inner.operands[1]] if inner.op in ("mul", "div") else None
    if factor is None or factor.op != "const" or not factor.attribute:
        return None
    scale = float(factor.attribute) if inner.op == "mul" else 1.0 / float(factor.attribute)
    return _Softcap(float(limit.attribute), scale * float(limit.attribute), inner.operands[0])  # type: ignore[arg-type]


def _step(program: ScoreProgram, number: int, names: tuple[str, ...]) -> tuple[str, str, int] | None:
    """(text, label, the statement before) of one operation on the score; None if the score enters it twice."""
    statement = program.statements[number]
    inner = [operand for operand in statement.operands if _reads_score(program)[operand]]
    if len(inner) != 1:
        return None
    if statement.op == "to_float":
        return "", "", inner[0]
    others = [operand for operand in statement.operands if operand != inner[0]]
    texts = [program.formula(operand, names) for operand in others]
    first = statement.operands[0] == inner[0]
    signs = {"add": "+", "mul": "*"} | ({"sub": "-", "div": "/"} if first else {})
    if statement.op in signs:
        label = _bias_label(program, others[0]) if statement.op in ("add", "sub") else ""
        operand = texts[0] if statement.op == "add" else bracketed(texts[0])
        return f"{signs[statement.op]} {operand}", label, inner[0]
    if len(statement.operands) == 1:
        return statement.op, statement.op, inner[0]
    infix = SCORE_OPS[statement.op].infix or f"{statement.op}({', '.join(f'{{{i}}}' for i in range(len(statement.operands)))})"
    shown = infix.format(*("x" if operand == inner[0] else program.formula(operand, names) for operand in statement.operands))
    return f"x -> {shown}" if "x" in shown else shown, statement.op, inner[0]


def _bias_label(program: ScoreProgram, number: int) -> str:
    """What an addend is: alibi (a slope a head times the distance) or bias."""
    statement = program.statements[number]
    if statement.op in ("mul", "neg"):
        letters = {index_letters(program, operand) for operand in statement.operands}
        if any("n" in each and "h" not in each for each in letters) and "h" in letters:
            return "alibi"
    return "bias"


@lru_cache(maxsize=1024)
def _reads_score(program: ScoreProgram) -> tuple[bool, ...]:
    found: list[bool] = []
    for statement in program.statements:
        found.append(statement.op == "score" or any(found[operand] for operand in statement.operands))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ the predicate


def mask_words(keep: ScoreProgram, captures: Sequence[str] = ()) -> Words:
    """The predicate as conditions on the query m and the key n that all hold, and what such masks are called."""
    parts = [_condition(keep, number, wanted, tuple(captures)) for number, wanted in _conditions(keep, keep.result, True)]
    found = dict(sorted(parts, key=lambda part: _ORDER.index(part[1])))  # text -> label
    texts = [f"({text})" if " or " in text and len(found) > 1 else text for text in found]
    return Words(" and ".join(texts), tuple(dict.fromkeys(found.values())))


_ORDER = ("causal", "window", "document", "padding", "mask")


def _conditions(keep: ScoreProgram, number: int, wanted: bool) -> list[tuple[int, bool]]:
    """The parts of a conjunction: statements and whether each must be true or false."""
    statement = keep.statements[number]
    if statement.op == "not":
        return _conditions(keep, statement.operands[0], not wanted)
    if (statement.op, wanted) in (("and", True), ("or", False)):
        return [part for operand in statement.operands for part in _conditions(keep, operand, wanted)]
    return [(number, wanted)]


def _condition(keep: ScoreProgram, number: int, wanted: bool, names: tuple[str, ...]) -> tuple[str, str]:
    statement = keep.statements[number]
    letters = index_letters(keep, number)
    if statement.op in _FLIPPED:
        op = statement.op if wanted else _FLIPPED[statement.op]
        form = not_negative(keep, op, statement.operands)
        simple = None if form is None or form.rest else _simple(form)
        if simple is not None:
            return simple
        sides = [keep.formula(operand, names) for operand in statement.operands]
        text = SCORE_OPS[op].infix.format(*map(bracketed, sides))  # type: ignore[union-attr]
        return text, _label(keep, op, statement.operands, letters)
    text = keep.formula(number, names)
    return text if wanted else f"not {bracketed(text)}", "padding" if letters in ("n", "bn") else "mask"


def _simple(form: Affine) -> tuple[str, str] | None:
    """A condition on m and n alone: `n <= m`, `m - n < 4096`, `n < 7`."""
    c = form.constant
    if (form.m, form.n) == (1, -1):
        return ("n <= m" if c == 0 else f"n <= m {'+' if c > 0 else '-'} {abs(c)}"), "causal"
    if (form.m, form.n) == (-1, 1):
        return ("n >= m" if c == 0 else f"m - n < {c + 1}"), "window"
    if (form.m, form.n) == (0, -1):
        return f"n < {c + 1}", "padding"
    if (form.m, form.n) == (0, 1):
        return f"n >= {-c}", "padding"
    return None


def _label(keep: ScoreProgram, op: str, operands: tuple[int, ...], letters: str) -> str:
    sides = [index_letters(keep, operand) for operand in operands]
    if op == "eq" and any("m" in side and "n" not in side for side in sides) and any("n" in side for side in sides):
        return "document"
    if "m" not in letters and "n" in letters:
        return "padding"
    form = not_negative(keep, op, operands)
    if form is not None and (form.m, form.n) in ((1, -1), (-1, 1)):
        return "causal" if form.m == 1 else "window"
    return "mask"
