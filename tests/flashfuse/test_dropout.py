"""Dropout in training: how much is dropped, the same mask everywhere, and eager's own result with that mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashfuse.ir import philox

B, H, S, D = 2, 4, 40, 16
INNER = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def fused() -> int:
    return torch._dynamo.utils.counters["flashfuse"]["fused"]


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(B, H, S, D).to(dtype).requires_grad_() for _ in range(3)]


def kept(seed: Tensor, rate: float, shape: tuple[int, int, int, int] = (B, H, S, S)) -> Tensor:
    """The factors of dropout with a seed, in float64."""
    index = [torch.arange(size).view([-1 if place == axis else 1 for axis in range(4)]) for place, size in enumerate(shape)]
    bits = philox.random_bits(seed, *index)
    threshold = round(rate * 2**16)
    return torch.where(bits < threshold, 0.0, 2**16 / (2**16 - threshold)).double()


def drawn_after(seed: int) -> Tensor:
    """The first seed that a compiled attention draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (), dtype=torch.int64)


def gradients(out: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def attention(q: Tensor, k: Tensor, v: Tensor, rate: float) -> Tensor:
    x = (q @ k.mT * 0.25).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), float("-inf"))
    return F.dropout(x.softmax(-1), rate, training=True) @ v


def checkpointed(q: Tensor, k: Tensor, v: Tensor, rate: float) -> Tensor:
    return checkpoint(attention, q * 1.0, k, v, rate, use_reentrant=False)


@pytest.mark.parametrize("function", [attention, checkpointed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_mask_gives_eagers_result(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs, weight = qkv(dtype), torch.randn(B, H, S, D)
    compiled = torch.compile(function, backend="flashfuse", options=INNER)
    seed = drawn_after(7)
    torch.manual_seed(7)
    ours = gradients(compiled(*inputs, 0.3), inputs, weight)
    assert fused() == 1

    def replayed(wide: torch.dtype) -> list[Tensor]:
        q, k, v = leaves = [t.detach().to(wide).requires_grad_() for t in inputs]
        x = (q @ k.mT * 0.25).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), float("-inf"))
        return gradients((x.softmax(-1) * kept(seed, 0.3).to(wide)) @ v, leaves, weight.to(dtype))

    for own, same, best in zip(ours, replayed(dtype), replayed(torch.float64), strict=True):
        allowed = 2 * (same.double() - best).abs().max() + 2e-6 * best.abs().max()
        assert (own.double() - best).abs().max() <= allowed


def test_the_probabilities_before_dropout_may_be_returned() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT * 0.25).softmax(-1)
        return (F.dropout(p, 0.3, training=True) if factors is None else p * factors) @ v, p

    inputs, weight = qkv(), torch.randn(B, H, S, D)
    seed = drawn_after(7)
    torch.manual_seed(7)
    compiled = torch.compile(function, backend="flashfuse", options=INNER)
    found = []
    for out, p in (compiled(*inputs), function(*inputs, kept(seed, 0.3).float())):
        total = (out * weight).sum() + p.square().sum()
        found.append([out, p, *torch.autograd.grad(total, inputs)])
    assert torch._dynamo.utils.counters["flashfuse"] == {"fused": 1, "probabilities also made": 1}
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("options", [{}, {"fallback_random": True}], ids=["inductor", "fallback_random"])
@pytest.mark.parametrize("function", [attention, checkpointed])
def test_inductor_gives_forward_and_backward_one_mask(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """The output is linear in the value: out . grad_out = value . grad_value, if both used the same mask."""

    def two_layers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return function(q, k, v, 0.5), function(k, q, v, 0.5)

    q, k, v = qkv()
    compiled = torch.compile(two_layers, backend="flashfuse", options=options)
    torch.manual_seed(3)
    first, second = compiled(q, k, v)
    assert fused() == 2
    for out in (first, second):
        weight = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, v, weight, retain_graph=True)
        torch.testing.assert_close((out * weight).sum(), (v * grad).sum(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    again, other = compiled(q, k, v)
    assert torch.equal(first, again)
    assert torch.equal(second, other)
    assert not torch.equal(first, compiled(q, k, v)[0])


def test_kernels_and_chunks_have_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a sink: the Triton kernels, in the interpreter, against the chunked path."""
    if torch.cuda.is_available():
        pytest.skip("triton was imported for the device")
    launch = pytest.importorskip("flashfuse.codegen.launch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forward, ran = launch.forward, []
    monkeypatch.setattr(launch, "forward", lambda *arguments: ran.append(1) or forward(*arguments))

    def function(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        x = (q @ k.mT * 0.25).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), float("-inf"))
        joined = torch.cat([x, sink.view(1, -1, 1, 1).expand(B, -1, S, 1)], -1)
        return F.dropout(joined.softmax(-1)[..., :-1], 0.3, True) @ v

    inputs, found = [*qkv(), torch.randn(H, requires_grad=True)], []
    compiled = torch.compile(function, backend="flashfuse", options=INNER)
    weight = torch.randn(B, H, S, D)
    for interpret in ("1", "0"):
        monkeypatch.setenv("FLASHFUSE_INTERPRET", interpret)
        torch.manual_seed(4)
        found.append(gradients(compiled(*inputs), inputs, weight))
    assert ran == [1]
    for kernel, chunked in zip(*found, strict=True):
        torch.testing.assert_close(kernel, chunked, rtol=1e-4, atol=1e-4)


class Modules(nn.Module):
    """Attention whose value is the identity, so that the output shows the weighted probabilities."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.drop = nn.Dropout(rate)


class Plain(Modules):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.drop((q @ k.mT * 0.25).softmax(-1)) @ v


class Sdpa(Modules):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None]).abs() < 1000
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, dropout_p=self.rate)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("module", [Plain, Sdpa])
def test_as_much_is_dropped_as_asked_for(module: type[Modules], rate: float) -> None:
    q, k, v = torch.randn(2, 2, 128, 16), torch.randn(2, 2, 128, 16), torch.eye(128).expand(2, 2, 128, 128).contiguous()
    compiled = torch.compile(module(rate), backend="flashfuse", options=INNER)
    with torch.no_grad():
        p = compiled(q, k, v)
    assert fused() == 1
    assert abs(float((p == 0).float().mean()) - rate) < 0.01
    expected = (q @ k.mT * 0.25).softmax(-1) / (1 - round(rate * 2**16) / 2**16)
    torch.testing.assert_close(p, torch.where(p == 0, p, expected))


def test_each_head_and_batch_has_its_own_mask() -> None:
    q, v = torch.zeros(2, 2, 64, 16), torch.eye(64).expand(2, 2, 64, 64).contiguous()
    masks = torch.compile(Plain(0.5), backend="flashfuse", options=INNER)(q, q, v).flatten(0, 1) == 0
    for one in range(4):
        for other in range(one):
            assert 0.4 < float((masks[one] == masks[other]).float().mean()) < 0.6


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_in_training(need_weights: bool) -> None:
    layer = nn.MultiheadAttention(32, 4, dropout=0.4, batch_first=True)
    x = torch.randn(2, 24, 32, requires_grad=True)
    keep = torch.arange(24)[None] >= torch.tensor([[20], [24]])

    def run(x: Tensor) -> Tensor:
        return layer(x, x, x, key_padding_mask=keep, need_weights=need_weights)[0]

    compiled = torch.compile(run, backend="flashfuse", options=INNER)
    torch.manual_seed(1)
    first = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(x))
    assert not torch.equal(first, compiled(x))
    first.sum().backward()
    assert x.grad is not None
    average = torch.stack([compiled(x).detach() for _ in range(400)]).mean(0)
    layer.eval()
    torch.testing.assert_close(average, run(x).detach(), rtol=0.1, atol=0.1)


def test_what_dropout_drew_is_gone_from_the_graph() -> None:
    graphs = []

    def inner(module: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch.compile(attention, backend="flashfuse", options={"inner": inner})(*qkv(), 0.3)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert not any("dropout" in name or "softmax" in name for name in names)
    assert sum("randint" in name for name in names) == 1


@pytest.mark.parametrize("rate", [1.5, -0.1])
@pytest.mark.parametrize("function", [torch.dropout, F.scaled_dot_product_attention], ids=["dropout", "sdpa"])
def test_rates_that_eager_refuses_stay_errors(function: Callable[..., Tensor], rate: float) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if function is torch.dropout:
            return torch.dropout((q @ k.mT).softmax(-1), rate, True) @ v
        near = (torch.arange(S)[:, None] - torch.arange(S)[None]).abs() < 1000
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, dropout_p=rate)

    for code in (run, torch.compile(run, backend="flashfuse", options=INNER)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            code(*qkv())
    assert fused() == 0


def test_no_dropout_draws_nothing() -> None:
    inputs = qkv()
    compiled = torch.compile(attention, backend="flashfuse", options=INNER)
    state = torch.get_rng_state()
    out = compiled(*inputs, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(out, attention(*inputs, 0.0))
