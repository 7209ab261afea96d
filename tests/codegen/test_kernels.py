"""Forward and backward kernels in Triton's interpreter against dense float64 attention."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from flashfuse.codegen import launch
from flashfuse.codegen.plan import _LAST, KernelPlan, Tile

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, WIDE
from specs import Case, Inputs, dense_attention, make_inputs

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")


def run_kernels(case: Case, inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients by the Triton kernels."""
    B, H, _, M, _, _, E = case.shape
    needs = case.needs or (False,) * len(inputs.captures)
    tensors = (inputs.query, inputs.key, inputs.value)
    out, stats = launch.forward(case.spec, *tensors, inputs.captures, case.sizes, "bmhe")
    assert (out.shape, out.stride()) == ((B, H, M, E), torch.empty(B, M, H, E).transpose(1, 2).stride())
    assert stats.shape == (case.spec.planes, B, H, M)
    gradients = launch.backward(case.spec, inputs.grad_out, *tensors, out, stats, inputs.captures, case.sizes, needs)
    expected = [*tensors, *(c for c, needed in zip(inputs.captures, needs, strict=True) if needed)]
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in expected]
    return out, gradients


def compare(case: Case, inputs: Inputs, rtol: float, atol: float) -> None:
    out, gradients = run_kernels(case, inputs)
    expected_out, expected_gradients = dense_attention(case, inputs, case.reference)
    torch.testing.assert_close(out.double(), expected_out.double(), rtol=rtol, atol=atol, equal_nan=True)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def compare_with_eager(case: Case, dtype: torch.dtype, device: str) -> None:
    """FlashAttention's rule: the error against float64 is at most twice that of eager code with products in `dtype`.

    The absolute part, for results that eager hits by luck, is FlashAttention's in float32, at most two roundings of the
    largest number, and a quarter of a rounding in 16 bits, where sums are in float32.
    """
    inputs = make_inputs(case, dtype, device=device)
    reference = case.reference
    exact, eager = dense_attention(case, inputs, reference), dense_attention(case, inputs, dtype)
    actual = run_kernels(case, inputs)
    for place, (a, e, r) in enumerate(zip([actual[0], *actual[1]], [eager[0], *eager[1]], [exact[0], *exact[1]], strict=True)):
        assert torch.equal(a.isnan(), r.isnan()), f"tensor {place}: NaN in other places than in eager"
        a, e, r = (tensor.double().nan_to_num(0.0) for tensor in (a, e, r))
        rounding = torch.finfo(dtype).eps * (2 if dtype is torch.float32 else 0.25)
        allowed = 2 * (e - r).abs().max() + rounding * r.abs().max() + 1e-6
        error = (a - r).abs().max()
        assert error <= allowed, f"tensor {place}: error {error:.3g}, eager's {(e - r).abs().max():.3g}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float16_within_twice_the_error_of_eager(case: Case) -> None:
    compare_with_eager(case, torch.float16, "cpu")


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_heads(case: Case) -> None:
    compare_with_eager(case, torch.float16, "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    compare(case, make_inputs(case, torch.float32), 2e-5, 2e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("causal", "padding_finite", "bias_heads", "softcap")],
                         ids=lambda case: case.name)  # fmt: skip
@pytest.mark.parametrize("value_dtype", [torch.float16, torch.float32])
def test_float16(case: Case, value_dtype: torch.dtype) -> None:
    compare(case, make_inputs(case, torch.float16, value_dtype), 2e-2, 2e-2)


@pytest.mark.parametrize("shape", [(2, 2, 2, 0, 5, 16, 16), (2, 2, 2, 5, 0, 16, 16), (0, 2, 2, 5, 5, 16, 16)])
def test_empty(shape: tuple[int, int, int, int, int, int, int]) -> None:
    case = Case("empty", next(c for c in CASES if c.name == "causal_exact").spec, lambda s, c, z, i: s, shape=shape)
    out, gradients = run_kernels(case, make_inputs(case, torch.float32))
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


def test_same_gradients_twice() -> None:
    case = next(c for c in CASES if c.name == "plain_gqa")
    inputs = make_inputs(case, torch.float32)
    first, second = run_kernels(case, inputs), run_kernels(case, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("name", ["plain_gqa", "row_and_column"])
def test_a_launch_for_each_of_key_and_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == name)
    usual = launch.kernel_plan(None, 4, 16)
    split = replace(usual, grad_key_value=tuple(replace(tile, split=True) for tile in usual.grad_key_value))
    monkeypatch.setattr(launch, "kernel_plan", lambda *facts: split)
    monkeypatch.setattr(launch, "_chosen", {})
    compare(case, make_inputs(case, torch.float32), 2e-5, 2e-5)


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ((0, 0, 0, 0), 0),
        ((9, 0, 0, 0), 1),
        ((9, 5, 0, 0), 1),
        ((60, 50, 0, 0), 2),
        ((None, None, 99, 0), 3),
        ((None, None, 3, 2), 2),
    ],
)
def test_the_first_tile_that_fits_and_spills_little(
    found: tuple[int | None, ...], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in CASES if c.name == "causal")
    inputs = make_inputs(case, torch.float32)
    own = (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1))
    plan = KernelPlan(*[own + _LAST] * 5)  # the last two are only for want of others
    monkeypatch.setattr(launch, "kernel_plan", lambda *facts: plan)
    monkeypatch.setattr(launch, "_chosen", {})
    call, tried = launch.Call(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes), []

    def attempt(tile: Tile) -> SimpleNamespace:
        tried.append(tile)
        spills = found[plan.forward.index(tile)]
        if spills is None:
            raise OutOfResources(2, 1, "shared memory")
        return SimpleNamespace(n_spills=spills)

    call.launch("forward", attempt)
    tried.clear()
    call.launch("forward", attempt)
    assert tried == [plan.forward[taken]]


def test_output_of_any_strides() -> None:
    case = next(c for c in CASES if c.name == "causal_exact")
    inputs = make_inputs(case, torch.float32)
    out, _ = launch.forward(case.spec, inputs.query, inputs.key, inputs.value, [], (), "bhem")
    assert out.stride(2) == 1
    torch.testing.assert_close(out, run_kernels(case, inputs)[0])


def test_unsupported_tensors_say_why() -> None:
    query = torch.randn(1, 1, 4, 16)
    assert launch.unsupported(query, query, query) is None
    assert "torch.float64" in str(launch.unsupported(query.double(), query.double(), query))
    assert "head dim 520" in str(launch.unsupported(query, query, torch.randn(1, 1, 4, 520)))
    assert "key is" in str(launch.unsupported(query, query.half(), query))
