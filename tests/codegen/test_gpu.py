"""The kernels on a GPU: error at most twice that of eager code in the same precision, both against float64.

Run by `pytest -m gpu tests/codegen/test_gpu.py`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from flashfuse.codegen import kernel_choice, launch, replay, tuning
from flashfuse.codegen.order import Order
from flashfuse.codegen.plan import Tile

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, WIDE, pair_bias
from specs import Case, dense_attention, make_inputs
from test_kernels import compare_with_eager, run_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BIG = {  # the same attentions over several tiles of the default plans
    "plain": (2, 2, 2, 333, 333, 64, 64), "plain_gqa": (2, 4, 2, 260, 515, 128, 128),
    "plain_d80": (1, 2, 2, 180, 340, 80, 80),
    "causal": (1, 2, 2, 700, 700, 64, 64), "causal_wide": (1, 2, 1, 300, 611, 128, 128),
    "causal_exact": (1, 2, 1, 300, 611, 128, 128), "causal_end_short": (1, 2, 2, 400, 370, 128, 64),
    "window": (1, 2, 1, 700, 700, 128, 128), "causal_additive": (1, 2, 1, 512, 512, 256, 256),
    "softcap": (1, 2, 1, 500, 500, 128, 128), "alibi": (1, 2, 1, 500, 500, 64, 64),
    "every_other": (1, 2, 2, 300, 300, 192, 192),
    "dropout": (1, 2, 1, 700, 700, 64, 64), "dropout_gqa": (1, 4, 2, 300, 515, 128, 128),
    "sinks_causal": (1, 2, 1, 500, 611, 128, 128),
}  # fmt: skip


def _enlarged() -> list[Case]:
    known = {case.name: case for case in CASES}
    return [dataclasses.replace(known[name], name=f"{name}_big", shape=shape) for name, shape in BIG.items()]


@pytest.fixture(autouse=True)
def _exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *_enlarged()], ids=lambda case: case.name)
def test_within_twice_the_error_of_eager(case: Case, dtype: torch.dtype) -> None:
    compare_with_eager(case, dtype, "cuda")


def order_id(order: Order) -> str:
    return f"{order.section}{'_swapped' * order.swapped}"


@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("order", [Order(), Order(4, swapped=True), Order(2, swapped=True)], ids=order_id)
def test_batches_that_share_a_bias(order: Order, head_dim: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of the bias's gradient, with and without edges, in each order of the programs."""
    monkeypatch.setattr(launch, "order_of", lambda call, heads, size: order)
    compare_with_eager(pair_bias(length, head_dim), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_heads(case: Case, dtype: torch.dtype) -> None:
    B, H, G, M, N, D, E = case.shape
    compare_with_eager(dataclasses.replace(case, shape=(B, H, G, 5 * M, 5 * N, D, E)), dtype, "cuda")


def test_wide_heads_in_float32_are_left_to_torch() -> None:
    query = torch.randn(1, 1, 4, 300, device="cuda")
    assert "float32" in str(launch.unsupported(query, query, query))
    assert launch.unsupported(query.half(), query.half(), query.half()) is None


def test_precision_follows_torch() -> None:
    case = next(c for c in CASES if c.name == "plain")
    inputs = make_inputs(dataclasses.replace(case, shape=(1, 2, 2, 256, 256, 64, 64)), torch.float32, device="cuda")
    case = dataclasses.replace(case, shape=(1, 2, 2, 256, 256, 64, 64))
    reference, _ = dense_attention(case, inputs, torch.float64)
    exact = float((run_kernels(case, inputs)[0].double() - reference).abs().max())
    torch.backends.cuda.matmul.allow_tf32 = True
    fast = float((run_kernels(case, inputs)[0].double() - reference).abs().max())
    assert exact < 1e-5 < fast < 1e-2


@pytest.mark.parametrize("name", ["causal_big", "plain_gqa_big", "row_and_column"])
def test_tuned_tiles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned at the first call, from memory at the second, from the disk at the third."""
    case = next(c for c in [*CASES, *_enlarged()] if c.name == name)
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "_requested", set())
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(kernel_choice, "_asked", {case.spec.key: "portable"})
    tuning.request([case.spec.key])
    compare_with_eager(case, torch.bfloat16, "cuda")
    kept = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert {result["key"]["kernel"] for result in kept} == {"forward", "grad_query", "grad_key_value"}
    assert all(len(result["milliseconds"]) > 2 for result in kept)
    monkeypatch.setattr(tuning, "milliseconds", lambda run, device: pytest.fail("tuned again"))
    compare_with_eager(case, torch.bfloat16, "cuda")
    tuning._known.clear()
    replay.forget()
    compare_with_eager(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", ["causal_additive_big", "plain_gqa_big"])
def test_a_launch_for_each_of_key_and_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in _enlarged() if c.name == name)
    usual = launch.kernel_plan(torch.cuda.get_device_capability(), 2, case.shape[-1])
    split = dataclasses.replace(usual, grad_key_value=(Tile(32, 128, 8, 2, split=True), *usual.grad_key_value))
    monkeypatch.setattr(launch, "kernel_plan", lambda *facts: split)
    monkeypatch.setattr(launch, "_chosen", {})
    compare_with_eager(case, torch.bfloat16, "cuda")
