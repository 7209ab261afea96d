"""The chunked path against dense float64 attention: values, every gradient, layouts, empty tensors, memory."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashfuse import chunk_ranges, chunked_attention, chunks
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, LOWEST, Family, Write, dense

NAMED = {each.name: each for each in FAMILIES}


def make_inputs(each: Family, layout: str = "contiguous") -> list[Tensor]:
    """query, key, value, grad_out in float64."""
    B, H, G, M, N, D, E = each.shape

    def tensor(*shape: int) -> Tensor:
        b, h, m, d = shape
        if layout == "bmhe":
            return torch.randn(b, m, h, d, dtype=torch.float64).transpose(1, 2)
        if layout == "columns":
            return torch.randn(b, h, d, m, dtype=torch.float64).mT
        if layout == "expanded":
            return torch.randn(1, h, m, 1, dtype=torch.float64).expand(shape)
        if layout == "packed":
            return torch.randn(b, m, h, 3 * d, dtype=torch.float64).transpose(1, 2)[..., d : 2 * d]
        return torch.randn(shape, dtype=torch.float64)

    return [tensor(B, H, M, D), tensor(B, G, N, D), tensor(B, G, N, E), tensor(B, H, M, E)]


def run(each: Family, inputs: list[Tensor], captures: list[Tensor]) -> list[Tensor]:
    """Output and gradients by the chunked path; the output starts as NaN and is laid out as a model's often is."""
    *tensors, grad_out = inputs
    B, H, _, M, _, _, E = each.shape
    out = torch.full((B, M, H, E), math.nan, dtype=tensors[2].dtype).transpose(1, 2)
    stats = chunked_attention.forward(each.spec, *tensors, captures, each.sizes, out)
    assert stats.shape == (each.spec.planes, B, H, M)
    assert stats.dtype is chunked_attention.score_dtype(tensors[0], tensors[2])
    gradients = chunked_attention.backward(
        each.spec, grad_out, *tensors, out, stats, captures, each.sizes, each.needs
    )
    return [out, *gradients]


def reference(each: Family, inputs: list[Tensor], captures: list[Tensor]) -> list[Tensor]:
    """Output and gradients of the dense attention, in the inputs' precision."""
    *tensors, grad_out = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    read = [c.detach().clone().requires_grad_(needed) for c, needed in zip(captures, each.needs, strict=True)]
    out = dense(each, *leaves, read)
    wanted = [*leaves, *(c for c in read if c.requires_grad)]
    gradients = torch.autograd.grad(out, wanted, grad_out, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True))]


def compare(each: Family, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    B, H, _, M, N, _, _ = each.shape
    captures = list(each.captures(B, H, M, N))
    for own, expected in zip(run(each, inputs, captures), reference(each, inputs, captures), strict=True):
        assert own.dtype is expected.dtype
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["usual", "small"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as it is, and with chunks so small that every loop turns more than once."""
    if request.param == "small":
        monkeypatch.setattr(chunks, "_ROWS", 16)
        monkeypatch.setattr(chunks, "_CHUNK_CPU", 2000)
        monkeypatch.setattr(chunk_ranges, "KEY_BLOCK", 16)


@pytest.mark.parametrize("each", FAMILIES, ids=lambda each: each.name)
def test_float64(each: Family, chunk_size: None) -> None:
    compare(each, make_inputs(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("each", FAMILIES, ids=lambda each: each.name)
def test_error_is_within_twice_that_of_eager(each: Family, dtype: torch.dtype) -> None:
    B, H, _, M, N, _, _ = each.shape
    exact_inputs = [tensor.to(dtype).double() for tensor in make_inputs(each)]
    captures = [c.float().double() if c.is_floating_point() else c for c in each.captures(B, H, M, N)]
    narrow = [c.float() if c.is_floating_point() else c for c in captures]
    inputs = [tensor.to(dtype) for tensor in exact_inputs]
    ours = run(each, inputs, narrow)
    # eager in the same precision, its scores in float32 as with captures of that type
    eager = reference(each, [tensor.float() for tensor in inputs] if dtype.itemsize == 2 else inputs, narrow)
    eager = [e.to(o.dtype) for e, o in zip(eager, ours, strict=True)]
    for own, same, best in zip(ours, eager, reference(each, exact_inputs, captures), strict=True):
        assert torch.equal(own.isnan(), best.isnan())
        # the last term: sums of thousands of terms of both signs, of which eager's may by luck be nearly exact
        allowed = 2 * (same - best).abs().nan_to_num().max() + 2e-5 * best.abs().nan_to_num().max()
        assert (own - best).abs().nan_to_num().max() <= allowed


@pytest.mark.parametrize("layout", ["bmhe", "columns", "expanded", "packed"])
@pytest.mark.parametrize("name", ["plain", "causal", "documents_causal", "bias", "rows_all_masked_lowest"])
def test_layouts(name: str, layout: str) -> None:
    compare(NAMED[name], make_inputs(NAMED[name], layout))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 1, 1), (1, 6, 2, 65, 65, 3, 5), (3, 4, 1, 63, 63, 80, 17), (1, 2, 2, 1, 1, 7, 9), (2, 3, 3, 129, 129, 5, 1),
     (1, 1, 1, 9, 7, 512, 300)],
)
@pytest.mark.parametrize("name", ["plain", "causal", "window", "bias_of_heads", "scale", "row_and_column"])
def test_shapes(name: str, shape: tuple[int, ...], chunk_size: None) -> None:
    each = Family(**{**vars(NAMED[name]), "shape": shape})
    compare(each, make_inputs(each))


@pytest.mark.parametrize(
    "shape", [(2, 2, 2, 0, 5, 4, 4), (2, 2, 2, 5, 0, 4, 4), (0, 2, 2, 5, 5, 4, 4), (2, 0, 0, 5, 5, 4, 4)]
)
@pytest.mark.parametrize("name", ["plain", "causal", "rows_all_masked_lowest", "bias_of_heads"])
def test_nothing_to_attend_to(name: str, shape: tuple[int, ...]) -> None:
    each = Family(**{**vars(NAMED[name]), "shape": shape, "captures": NAMED[name].captures})
    B, H, G, M, N, D, E = shape
    captures = [torch.ones(B, N, dtype=torch.bool)] if name.startswith("rows") else list(each.captures(B, H, M, N))
    out, *gradients = run(each, make_inputs(each), captures)
    assert out.shape == (B, H, M, E)
    assert not out.any()
    assert [g.shape for g in gradients[:3]] == [(B, H, M, D), (B, G, N, D), (B, G, N, E)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", ["causal", "float_mask"])
def test_strange_numbers_stay_where_eager_has_them(name: str) -> None:
    each = Family(**{**vars(NAMED[name]), "shape": (2, 2, 2, 40, 40, 4, 4)})
    inputs = make_inputs(each)
    inputs[0][0, 0, 3, 0] = math.nan
    inputs[0][0, 1, 5] = math.inf
    captures = list(each.captures(2, 2, 40, 40))
    own, expected = run(each, inputs, captures)[0], reference(each, inputs, captures)[0]
    torch.testing.assert_close(own, expected, equal_nan=True)


def test_masked_gradients_are_zero_even_where_grad_out_is_infinite() -> None:
    each = NAMED["causal"]
    inputs = make_inputs(each)
    inputs[3][0, 0, 4] = math.inf
    gradients = run(each, inputs, [])[1:]
    assert gradients[1][0, 0, :5].isnan().any()
    assert gradients[1][0, 0, 5:].isfinite().all()
    assert gradients[0][0, 0, 5:].isfinite().all()


def test_values_wider_than_scores() -> None:
    each = NAMED["causal"]
    query, key, value, grad_out = make_inputs(each)
    mixed = [query.half(), key.half(), value.float(), grad_out.float()]
    own = run(each, mixed, [])
    assert [t.dtype for t in own] == [torch.float32, torch.float16, torch.float16, torch.float32]
    expected = reference(each, [t.double() for t in mixed], [])
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)


def test_grad_out_of_a_sum() -> None:
    each = NAMED["causal"]
    inputs = make_inputs(each)
    inputs[3] = torch.ones((), dtype=torch.float64).expand(inputs[3].shape)
    compare(each, inputs)


def test_float_captures_in_half_precision_keep_their_dtype() -> None:
    each = NAMED["bias_of_heads"]
    B, H, _, M, N, _, _ = each.shape
    bias = each.captures(B, H, M, N)[0].to(torch.bfloat16)
    gradient = run(each, [t.float() for t in make_inputs(each)], [bias])[-1]
    assert gradient.dtype is torch.bfloat16
    assert gradient.shape == bias.shape


def test_stats_of_ordinary_and_of_low_rows() -> None:
    each = NAMED["rows_all_masked_lowest"]
    query, key, value, _ = make_inputs(each)
    B, H, _, M, N, _, _ = each.shape
    padding = each.captures(B, H, M, N)[0]
    stats = chunked_attention.forward(each.spec, query, key, value, [padding], (), torch.empty_like(value))
    low = torch.arange(M) < 40
    assert (stats[1, 0] == torch.where(low, LOWEST, 0.0)).all()
    torch.testing.assert_close(stats[0, 0][:, low], torch.full((H, 40), math.log(N), dtype=torch.float64))
    scores = each.dense(query @ key.mT, [padding], *([torch.arange(M)[:, None]] * 3), torch.arange(N)[None, :])
    torch.testing.assert_close(stats[0, 0][:, ~low], scores.logsumexp(-1)[0][:, ~low])


@pytest.mark.parametrize("name", ["causal", "bias_of_heads", "softcap", "row_and_column", "rows_all_masked_zero"])
def test_gradcheck(name: str) -> None:
    each = Family(**{**vars(NAMED[name]), "shape": (1, 2, 1, 5, 5, 3, 2)})
    captures = [torch.arange(5)[None, :] >= 2] if name == "rows_all_masked_zero" else list(each.captures(1, 2, 5, 5))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *read: Tensor) -> Tensor:
            out = query.new_empty(1, 2, 5, 2)
            stats = chunked_attention.forward(each.spec, query, key, value, read, each.sizes, out)
            ctx.save_for_backward(query, key, value, out, stats, *read)
            return out

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            query, key, value, out, stats, *read = ctx.saved_tensors
            found = iter(chunked_attention.backward(
                each.spec, grad_out, query, key, value, out, stats, read, each.sizes, each.needs))  # fmt: skip
            return (*(next(found) for _ in range(3)), *(next(found) if needed else None for needed in each.needs))

    leaves = [tensor.requires_grad_() for tensor in make_inputs(each)[:3]]
    read = [c.requires_grad_(needed) for c, needed in zip(captures, each.needs, strict=True)]
    assert torch.autograd.gradcheck(Attention.apply, (*leaves, *read))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // max(1, tensor.element_size()))
        return result


@pytest.mark.parametrize("name", ["plain", "causal", "documents_causal", "alibi", "softcap", "rows_all_masked_lowest"])
def test_memory_does_not_grow_with_the_square(name: str) -> None:
    largest = {}
    for length in (1024, 2048):
        each = Family(**{**vars(NAMED[name]), "shape": (2, 2, 2, length, length, 8, 8)})
        inputs = [tensor.float() for tensor in make_inputs(each)]
        captures = [c.float() if c.is_floating_point() else c for c in each.captures(2, 2, length, length)]
        with LargestTensor() as seen:
            run(each, inputs, captures)
        largest[length] = seen.elements
    assert largest[2048] < 2048 * 2048
    assert largest[2048] <= 2 * largest[1024]


def test_masked_keys_are_not_read() -> None:
    """Keys outside the closed-form ranges may hold anything: they are skipped, not multiplied by zero."""
    w = Write()
    spec = AttentionSpec(w.builder.program(w.mask((w.n <= w.m) & (w.m - w.n < 8), w.s)), (), EmptyRows.IMPOSSIBLE)
    query, key, value = (torch.randn(1, 1, 256, 8) for _ in range(3))
    key[..., 250:, :] = math.nan
    out = torch.empty_like(query)
    chunked_attention.forward(spec, query, key, value, [], [], out)
    assert out[..., :192, :].isfinite().all()
