"""The score with its scale taken out, and distances as differences of floats: the same values, at less cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from flashfuse.ir.cheaper import LONGEST, factored, positions_in_float, subtracts_positions
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, Statement
from flashfuse.ir.score_program import evaluate as evaluate_program


class Leaves:
    """A builder's score, indices and captures: `c` a number a head, `r` one a row, `t` one an element."""

    def __init__(self) -> None:
        self.builder = Builder()
        self.b, self.h, self.m, self.n = (self.builder.leaf("index", letter) for letter in "bhmn")
        self.s = self.builder.leaf("score")
        self.c = self.builder.leaf("load", 0, Kind.FLOAT, [self.h])
        self.r = self.builder.leaf("load", 1, Kind.FLOAT, [self.m])
        self.t = self.builder.leaf("load", 2, Kind.FLOAT, [self.m, self.n])

    def float(self, value: Value) -> Value:
        return self.builder.op("to_float", value)


Form = Callable[[Leaves], Value]
FACTORED: dict[str, tuple[Form, float]] = {
    "plain": (lambda p: p.s, 1.0),
    "scale": (lambda p: p.s * 0.125, 0.125),
    "two scales": (lambda p: p.s * 0.5 / 4.0, 0.125),
    "softcap": (lambda p: p.builder.op("tanh", p.s * 0.125 / 30.0) * 30.0, 30.0),
    "bias a row": (lambda p: p.s * 0.125 + p.r, 0.125),
    "alibi": (lambda p: p.s * 0.125 + p.c * p.float(p.n - p.m), 0.125),
    "alibi before": (lambda p: p.float(p.m - p.n) * p.c - p.s / 8.0, 0.125),
    "alibi minus": (lambda p: p.s / 8.0 - p.c * p.float(p.m - p.n), 0.125),
    "bias an element": (lambda p: p.s * 0.125 + p.t, 1.0),
    "bias an element, weighed": (lambda p: p.s * 0.125 + p.t * p.c, 0.125),
    "capped and biased": (lambda p: p.builder.op("tanh", p.s) * 30.0 + p.r, 1.0),
    "negative scale": (lambda p: p.s * -0.125, 1.0),
    "no scale": (lambda p: p.s * 0.0, 1.0),
    "tiny scale": (lambda p: p.s * 1e-30, 1.0),
    "infinite": (lambda p: p.s / 0.0, 1.0),
    "scale a head": (lambda p: p.s * p.c, 1.0),
}
DISTANCES: dict[str, Form] = {
    "n - m": lambda p: p.float(p.n - p.m),
    "m - n + 3": lambda p: p.float(p.m - p.n + 3),
    "|n - m|": lambda p: p.float(p.builder.op("abs", p.n - p.m)),
    "|n - m - 5|": lambda p: p.float(p.builder.op("abs", p.n - 5 - p.m)),
}
NO_DISTANCES: dict[str, Form] = {
    "n": lambda p: p.float(p.n),
    "n + m": lambda p: p.float(p.n + p.m),
    "2 n - m": lambda p: p.float(p.n + p.n - p.m),
    "n - m + h": lambda p: p.float(p.n - p.m + p.h),
    "n - m // 2": lambda p: p.float(p.n - p.builder.op("floordiv", p.m, 2)),
    "far": lambda p: p.float(p.n - p.m + 2**23),
    "(n - m) ** 2": lambda p: p.float((p.n - p.m) * (p.n - p.m)),
}


def evaluate(program: ScoreProgram, start: int = 0) -> torch.Tensor:
    """For 3 heads, 7 rows and 9 columns, positions from `start` on, in float64."""
    torch.manual_seed(0)
    score, a_head, a_row, an_element = torch.randn(3, 7, 9), torch.randn(3, 1, 1), torch.randn(7, 1), torch.randn(7, 9)
    loads = (a_head, a_row, an_element)
    m, n = start + torch.arange(7)[:, None], torch.arange(9)[None, :]
    indices = {"b": torch.tensor(0), "h": torch.arange(3)[:, None, None], "m": m, "n": n}

    def leaf(statement: Statement, _operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if statement.op == "index":
            return indices[str(statement.attribute)]
        return (score if statement.op == "score" else loads[int(statement.attribute)]).double()  # type: ignore[arg-type]

    return evaluate_program(program, leaf)[0].double().expand(3, 7, 9)


def program_of(form: Form) -> ScoreProgram:
    leaves = Leaves()
    return leaves.builder.program(form(leaves))


@pytest.mark.parametrize("name", FACTORED)
def test_the_scale_times_what_is_left_is_the_score(name: str) -> None:
    form, wanted = FACTORED[name]
    program = program_of(form)
    scale, inner = factored(program)
    assert math.isclose(scale, wanted)
    torch.testing.assert_close(evaluate(inner) * scale, evaluate(program), equal_nan=True)


def test_constants_in_a_row_are_one() -> None:
    _scale, inner = factored(program_of(FACTORED["softcap"][0]))
    assert [statement.op for statement in inner.statements] == ["score", "const", "mul", "tanh"]


def test_constants_that_are_not_ordinary_stay_apart() -> None:
    inner = program_of(lambda p: p.builder.op("tanh", p.s * 1e30 * 1e-30))
    assert factored(inner) == (1.0, inner)


@pytest.mark.parametrize("start", [0, 1000, LONGEST - 8])
@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_the_same_floats(name: str, start: int) -> None:
    program = program_of(DISTANCES[name])
    apart = positions_in_float(program)
    assert subtracts_positions(program)
    assert torch.equal(evaluate(apart, start), evaluate(program, start))
    assert not any(s.kind is Kind.INT and {"m", "n"} <= set(index_letters(apart, i)) for i, s in enumerate(apart.statements))


@pytest.mark.parametrize("name", NO_DISTANCES)
def test_other_integers_stay(name: str) -> None:
    program = program_of(NO_DISTANCES[name])
    assert positions_in_float(program) == program
    assert not subtracts_positions(program)
