"""Rows whose scores lie far from zero on either side: gradients are as in float64, and spellings that round there are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashfuse

LOWEST = torch.finfo(torch.float32).min
SEEN = torch.tensor([[True] * 5 + [False] * 7, [False] * 12] * 6)  # every other query sees no key


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), leaves)]


def high_constant(q, k, v):
    return torch.where(SEEN, q @ k.mT * 0.25, 1e30).softmax(-1) @ v


def negated_mask(q, k, v):
    return (-(q @ k.mT * 0.25).masked_fill(~SEEN, LOWEST)).softmax(-1) @ v


def size_of_a_mask(q, k, v):
    return (q @ k.mT * 0.25).masked_fill(~SEEN, LOWEST).abs().softmax(-1) @ v


def high_bias(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def low_mask(q, k, v):
    return (q @ k.mT * 0.25).masked_fill(~SEEN, LOWEST).softmax(-1) @ v


@pytest.mark.parametrize("function", [high_constant, negated_mask, size_of_a_mask, high_bias, low_mask], ids=lambda f: f.__name__)
def test_rows_far_from_zero_are_right(function: Callable):
    inputs = [torch.randn(2, 12, 16) for _ in range(3)]
    if function is high_bias:
        inputs.append(torch.where(SEEN, 0.0, 1e30).expand(2, 12, 12).clone())
    assert len(flashfuse.explain(function, *inputs).fused) == 1
    found = gradients(torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"}), inputs)
    exact = gradients(function, [tensor.double() for tensor in inputs])
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=2e-5, rtol=1e-5)


def subtracted(x: Tensor, v: Tensor) -> Tensor:
    return (x - x.logsumexp(-1, keepdim=True)).exp() @ v


def subtracted_causal(q, k, v):
    never = torch.full((12, 12), float("-inf")).triu(1)
    return subtracted(q @ k.mT * 0.25 + never, v)


def subtracted_softcap(q, k, v):
    return subtracted(5.0 * torch.tanh(q @ k.mT / 20.0), v)


def subtracted_masked(q, k, v):
    return subtracted((q @ k.mT * 0.25).masked_fill(~SEEN, LOWEST), v)


def subtracted_biased(q, k, v):
    return subtracted(q @ k.mT * 0.25 + torch.where(v.sum(-1)[:, None] > 0, 0.0, LOWEST), v)


@pytest.mark.parametrize(
    ("function", "fused"),
    [(subtracted_causal, 1), (subtracted_softcap, 1), (subtracted_masked, 0), (subtracted_biased, 0)],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_logarithm_that_is_rounded_away_is_refused(function: Callable, fused: int):
    """Where all scores of a row are the lowest number, their logsumexp is that number too, and each exponential is one."""
    inputs = [torch.randn(2, 12, 16) for _ in range(3)]
    report = flashfuse.explain(function, *inputs)
    assert [refusal.code for refusal in report.refusals] == ["FF402"] * (1 - fused)
    assert len(report.fused) == fused
    found = gradients(torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"}), inputs)
    for mine, eager in zip(found, gradients(function, inputs), strict=True):
        torch.testing.assert_close(mine, eager, atol=2e-5, rtol=1e-4)


def zero_times_minus_infinity(q, k, v):
    return ((q @ k.mT).masked_fill(~SEEN, float("-inf")) * 0.0 + 0.5).softmax(-1).nan_to_num(0.0) @ v


def minus_infinity(q, k, v):
    return (q @ k.mT).masked_fill(~SEEN, float("-inf")).softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize(("function", "fused"), [(zero_times_minus_infinity, 0), (minus_infinity, 1)])
def test_nan_that_becomes_zero(function: Callable, fused: int):
    inputs = [torch.randn(2, 12, 16) for _ in range(3)]
    assert len(flashfuse.explain(function, *inputs).fused) == fused
    found = torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"})(*inputs)
    torch.testing.assert_close(found, function(*inputs), atol=2e-5, rtol=1e-4)
