"""Distances compared apart, or both ends of a window of one difference: the same predicate, at less cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.ir.score_program import evaluate as evaluate_program
from flashfuse.ir.separate import separated

FORMS: dict[str, Callable[[Value, Value], Value]] = {
    "m - n < 4": lambda m, n: m - n < 4,
    "m - n <= 4": lambda m, n: m - n <= 4,
    "n - m > -4": lambda m, n: n - m > -4,
    "4 > m - n": lambda m, n: n.apply("gt", 4, m - n),
    "n - m + 2 >= 1": lambda m, n: (n - m) + 2 >= 1,
    "m + n < 9": lambda m, n: m + n < 9,
    "9 - m < n + 0": lambda m, n: n.apply("lt", 9 - m, n),
    "-m - n >= -9": lambda m, n: -m - n >= -9,
}
WINDOWS: dict[str, Callable[[Value, Value], Value]] = {
    "two distances": lambda m, n: m.apply("not", (m - n < 0) | (m - n >= 4)),
    "one distance": lambda m, n: (n <= m) & (m - n < 4),
    "no distance": lambda m, n: (n <= m) & (n > m - 4),
    "both sides": lambda m, n: (m - n < 4) & (n - m < 4),
    "and another form": lambda m, n: (n <= m) & (m - n < 4) & (m + n < 15),
}


def program(form: Callable[[Value, Value], Value]) -> ScoreProgram:
    builder = Builder()
    return builder.program(form(builder.leaf("index", "m"), builder.leaf("index", "n")))


def evaluate(keep: ScoreProgram) -> torch.Tensor:
    m, n = torch.arange(12)[:, None], torch.arange(12)[None, :]
    return evaluate_program(keep, lambda leaf, _operands: m if leaf.attribute == "m" else n)[0].expand(12, 12)


def joins(keep: ScoreProgram) -> int:
    """How many integers depend on a query and a key."""
    return sum({"m", "n"} <= set(index_letters(keep, number)) and statement.kind.value != "bool"
               for number, statement in enumerate(keep.statements))  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_same_predicate_without_a_difference(name: str) -> None:
    keep = program(FORMS[name])
    apart = separated(keep)
    assert torch.equal(evaluate(apart), evaluate(keep))
    assert joins(apart) == 0


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_of_one_difference(name: str) -> None:
    keep = program(WINDOWS[name])
    together = separated(keep)
    assert torch.equal(evaluate(together), evaluate(keep))
    assert joins(together) == 1


@pytest.mark.parametrize(("name", "form"), [
    ("m * n < 4", lambda m, n: m * n < 4),
    ("(m - n) // 4 < 2", lambda m, n: m.apply("floordiv", m - n, 4) < 2),
    ("2 m - n < 4", lambda m, n: m + m - n < 4),
    ("m - n == 4", lambda m, n: (m - n).eq(4)),
    ("m - n < 2 ** 31", lambda m, n: m - n < 2**31),
])  # fmt: skip
def test_what_is_no_distance_stays(name: str, form: Callable[[Value, Value], Value]) -> None:
    keep = program(form)
    assert separated(keep) == keep
    assert joins(keep)
