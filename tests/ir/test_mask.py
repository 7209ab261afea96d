"""split_mask: predicate and mask-free score of every way to write a mask."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashfuse.ir.mask import LOW_SCORE, split_mask
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram

sys.path.insert(0, str(Path(__file__).parent))
from programs import Predicates, on_grid

M, N = 9, 11
LOWEST = torch.finfo(torch.float32).min
HALF_LOWEST = torch.finfo(torch.float16).min
NEVER = -math.inf


class Leaves:
    """A builder with leaves at hand."""

    def __init__(self) -> None:
        self.builder = Builder()
        self.s = self.builder.leaf("score")
        self.m, self.n = self.builder.leaf("index", "m"), self.builder.leaf("index", "n")
        self.causal = self.n <= self.m
        self.later = self.n > self.m
        self.near = self.m - self.n < 4
        self.bias = self.builder.leaf("load", 0, Kind.FLOAT, (self.m, self.n))
        self.padding = self.builder.leaf("load", 1, Kind.BOOL, (self.n,))

    def where(self, condition: Value, a: Value | float, b: Value | float) -> Value:
        first = self.builder.const(a) if isinstance(a, float) else a
        return self.builder.op("where", condition, first, b)

    def additive(self, keep: Value, fill: float) -> Value:
        return self.where(keep, 0.0, fill)


def _causal(s: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    return torch.arange(N)[None, :] <= torch.arange(M)[:, None]


def _near(s: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    return torch.arange(M)[:, None] - torch.arange(N)[None, :] < 4


def _padded(s: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    return _causal(s, bias, padding) & padding


def _both(s: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    return _causal(s, bias, padding) & _near(s, bias, padding)


# name: (final score, kept elements, score of a kept element)
SPELLINGS: dict[str, tuple[Callable[[Leaves], Value], Callable, Callable]] = {
    "where": (lambda x: x.where(x.causal, x.s * 0.5, NEVER), _causal, lambda s, b: s * 0.5),
    "masked_fill": (lambda x: x.where(x.later, NEVER, x.s * 0.5), _causal, lambda s, b: s * 0.5),
    "masked_fill_finite": (lambda x: x.where(x.later, -1e9, x.s * 0.5), _causal, lambda s, b: s * 0.5),
    "half_minimum": (lambda x: x.where(x.later, HALF_LOWEST, x.s * 0.5), _causal, lambda s, b: s * 0.5),
    "additive": (lambda x: x.s * 0.5 + x.additive(x.causal, NEVER), _causal, lambda s, b: s * 0.5),
    "additive_first": (lambda x: x.additive(x.causal, LOWEST) + x.s * 0.5, _causal, lambda s, b: s * 0.5),
    "additive_product": (lambda x: x.s + x.where(x.causal, 0.0, 1.0) * -1e9, _causal, lambda s, b: s),
    "additive_and_bias": (lambda x: x.s + (x.bias + x.additive(x.causal, NEVER)), _causal, lambda s, b: s + b),
    "masked_bias": (lambda x: x.s + x.where(x.causal, x.bias, LOWEST), _causal, lambda s, b: s + b),
    "bias_after": (lambda x: x.where(x.causal, x.s, NEVER) + x.bias, _causal, lambda s, b: s + b),
    "minus_bias": (lambda x: x.where(x.causal, x.s, NEVER) - x.bias, _causal, lambda s, b: s - b),
    "scaled_after": (lambda x: x.where(x.causal, x.s, NEVER) * 0.25, _causal, lambda s, b: s * 0.25),
    "divided_after": (lambda x: x.where(x.causal, x.s, LOWEST) / 4.0, _causal, lambda s, b: s / 4.0),
    "max_with_lowest": (
        lambda x: x.builder.op("maximum", x.s + x.additive(x.causal, LOWEST), LOWEST), _causal, lambda s, b: s
    ),
    "clamped_at_lowest": (
        lambda x: x.builder.op("clamp_min", x.where(x.causal, x.s, NEVER), LOWEST), _causal, lambda s, b: s
    ),
    "nested": (lambda x: x.where(x.near, x.where(x.causal, x.s, NEVER), NEVER), _both, lambda s, b: s),
    "two_additive": (
        lambda x: x.s + x.additive(x.causal, LOWEST) + x.additive(x.near, LOWEST), _both, lambda s, b: s
    ),
    "where_then_additive": (
        lambda x: x.where(x.later, NEVER, x.s * 0.5) + x.additive(x.padding, -1e9), _padded, lambda s, b: s * 0.5
    ),
    "two_different_fills": (
        lambda x: x.where(x.causal, x.where(x.padding, x.s, -1e9), NEVER), _padded, lambda s, b: s
    ),
}  # fmt: skip


def assert_equal_softmax(program: ScoreProgram, leaves: dict) -> int:
    """Whole program and split agree in every row with an ordinary kept key; how many rows that were."""
    split = split_mask(program)
    assert split.keep is not None
    whole, kept = on_grid(program, M, N, **leaves), on_grid(split.kept, M, N, **leaves)
    masked = torch.where(on_grid(split.keep, M, N, **leaves), kept, NEVER)
    ordinary = masked.amax(-1) > LOW_SCORE
    torch.testing.assert_close(masked.softmax(-1)[ordinary], whole.softmax(-1)[ordinary], rtol=1e-12, atol=1e-30)
    return int(ordinary.sum())


def make_leaves(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(M, N, generator=generator).double()
    padding = torch.rand(N, generator=generator) < 0.7
    return {
        "score": torch.randn(M, N, generator=generator).double() * 10, "captures": [bias, padding], "sizes": [3]
    }  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    write, keep, kept = SPELLINGS[name]
    x = Leaves()
    program = x.builder.program(write(x))
    split = split_mask(program)
    leaves = make_leaves(1)
    s, (bias, padding) = leaves["score"], leaves["captures"]
    assert split.keep is not None
    expected = keep(s, bias, padding)
    assert torch.equal(on_grid(split.keep, M, N, **leaves), expected.expand(M, N))
    torch.testing.assert_close(on_grid(split.kept, M, N, **leaves)[expected], kept(s, bias)[expected])
    assert not split.kept.uses("where")
    assert assert_equal_softmax(program, leaves) > 0
    dropped = on_grid(program, M, N, **leaves)[~expected]
    if name not in ("bias_after", "minus_bias", "additive", "additive_first", "two_additive", "additive_product",
                    "additive_and_bias", "where_then_additive"):  # fmt: skip
        assert (dropped <= split.fill).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.where(x.causal, x.s, -10000.0),  # a score can come near to it
        lambda x: x.s + x.additive(x.causal, -10000.0),
        lambda x: x.where(x.causal, x.s, -1e9) * 1e-6,  # the scale brings the fill back among scores
        lambda x: x.where(x.causal, x.s, LOWEST) * -1.0,
        lambda x: x.where(x.causal, x.s, x.s * 2.0),
        lambda x: x.builder.op("tanh", x.where(x.causal, x.s, NEVER)),
        lambda x: x.builder.op("maximum", x.where(x.causal, x.s, NEVER), -10.0),
        lambda x: x.s * x.bias,
        lambda x: x.s,
    ],
)
def test_not_a_mask(write: Callable[[Leaves], Value]) -> None:
    x = Leaves()
    program = x.builder.program(write(x))
    split = split_mask(program)
    assert split.keep is None
    assert split.kept == program


@pytest.mark.parametrize("seed", range(200))
def test_random_nests_of_masks(seed: int) -> None:
    """Random predicates in random layers of where, additive masks, biases and scales."""
    make = Predicates(seed)
    x = Leaves()
    chance = make.random
    value = x.s * 0.5
    for _ in range(chance.randint(1, 4)):
        keep = x.builder.include(make.builder.program(make.predicate(1)))[-1]
        fill = chance.choice((NEVER, LOWEST, -1e9, HALF_LOWEST))
        layer = chance.choice(("where", "drop", "add", "bias", "scale"))
        if layer == "where":
            value = x.where(keep, value, fill)
        elif layer == "drop":
            value = x.where(x.builder.op("not", keep), fill, value)
        elif layer == "add":
            value = value + x.additive(keep, fill)
        else:
            value = value + x.bias if layer == "bias" else value * 0.75
    program = x.builder.program(value)
    if split_mask(program).keep is not None:
        assert_equal_softmax(program, make_leaves(seed))


def test_choice_between_two_masked_scores() -> None:
    x = Leaves()
    first, second = x.where(x.causal, x.s, NEVER), x.where(x.near, x.s * 2.0, LOWEST)
    program = x.builder.program(x.where(x.padding, first, second))
    assert assert_equal_softmax(program, make_leaves(2)) > 0
