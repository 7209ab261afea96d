"""Loops that load by tensor descriptors compute what loops that load by pointers do, and pointers serve where TMA cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashfuse.codegen import launch
from flashfuse.codegen.descriptors import describable, in_blocks
from flashfuse.codegen.plan import Tile, kernel_plan, tuning_candidates
from flashfuse.codegen.replay import Recording

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from specs import Case, make_inputs

SCRIPT = Path(__file__).parent / "compile_report.py"
interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")
SMALL = (2, 2, 1, 16, 20, 16, 16)
KERNELS = ("forward", "grad_query", "grad_key_value")
ODD = (1, 4, 2, 37, 45, 24, 40)  # neither blocks nor powers of two divide lengths and head dims


def case_named(name: str, shape: tuple[int, int, int, int, int, int, int] | None = None) -> Case:
    found = next(case for case in CASES if case.name == name)
    return found if shape is None else replace(found, shape=shape)


def results(case: Case, tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch, *, tma: bool) -> tuple[list[Tensor], set[str]]:
    """Output, statistics and gradients, and the kernels that were given descriptors."""
    usual = launch.kernel_plan(None, 4, 16)
    tiles = {name: tuple(replace(tile, tma=tma) for tile in getattr(usual, name)) for name in KERNELS}
    described: set[str] = set()
    start = launch.Call.start

    def noting(call: launch.Call, kernel: str, blocks: int, *positional: Any, **named: Any) -> Any:
        if any(isinstance(value, TensorDescriptor) for value in positional):
            assert named["TMA"]
            described.add(kernel)
        return start(call, kernel, blocks, *positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "kernel_plan", lambda *facts: replace(usual, **tiles))
        patch.setattr(launch, "_chosen", {})
        patch.setattr(launch.Call, "start", noting)
        query, key, value, grad_out, *captures = tensors
        needs = case.needs or (False,) * len(captures)
        out, stats = launch.forward(case.spec, query, key, value, captures, case.sizes)
        gradients = launch.backward(case.spec, grad_out, query, key, value, out, stats, captures, case.sizes, needs)
    return [out, stats, *gradients], described


@interpreted
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("plain_gqa", ODD, torch.float16),
        ("causal_additive", None, torch.float16),  # low rows: their launches load by pointers
        ("row_and_column", None, torch.float32),  # delta from scores, row and column sums
    ],
)
def test_same_bits_as_by_pointers(
    name: str, shape: tuple[int, int, int, int, int, int, int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_named(name, shape)
    inputs = make_inputs(case, dtype)
    tensors = [inputs.query, inputs.key, inputs.value, inputs.grad_out, *inputs.captures]
    by_pointers, none = results(case, tensors, monkeypatch, tma=False)
    by_descriptors, described = results(case, tensors, monkeypatch, tma=True)
    assert not none
    assert described == {"flashfuse_forward", "flashfuse_grad_query", "flashfuse_grad_key_value"}
    for pointed, loaded in zip(by_pointers, by_descriptors, strict=True):
        assert pointed.isfinite().any()
        assert torch.equal(pointed.nan_to_num(), loaded.nan_to_num())
        assert torch.equal(pointed.isnan(), loaded.isnan())


@interpreted
@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (lambda t: t[:, :, :, 1:17], set()),  # not aligned
        (lambda t: t[..., :20].contiguous()[..., :16], set()),  # rows 40 bytes apart
        (lambda t: t[:1, ..., :16].expand_as(t[..., :16]), set()),  # a batch repeated
        (lambda t: t[..., :16].transpose(1, 2).contiguous().transpose(1, 2), set(KERNELS)),
    ],
)
def test_pointers_where_tma_cannot_read(spoil: Any, left: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("plain_gqa", SMALL)
    inputs = make_inputs(case_named("plain_gqa", (*SMALL[:5], 32, 32)), torch.float16)
    tensors = [spoil(tensor) for tensor in (inputs.query, inputs.key, inputs.value, inputs.grad_out)]
    found, described = results(case, tensors, monkeypatch, tma=True)
    assert described == {f"flashfuse_{name}" for name in left}
    plain, _ = results(case, [tensor.contiguous() for tensor in tensors], monkeypatch, tma=False)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@interpreted
def test_one_tensor_that_cannot_be_described_is_enough() -> None:
    case = case_named("plain_gqa")
    inputs = make_inputs(case, torch.float16)
    call = launch.Call(case.spec, inputs.query, inputs.key, inputs.value, [], case.sizes)
    tile = Tile(32, 16, 1, 1, tma=True)
    crooked = torch.zeros(*call.value.shape[:3], call.E + 1, dtype=torch.float16)[..., : call.E]
    assert describable(call.key)
    assert not describable(crooked)
    assert in_blocks(call, tile, 16, (call.key, crooked), call.padded) == ((call.key, crooked), False)
    assert in_blocks(call, replace(tile, tma=False), 16, (call.key, call.value), call.padded)[1] is False
    boxes, tma = in_blocks(call, tile, 16, (call.key, call.value), call.padded)
    assert tma
    assert [box.block_shape for box in boxes] == [[1, 1, 16, 16], [1, 1, 16, 32]]


def test_what_loads_by_descriptors_without_tuning() -> None:
    """Only where that was timed and found faster, which is the backward at head dim 128; max-autotune tries it elsewhere."""
    plans = {dim: kernel_plan((9, 0), 2, dim) for dim in (64, 128, 256)}
    first = {(dim, name) for dim, plan in plans.items() for name in KERNELS if getattr(plan, name)[0].tma}
    assert first == {(128, "grad_query"), (128, "grad_key_value")}
    assert all(any(tile.tma for tile in tuning_candidates(plan, name)) for plan in plans.values() for name in KERNELS)
    assert not any(tile.tma for name in KERNELS for tile in tuning_candidates(kernel_plan((8, 0), 2, 128), name))


def test_compiles_to_tma(tmp_path: Path) -> None:
    """For sm_90: loads by TMA instead of copies by threads, no spills, products that do not wait."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"FLASHFUSE_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, str(SCRIPT), "sm_90", "bf16", "128", "causal", "--tma", *KERNELS[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == set(KERNELS[1:])
    for report in reports:
        assert report["tma"] > 0, report
        assert report["copies"] == 0, report
        assert report["spill"] <= report["allowed"], report
        assert not report["advisories"], report


def test_a_repeated_launch_describes_the_tensor_of_its_own_call() -> None:
    """Through the compiled kernel's launcher, which asks the base of a descriptor for its address."""
    tensor = torch.zeros(2, 3, 20, 16, dtype=torch.float16)
    descriptor = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, 16, 16])
    kernel = SimpleNamespace(run=None, function=None, packed_metadata=None)
    recording = Recording([tensor], 0)
    recording.launched(kernel, 1, SimpleNamespace(arg_names=["key"]), (descriptor,), {})
    assert recording.sound
    moved = recording.launches[0].arguments[0].at(4096)
    assert type(moved) is TensorDescriptor
    assert moved.base.data_ptr() == 4096
    assert (moved.shape, moved.strides, moved.block_shape) == (descriptor.shape, descriptor.strides, [1, 1, 16, 16])
    assert descriptor.base is tensor
