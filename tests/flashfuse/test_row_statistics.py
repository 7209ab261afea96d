"""`torch.logsumexp` of an attention's own scores: the kernel's row statistic, with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashfuse

B, H, S, D = 2, 4, 24, 16
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def causal() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v, torch.logsumexp(scores, dim=-1)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT * 0.25).masked_fill(~causal(), float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.exp(scores - lse) @ v, lse


def transposed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bhmd,bhnd->bmhn", q, k).mul(0.25).tanh()
    return torch.einsum("bmhn,bhne->bmhe", scores.softmax(-1), v), scores.logsumexp(-1) * 2.0


def rows_without_keys(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keep = causal() & (torch.arange(S) > 5)[:, None]
    scores = (q @ k.mT * 0.25).masked_fill(~keep, LOWEST)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def results(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    torch.manual_seed(1)
    out, lse = function(*leaves)
    weights = [torch.randn(each.shape, dtype=torch.float64).to(each.dtype) for each in (out, lse)]
    finite = torch.where(lse > -1e30, lse, 0.0)  # the gradient of a row of finfo.min alone is no number anybody wants
    total = (out * weights[0]).sum() + (finite * weights[1]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def compiled(function: Callable, **more: object) -> Callable:
    return torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"}, **more)  # type: ignore[call-overload]


def assert_as_exact_as_eager(function: Callable, ours: list[Tensor], inputs: list[Tensor]) -> None:
    eager = results(function, inputs)
    exact = results(function, [tensor.double() for tensor in inputs])
    for mine, same, best in zip(ours, eager, exact, strict=True):
        assert (mine.dtype, mine.shape) == (same.dtype, same.shape)
        finite = best > -1e30
        assert torch.equal(mine > -1e30, finite)
        mine, same, best = (torch.where(finite, each.double(), 0.0) for each in (mine, same, best))
        allowed = 2 * (same - best).abs().max() + 2e-6 * best.abs().max()
        assert (mine - best).abs().max() <= allowed


@pytest.mark.parametrize(
    ("function", "kernels"),
    [(plain, False), (by_hand, False), (transposed, False), (rows_without_keys, False),
     (by_hand, True), (rows_without_keys, True)],
)  # fmt: skip
def test_the_kernels_statistic_serves(function: Callable, kernels: bool, monkeypatch: pytest.MonkeyPatch):
    if kernels:
        launch = pytest.importorskip("flashfuse.codegen.launch")
        if not launch.interpreting():
            pytest.skip("runs in Triton's interpreter")
        monkeypatch.setenv("FLASHFUSE_INTERPRET", "1")
        monkeypatch.setenv("FLASHFUSE_STRICT", "1")
    inputs = [torch.randn(B, H, S, D) for _ in range(3)]
    ours = results(compiled(function), inputs)
    assert torch._dynamo.utils.counters["flashfuse"] == {"fused": 1}  # and no scores or probabilities are also made
    assert_as_exact_as_eager(function, ours, inputs)


def test_it_alone_may_have_a_gradient():
    inputs = [torch.randn(B, H, S, D, requires_grad=True) for _ in range(3)]
    function = compiled(plain, dynamic=True)
    lse = function(*inputs)[1]
    assert torch._dynamo.utils.counters["flashfuse"] == {"fused": 1}
    found = torch.autograd.grad(lse.square().sum(), inputs[:2])
    wanted = torch.autograd.grad(plain(*inputs)[1].square().sum(), inputs[:2])
    torch.testing.assert_close(found, wanted)
    out, lse = function(*inputs)
    lse.detach().mul_(0.0)  # the user's own tensor, not the one that the backward reads
    wanted = torch.autograd.grad(plain(*inputs)[0].sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs), wanted)


def test_it_is_said():
    report = flashfuse.explain(plain, *(torch.randn(B, H, S, D) for _ in range(3)))
    assert report.sites[0].spec.logsumexp
    assert "the kernel's own" in dict(report.sites[0].notes)["lse"]


# ------------------------------------------------------------------------------------------------ near misses


def of_other_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v, scores.logsumexp(-2)


def of_scores_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    return scores.masked_fill(~causal(), float("-inf")).softmax(-1) @ v, scores.logsumexp(-1)


def of_scores_less_their_maximum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def of_rows_of_minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keep = causal() & (torch.arange(S) > 5)[:, None]
    scores = (q @ k.mT * 0.25).masked_fill(~keep, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def used_before_the_output(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    lse = scores.logsumexp(-1)
    return scores.softmax(-1) @ (v * lse.mean()), lse


def written_into(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1) @ v
    lse.mul_(2.0)
    return out, lse


@pytest.mark.parametrize(
    "function",
    [of_other_rows, of_scores_before_the_mask, of_scores_less_their_maximum, of_rows_of_minus_infinity,
     used_before_the_output, written_into],
)  # fmt: skip
def test_any_other_logsumexp_is_left_to_the_graph(function: Callable):
    inputs = [torch.randn(B, H, S, D) for _ in range(3)]
    ours = compiled(function)(*inputs)
    assert torch._dynamo.utils.counters["flashfuse"] == {"fused": 1, "scores also made": 1}
    torch.testing.assert_close(ours, function(*inputs), equal_nan=True)
