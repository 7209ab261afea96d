"""Torch's own CPU flash kernel: taken only for what it computes, and then with the chunked path's results."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashfuse import aten_flash, chunked_attention
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_builder import Value

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, Write

SERVED = ("plain", "unscaled", "divided", "causal", "softmax_causal_other_way")


def spec_of(name: str) -> AttentionSpec:
    if name != "softmax_causal_other_way":
        return next(each.spec for each in FAMILIES if each.name == name)
    w = Write()
    drop = w.n > w.m
    return AttentionSpec(w.builder.program(drop.apply("where", drop, w.builder.const(-math.inf), w.s / 2.0)))


def run(path, spec: AttentionSpec, tensors: list[Tensor], grad_out: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    query, _, value = tensors
    out = torch.full((*query.shape[:3], value.shape[3]), math.nan, dtype=value.dtype)
    stats = path.forward(spec, *tensors, [], [], out)
    assert stats is not None
    gradients = path.backward(spec, grad_out, *tensors, out, stats, [], [], [])
    assert gradients is not None
    return [out, stats, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "bmhe", "expanded"])
@pytest.mark.parametrize(("M", "N"), [(70, 70), (33, 90), (90, 33), (1, 5)])
@pytest.mark.parametrize("name", SERVED)
def test_results_are_those_of_the_chunked_path(name: str, M: int, N: int, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def tensor(length: int) -> Tensor:
        if layout == "expanded":
            return torch.randn(1, 3, length, 16).to(dtype).expand(2, 3, length, 16)
        made = torch.randn(2, length, 3, 16).to(dtype).transpose(1, 2)
        return made.contiguous() if layout == "contiguous" else made

    tensors, grad_out = [tensor(M), tensor(N), tensor(N)], torch.ones((), dtype=dtype).expand(2, 3, M, 16)
    own = run(aten_flash, spec_of(name), tensors, grad_out)
    tolerance = 2e-5 if dtype is torch.float32 else 4e-2
    for a, b in zip(own, run(chunked_attention, spec_of(name), tensors, grad_out), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", [each.name for each in FAMILIES if each.name not in SERVED])
def test_other_attention_is_left_alone(name: str) -> None:
    query = torch.randn(1, 2, 8, 8)
    assert aten_flash.forward(spec_of(name), query, query, query, [], [8], torch.empty_like(query)) is None


def other_causal(w: Write) -> list[Value]:
    """Predicates that look like the causal one and are not."""
    return [w.n < w.m, w.m <= w.n, w.n <= w.m + 1, w.n <= w.m + (w.N - w.M), w.n >= w.m]


@pytest.mark.parametrize("number", range(5))
def test_only_the_causal_predicate_is_causal(number: int) -> None:
    w = Write()
    spec = AttentionSpec(w.builder.program(w.mask(other_causal(w)[number], w.s)), (), EmptyRows.EXACT)
    query = torch.randn(1, 2, 8, 8)
    assert aten_flash.forward(spec, query, query, query, [], [], torch.empty_like(query)) is None


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf, -1e20, 1e38])
def test_rows_outside_the_ordinary_range_are_left_alone(strange: float) -> None:
    query, key = torch.rand(1, 2, 8, 8), torch.rand(1, 2, 8, 8)
    query[0, 0, 3] = strange
    assert aten_flash.forward(spec_of("causal"), query, key, key, [], [], torch.empty_like(query)) is None


def test_low_rows_of_the_chunked_forward_keep_its_backward() -> None:
    query, key = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8) + 1
    query[0, 0, 3] = -1e20
    spec, out = spec_of("divided"), torch.empty_like(query)
    stats = chunked_attention.forward(spec, query, key, key, [], [], out)
    assert (stats[1, 0, 0] != 0).tolist() == [row == 3 for row in range(8)]
    assert aten_flash.backward(spec, out, query, key, key, out, stats, [], [], []) is None


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 4, 8, 8), (1, 2, 8, 8), 8),
        ((1, 2, 8, 8), (1, 2, 8, 8), 4),
        ((1, 2, 0, 8), (1, 2, 8, 8), 8),
        ((1, 2, 8, 8), (1, 2, 0, 8), 8),
    ],
)
def test_shapes_that_it_does_not_take(shapes: tuple) -> None:
    query, key = torch.randn(shapes[0]), torch.randn(shapes[1])
    value, out = torch.randn(*shapes[1][:3], shapes[2]), torch.empty(*shapes[0][:3], shapes[2])
    assert aten_flash.forward(spec_of("causal"), query, key, value, [], [], out) is None
