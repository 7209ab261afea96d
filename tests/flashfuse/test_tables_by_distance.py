"""Tables read by the distance of query and key: thousands of gradients meet in one element, and must be summed in float32."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from forms import distances, t5_buckets

B, H, S, D, FAR = 2, 2, 512, 16, 8


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def by_bucket(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """T5: table [32, H]."""
    bias = F.embedding(t5_buckets(distances(query)), table).to(query.dtype).permute([2, 0, 1])
    return (query @ key.mT + bias).softmax(-1) @ value


def by_clamped_distance(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """All that is farther than FAR reads one element: table [2 * FAR + 1, H]."""
    bias = table[distances(query).clamp(-FAR, FAR) + FAR].to(query.dtype).permute([2, 0, 1])
    return (query @ key.mT + bias).softmax(-1) @ value


def results(function: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor, dtype in zip(inputs, dtypes, strict=True)]
    out = function(*leaves)
    out.backward(grad_out.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize(("function", "shape"), [(by_bucket, (32, H)), (by_clamped_distance, (2 * FAR + 1, H))])
def test_gradient_of_a_table_is_as_exact_as_a_sum_in_float32(function: Callable[..., Tensor], shape: tuple[int, int]):
    """Eager code on CUDA sums an embedding's gradient in float32, on the CPU in bfloat16: it reads a float32 table here."""
    rising = torch.linspace(-2, 2, S)[:, None]  # keys far ahead get positive gradients, keys far behind negative ones
    inputs = [torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D) + rising, torch.randn(shape)]
    inputs = [(tensor * scale).bfloat16() for tensor, scale in zip(inputs, (D**-0.5, 1, 1, 1), strict=True)]
    grad_out = (torch.rand(B, H, S, D) + rising + 2).bfloat16()
    narrow = [torch.bfloat16] * 4
    exact = results(function, inputs, grad_out, [torch.float64] * 4)
    eager = results(function, inputs, grad_out, [*narrow[:3], torch.float32])
    eager[4] = eager[4].bfloat16()
    compiled = torch.compile(function, backend="flashfuse", options={"inner": "aot_eager", "strict": True})
    ours = results(compiled, inputs, grad_out, narrow)
    assert ours[4].dtype is torch.bfloat16
    for mine, same, best in zip(ours, eager, exact, strict=True):
        assert (mine - best).abs().max() <= 2 * (same - best).abs().max()
