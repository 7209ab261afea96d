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


def beside_a_sink(q, k, v):
    x = (q @ k.mT * 0.25).masked_fill(~SEEN, LOWEST).abs()
    return torch.cat([x, torch.zeros_like(x[..., :1])], -1).softmax(-1)[..., :-1] @ v


def ten_thousand(q, k, v):
    return (q @ k.mT * 0.25).masked_fill(~SEEN, -1e4).softmax(-1) @ v


def cubed(q, k, v):
    x = q @ k.mT
    return (x * x * x).softmax(-1) @ v


def high_bias(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def low_mask(q, k, v):
    return (q @ k.mT * 0.25).masked_fill(~SEEN, LOWEST).softmax(-1) @ v


FAR = [high_constant, negated_mask, size_of_a_mask, high_bias, low_mask, beside_a_sink, ten_thousand]


@pytest.mark.parametrize("function", FAR, ids=lambda f: f.__name__)
def test_rows_far_from_zero_are_right(function: Callable):
    inputs = [torch.randn(2, 12, 16) for _ in range(3)]
    if function is high_bias:
        inputs.append(torch.where(SEEN, 0.0, 1e30).expand(2, 12, 12).clone())
    assert len(flashfuse.explain(function, *inputs).fused) == 1
    found = gradients(torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"}), inputs)
    exact = gradients(function, [tensor.double() for tensor in inputs])
    for mine, eager, right in zip(found, gradients(function, inputs), exact, strict=True):
        allowed = 2 * (eager.double() - right).abs().max() + 2e-5 * max(1.0, right.abs().max())
        assert (mine.double() - right).abs().max() <= allowed


def test_a_steep_function_of_ordinary_scores():
    inputs = [torch.randn(2, 12, 16) for _ in range(3)]
    inputs[1][:, 1] = inputs[1][:, 0]  # two equal keys, whose scores with the first query are some 30, and their cubes 30,000:
    inputs[0][:, 0] = 2.0 * inputs[1][:, 0]  # beside that float32 does not hold the logarithm of two
    found = gradients(torch.compile(cubed, backend="flashfuse", options={"inner": "aot_eager"}), inputs)
    exact = gradients(cubed, [tensor.double() for tensor in inputs])
    torch.testing.assert_close(found[3].double(), exact[3], atol=2e-5, rtol=1e-5)  # the value's gradient: sums of probabilities


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


def ten_thousand_and_minus_infinity(q, k, v):
    causal = torch.full((12, 12), float("-inf")).triu(1)
    return (ten_thousand_less(q, k) + causal).softmax(-1).nan_to_num(0.0) @ v


def ten_thousand_less(q, k):
    return (q @ k.mT).masked_fill(~SEEN, -1e4)


def only_ten_thousand(q, k, v):
    return ten_thousand_less(q, k).softmax(-1).nan_to_num(0.0) @ v


def logarithm_of_what_may_be_zero(q, k, v):
    return (q @ k.mT).relu().log().softmax(-1).nan_to_num(0.0) @ v


NAN_TO_ZERO = [
    (zero_times_minus_infinity, 0), (minus_infinity, 1), (only_ten_thousand, 1), (ten_thousand_and_minus_infinity, 0),
    (logarithm_of_what_may_be_zero, 0),
]  # fmt: skip


@pytest.mark.parametrize(("function", "fused"), NAN_TO_ZERO)
def test_nan_that_becomes_zero(function: Callable, fused: int):
    inputs = [torch.randn(2, 12, 16) for _ in range(3)]
    assert len(flashfuse.explain(function, *inputs).fused) == fused
    found = torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"})(*inputs)
    torch.testing.assert_close(found, function(*inputs), atol=2e-5, rtol=1e-4)


def test_zeros_in_the_place_of_nan():
    """A row without keys is zero, one whose keys all have a bias of -inf is NaN (CPM-Ant), and gradients as in eager code."""
    bias = torch.randn(2, 12, 12)
    bias[0, 4] = float("-inf")

    def biased(q, k, v, bias):
        x = (q @ k.mT * 0.25 + bias).masked_fill(~SEEN, float("-inf"))
        return x.softmax(-1).masked_fill(~SEEN, 0.0) @ v

    inputs = [*(torch.randn(2, 12, 16) for _ in range(3)), bias]
    assert len(flashfuse.explain(biased, *inputs).fused) == 1
    found = gradients(torch.compile(biased, backend="flashfuse", options={"inner": "aot_eager"}), inputs)
    expected = gradients(biased, inputs)
    assert expected[0][0, 4].isnan().all()
    assert not expected[0][1].isnan().any()
    assert not expected[0][:, 1::2].any()  # these see no key
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager, atol=2e-5, rtol=1e-4, equal_nan=True)
