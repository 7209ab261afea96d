"""flex_attention called by the user is handed on to the inner compiler as it is, never written out densely."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

N = 128


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def causal(b, h, m, n):
    return n <= m


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 2, N, 16) for _ in range(3))


def higher_order(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]


def products(module: torch.fx.GraphModule) -> int:
    return sum("matmul" in str(node.target) for node in module.graph.nodes)


def test_flex_attention_is_handed_on_beside_an_attention_that_is_fused():
    mask = create_block_mask(causal, 1, 1, N, N, device="cpu")
    handed: list[torch.fx.GraphModule] = []

    def inner(module, _inputs):
        handed.append(module)
        return module.forward

    def function(q, k, v):
        return flex_attention(q, k, v, block_mask=mask), (q @ k.mT * 0.25).softmax(-1) @ v

    q, k, v = qkv()
    with torch.no_grad():
        ours = torch.compile(function, backend="flashfuse", options={"inner": inner})(q, k, v)
        torch.testing.assert_close(ours, function(q, k, v))
    (module,) = handed
    assert higher_order(module) == ["flex_attention"]
    assert products(module) == 0
    assert torch._dynamo.utils.counters["flashfuse"]["fused"] == 1


@pytest.mark.filterwarnings("ignore:flashfuse")
def test_a_graph_of_flex_attention_alone_is_the_same_object():
    from flashfuse.backend import flashfuse

    captured: list[torch.fx.GraphModule] = []
    handed: list[torch.fx.GraphModule] = []

    def inner(module, _inputs):
        handed.append(module)
        return module.forward

    def backend(module, inputs):
        captured.append(module)
        return flashfuse(module, inputs, options={"inner": inner})

    def bias(score, b, h, m, n):
        return score + (n - m)

    q, k, v = qkv()
    with torch.no_grad():
        torch.compile(lambda q, k, v: flex_attention(q, k, v, score_mod=bias), backend=backend)(q, k, v)
    assert handed[0] is captured[0]
    assert higher_order(handed[0]) == ["flex_attention"]
