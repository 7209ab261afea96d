"""Gradients stop where the model stops them, and flow on both ways where probabilities or scores are also wanted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flashfuse

B, H, S, D = 2, 4, 12, 16
INNER = {"inner": "aot_eager"}
PLACES = torch.arange(B * S * S).reshape(B, S, S) % 9


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def run(function: Callable, *inputs: torch.Tensor) -> list[torch.Tensor | None]:
    """Outputs and the gradient of every input, None where there is none."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in out if o.requires_grad).backward()
    return [*(o.detach() for o in out), *(leaf.grad for leaf in leaves)]


def check(function: Callable, *inputs: torch.Tensor, counts: dict[str, int], options: dict | None = None) -> None:
    ours = run(torch.compile(function, backend="flashfuse", options=options or INNER), *inputs)
    assert dict(torch._dynamo.utils.counters["flashfuse"]) == counts
    eager = run(function, *inputs)
    exact = run(function, *(t.double() for t in inputs))
    for mine, same, best in zip(ours, eager, exact, strict=True):
        assert (mine is None) == (same is None)
        if mine is not None and same is not None and best is not None:
            allowed = 2 * (same - best).abs().max() + 4e-6 * best.abs().max()
            assert (mine - best).abs().max() <= allowed


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def detached_query(q, k, v):
    return (q.detach() @ k.mT * 0.25).softmax(-1) @ v


def query_scaled_without_grad(q, k, v):
    with torch.no_grad():
        q = q * 0.25
    return (q @ k.mT).softmax(-1) @ v


def query_viewed_without_grad(q, k, v):
    with torch.no_grad():
        q = q.transpose(1, 2)
    return (q.transpose(1, 2) @ k.mT * 0.25).softmax(-1) @ v


def detached_bias(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias.detach()).softmax(-1) @ v


def detached_maximum(q, k, v):
    x = q @ k.mT * 0.25
    e = (x - x.detach().amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def bias_of_scores_without_grad(q, k, v):
    with torch.no_grad():
        bias = (q @ k.mT).relu()
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def bias_from_a_table(q, k, v, table):
    """LayoutLMv3, whose bias is read under `no_grad`; here it gets its gradient."""
    return (q @ k.mT * 0.25 + table.t()[PLACES].permute(0, 3, 1, 2)).softmax(-1) @ v


def bias_from_a_table_without_grad(q, k, v, table):
    with torch.no_grad():
        bias = table.t()[PLACES].permute(0, 3, 1, 2)
    return (q @ k.mT * 0.25 + bias.contiguous()).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [detached_query, query_scaled_without_grad, query_viewed_without_grad, detached_bias, detached_maximum,
     bias_of_scores_without_grad, bias_from_a_table, bias_from_a_table_without_grad],
)  # fmt: skip
def test_what_is_detached_gets_no_gradient(function: Callable):
    tables = {detached_bias: (H, S, S), bias_from_a_table: (H, 9), bias_from_a_table_without_grad: (H, 9)}
    more = (torch.randn(tables[function]),) if function in tables else ()
    check(function, *qkv(), *more, counts={"fused": 1})


def detached_scores(q, k, v):
    return (q @ k.mT * 0.25).detach().softmax(-1) @ v


def detached_probabilities(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1).detach() @ v


def scores_without_grad(q, k, v):
    with torch.no_grad():
        x = q @ k.mT * 0.25
    return x.softmax(-1) @ v


def detached_sum(q, k, v):
    e = (q @ k.mT * 0.25).exp()
    return (e @ v) / e.sum(-1, keepdim=True).detach()


def detached_logsumexp(q, k, v):
    x = q @ k.mT * 0.25
    return (x - x.logsumexp(-1, keepdim=True).detach()).exp() @ v


@pytest.mark.parametrize(
    "function", [detached_scores, detached_probabilities, scores_without_grad, detached_sum, detached_logsumexp]
)
def test_an_attention_with_another_gradient_is_left_alone(function: Callable):
    check(function, *qkv(), counts={"refused": 1})


# ------------------------------------------------------------------------------------------------ also wanted


def probabilities_returned(q, k, v):
    p = (q @ k.mT * 0.25).softmax(-1)
    return p @ v, p


def loss_on_probabilities(q, k, v):
    p = (q @ k.mT * 0.25).softmax(-1)
    return p @ v, -(p * (p + 1e-6).log()).sum(-1)


@pytest.mark.parametrize("function", [probabilities_returned, loss_on_probabilities])
def test_output_is_fused_and_probabilities_are_made_as_before(function: Callable):
    check(function, *qkv(), counts={"fused": 1, "probabilities also made": 1})


def test_output_is_fused_and_scores_are_made_as_before():
    def function(q, k, v):
        x = q @ k.mT * 0.25
        return x.softmax(-1) @ v, x.sigmoid()

    check(function, *qkv(), counts={"fused": 1, "scores also made": 1})


def test_one_softmax_for_two_values():
    def function(q, k, v, w):
        p = (q @ k.mT * 0.25).softmax(-1)
        return p @ v, p @ w

    check(function, *qkv(), torch.randn(B, H, S, D), counts={"fused": 2})


def test_probabilities_with_inductor():
    """What is left of the original is fenced from Inductor's own attention matcher, and nothing is misread."""

    def function(q, k, v):
        p = (q @ k.mT / 4.0).softmax(-2)
        r = (q @ k.mT / 4.0).softmax(-1)
        return r @ v, p @ v, r

    check(function, *qkv(), counts={"fused": 1, "refused": 1, "probabilities also made": 1}, options={"inner": "inductor"})


@pytest.mark.parametrize("average", [False, True], ids=["by head", "averaged"])
def test_attention_weights_of_the_module(average: bool):
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def function(x):
        return module(x, x, x, need_weights=True, average_attn_weights=average)

    x = torch.randn(B, S, 32)
    ours = run(torch.compile(function, backend="flashfuse", options=INNER), x)
    assert dict(torch._dynamo.utils.counters["flashfuse"]) == {"fused": 1, "probabilities also made": 1}
    for mine, eager in zip(ours, run(function, x), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-5, rtol=1e-4)


def test_explain_says_what_is_also_made():
    text = str(flashfuse.explain(probabilities_returned, *qkv()))
    assert "1 fused, 0 left alone" in text
    assert "probabilities are used elsewhere too" in text
    assert "of scores not written" not in text
