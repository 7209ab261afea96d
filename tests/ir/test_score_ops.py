"""Every row of the table of score operations: value, derivative, interval rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import sympy
import torch
from torch import Tensor

from flashfuse.ir.derivative import differentiate
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import SCORE_OPS, Kind, ScoreOp
from flashfuse.ir.score_program import ScoreProgram, Statement, evaluate

ROWS = list(SCORE_OPS.values())
POSITIVE = ("log", "sqrt", "rsqrt")
NONZERO_LAST = ("div", "floordiv", "mod")


def philox_bits(seed: Any, b: Any, h: Any, m: Any, n: Any) -> Any:
    """16 bits of Philox 4x32-7 element for element, in Python's integers."""

    def bits(seed: int, b: int, h: int, m: int, n: int) -> int:
        low = 2**32 - 1
        c = [part & low for part in (n // 16 * 4 + n % 8 // 2, b, m // 16 * 8 + m % 8, h)]
        key = [seed & low, seed >> 32 & low]
        for _ in range(7):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [second >> 32 ^ c[1] ^ key[0], second & low, first >> 32 ^ c[3] ^ key[1], first & low]
            key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
        return c[2 * (n % 2) + n // 8 % 2] >> 16 * (m // 8 % 2) & 2**16 - 1

    return numpy.array([bits(*(int(x) for x in row)) for row in zip(seed, b, h, m, n, strict=True)])


# What the words of the `triton` templates mean, in numpy: an independent reading of each row.
TRITON_WORDS = {
    "tl": SimpleNamespace(
        exp=numpy.exp, log=numpy.log, sqrt=numpy.sqrt, rsqrt=lambda x: 1 / numpy.sqrt(x), abs=numpy.abs,
        sigmoid=lambda x: 1 / (1 + numpy.exp(-x)), where=numpy.where, sin=numpy.sin, cos=numpy.cos,
        erf=numpy.vectorize(math.erf),
    ),
    "random_bits": philox_bits, "tanh": numpy.tanh, "minimum": numpy.minimum, "maximum": numpy.maximum, "not_": numpy.logical_not,
    "floordiv": numpy.floor_divide, "floormod": numpy.mod,
    "to_float": lambda x: x.astype(numpy.float64), "to_int": lambda x: x.astype(numpy.int64),
}  # fmt: skip

# Rows whose derivative is one formula. Rows with a choice (abs, minimum, maximum, clamp_min, clamp_max, where) have no
# single one: their gradient is compared with autograd's, ties included, like that of all rows.
SYMBOLIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "exp": sympy.exp, "log": sympy.log, "sqrt": sympy.sqrt, "rsqrt": lambda a: 1 / sympy.sqrt(a),
    "tanh": sympy.tanh, "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)), "to_float": lambda a: a,
}  # fmt: skip


def kinds_of(row: ScoreOp) -> list[tuple[Kind, ...]]:
    """The combinations of operand kinds that a row takes."""
    free = (Kind.FLOAT, Kind.INT) if None in row.operands else (Kind.FLOAT,)
    return [tuple(kind or chosen for kind in row.operands) for chosen in free]


def samples(row: ScoreOp, kinds: tuple[Kind, ...], count: int = 400) -> list[Tensor]:
    """Operands within the row's domain; many pairs of floats and integers are equal."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for place, kind in enumerate(kinds):
        if kind is Kind.BOOL:
            values = torch.rand(count, generator=generator) < 0.5
        elif kind is Kind.INT:
            values = torch.randint(-7, 8, (count,), generator=generator)
        else:
            values = torch.randn(count, generator=generator, dtype=torch.float64)
            values[::3] = values[::3].round()
        if row.name in POSITIVE:
            values = values.abs() + 0.1
        if row.name in NONZERO_LAST and place == len(kinds) - 1:
            values = torch.where(values == 0, torch.ones_like(values), values)
        found.append(values)
    return found


def one_statement(row: ScoreOp, kinds: tuple[Kind, ...]) -> ScoreProgram:
    builder = Builder()
    return builder.program(builder.op(row.name, *(builder.leaf("load", i, kind) for i, kind in enumerate(kinds))))


def reading(values: list[Any], **more: Any) -> Callable[[Statement, list[Any]], Any]:
    return lambda statement, operands: more.get(statement.op, values[int(statement.attribute or 0)])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_value_is_what_the_kernel_text_says(row: ScoreOp) -> None:
    for kinds in kinds_of(row):
        values = samples(row, kinds)
        actual = evaluate(one_statement(row, kinds), reading(values), torch.float64)[0]
        names = [f"x{place}" for place in range(row.arity)]
        words = {**TRITON_WORDS, **dict(zip(names, (v.numpy() for v in values), strict=True))}
        expected = torch.as_tensor(eval(row.triton.format(*names), words))
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14, check_dtype=row.result is Kind.BOOL)
        for place in range(40):  # Python numbers instead of tensors
            numbers = [v[place].item() for v in values]
            alone = torch.as_tensor(evaluate(one_statement(row, kinds), reading(numbers), torch.float64)[0])
            torch.testing.assert_close(alone.to(actual.dtype), actual[place])


@pytest.mark.parametrize("row", [row for row in ROWS if row.grad is not None], ids=lambda row: row.name)
def test_gradient_against_autograd(row: ScoreOp) -> None:
    kinds = kinds_of(row)[0]
    values = [v.requires_grad_(v.is_floating_point()) for v in samples(row, kinds)]
    floats = [place for place, kind in enumerate(kinds) if kind is Kind.FLOAT]
    out = evaluate(one_statement(row, kinds), reading(values), torch.float64)[0]
    weight = torch.randn(out.shape, dtype=torch.float64)
    expected = torch.autograd.grad(out, [values[place] for place in floats], weight)
    derivative = differentiate(one_statement(row, kinds), tuple(floats))
    assert [number for number, _ in derivative.loads] == floats
    actual = evaluate(derivative.program, reading([v.detach() for v in values], grad=weight), torch.float64)[1:]
    for own, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(own, dtype=torch.float64).expand_as(theirs), theirs, rtol=1e-12, atol=1e-12)


def is_piecewise(row: ScoreOp) -> bool:
    """Whether the derivative chooses, so that it cannot be written over sympy symbols."""
    try:
        row.grad(*sympy.symbols(f"g out x:{row.arity}"))  # type: ignore[misc]
    except (StopIteration, TypeError):
        return True
    return False


@pytest.mark.parametrize("row", [row for row in ROWS if row.grad is not None], ids=lambda row: row.name)
def test_gradient_against_sympy(row: ScoreOp) -> None:
    assert row.grad is not None
    if is_piecewise(row):
        assert row.name not in SYMBOLIC
        pytest.skip("a choice: compared with autograd instead")
    symbols = sympy.symbols(f"x:{row.arity}", positive=True)
    g = sympy.Symbol("g")
    formula = SYMBOLIC[row.name](*symbols)
    for symbol, part in zip(symbols, row.grad(g, formula, *symbols), strict=True):
        assert sympy.simplify(part - g * sympy.diff(formula, symbol)) == 0


def random_intervals(kind: Kind, row: ScoreOp, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if kind is Kind.BOOL:
        ends = torch.rand(2, count, generator=generator) < 0.5
        return ends[0] & ends[1], ends[0] | ends[1]
    ends = torch.randint(-6, 7, (2, count), generator=generator)
    if kind is Kind.FLOAT:
        ends = ends.double() + torch.randint(0, 3, (2, count), generator=generator) / 4
    return ends.amin(0), ends.amax(0)


def inside(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """A random value of each interval, its ends more often than not."""
    if low.dtype is torch.bool:
        return low | (high & (torch.rand(low.shape, generator=generator) < 0.5))
    if not low.is_floating_point():
        return low + (torch.rand(low.shape, generator=generator) * (high - low + 1)).long()
    return low + (high - low) * torch.randint(0, 5, low.shape, generator=generator) / 4


@pytest.mark.parametrize("row", [row for row in ROWS if row.interval is not None], ids=lambda row: row.name)
def test_interval_rule_is_sound(row: ScoreOp) -> None:
    assert row.interval is not None
    generator = torch.Generator().manual_seed(5)
    for kinds in kinds_of(row):
        builder = Builder()
        bounds = [
            (builder.leaf("input", 2 * place, kind), builder.leaf("input", 2 * place + 1, kind))
            for place, kind in enumerate(kinds)
        ]
        low, high = row.interval(*bounds)
        assert isinstance(low, Value)
        program = builder.program(low, high)
        chosen = [random_intervals(kind, row, 1000, generator) for kind in kinds]
        flat = [end for pair in chosen for end in pair]
        low_value, high_value = evaluate(program, reading(flat), torch.float64)
        for _ in range(30):
            values = [inside(a, b, generator) for a, b in chosen]
            value = evaluate(one_statement(row, kinds), reading(values), torch.float64)[0]
            if value.dtype is torch.bool:
                assert not (low_value & ~value).any(), "certain, yet false"
                assert not (value & ~high_value).any(), "impossible, yet true"
            else:
                slack = 1e-12 if value.is_floating_point() else 0
                assert (low_value <= value + slack).all()
                assert (value <= high_value + slack).all()


def test_every_operation_of_a_mask_has_an_interval_rule() -> None:
    for row in ROWS:
        if row.result is Kind.BOOL and row.name != "to_bool":
            assert row.interval is not None, row.name
