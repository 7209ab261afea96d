"""The Hopper backward: compiled here without a GPU, run on one by `pytest -m gpu tests/codegen/test_hopper_backward.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from compile_report import named_spec
from test_gpu import BIG
from test_hopper import SCRIPT, needs_hopper
from test_kernels import compare_with_eager

from flashfuse.codegen import hopper, hopper_backward, hopper_check, kernel_choice, launch
from flashfuse.codegen.emit import module_text
from flashfuse.codegen.load import kernel_module
from flashfuse.ir.attention_spec import EmptyRows


@pytest.mark.skipif(bool(hopper.missing()), reason="this Triton has another Gluon")
def test_compiles_without_serialised_products(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"FLASHFUSE_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, str(SCRIPT), "bf16", "backward:64:causal", "backward:128:plain", "backward:128:causal"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["name"].rsplit("_", 2)[1:] for report in reports] == [["causal", "d64"], ["plain", "d128"], ["causal", "d128"]]
    for report in reports:
        assert report["shared"] <= 227 * 1024, report
        assert report["spilled"] <= (0 if report["name"].endswith("d64") else 256), report
        assert not report["advisories"], report
        assert not report["slow_casts"], report


def test_the_module_defines_no_name_twice_but_the_replaced_one() -> None:
    names = Counter(re.findall(r"^def (\w+)", module_text(named_spec("causal"), True, True), re.MULTILINE))
    assert [name for name, count in names.items() if count > 1] == ["random_bits"]  # of hopper_maths.py


LOW = ("padding_infinite", "padding_finite", "strips_finite")  # rows that lie low
CHECKED = sorted({*BIG, *LOW, "bias_full", "float_mask", "negative_scale", "mask_after_softmax", "sinks_plain"})


def a_call(**facts: object) -> launch.Call:
    half = torch.zeros(1, 8, 2048, 64, dtype=torch.bfloat16)
    known = {"spec": named_spec("causal"), "query": half, "key": half, "value": half, "grad_out": half, "grad_stats": None}
    known["masked"] = True
    return SimpleNamespace(**known | {"B": 1, "H": 8, "G": 8, "M": 2048, "N": 2048, "D": 64, "E": 64} | facts)  # type: ignore[return-value]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "unfit", lambda call: "")
    monkeypatch.setattr(hopper, "missing", lambda: "reached")
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "reached"),
        ({"D": 80, "E": 96}, "reached"),
        ({"E": 128}, "head dims"),
        ({"D": 256, "E": 256}, "head dims"),
        ({"grad_stats": torch.zeros(1)}, "logsumexp"),
        ({"grad_out": torch.zeros(1, 8, 2048, 65, dtype=torch.bfloat16)[..., 1:]}, "aligned"),
        ({"grad_out": torch.zeros(1, 8, 2048, 64)}, "aligned"),
        ({"spec": named_spec("causal_low")}, "reached"),
        ({"spec": dataclasses.replace(named_spec("bias"), empty_rows=EmptyRows.EXACT), "masked": False}, "low"),
        ({"spec": named_spec("dropout")}, "dropout"),
        ({"spec": named_spec("window")}, "not timed"),
        ({"spec": named_spec("documents")}, "not timed"),
        ({"M": 128}, "few"),
        ({"G": 2, "N": 2048}, "few"),
    ],
)
@pytest.mark.usefixtures("fit")
def test_what_it_takes(facts: dict[str, object], expected: str) -> None:
    assert expected in hopper_backward.refusal(a_call(**facts), [])


@pytest.mark.usefixtures("fit")
def test_gradients_of_captures_and_determinism_are_left_to_the_portable_kernels() -> None:
    assert "capture" in hopper_backward.refusal(a_call(spec=named_spec("alibi")), [0])
    assert hopper_backward.refusal(a_call(spec=named_spec("sinks")), [0]) == "reached"
    torch.use_deterministic_algorithms(True)
    try:
        assert "order of blocks" in hopper_backward.refusal(a_call(), [])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fit")
def test_options_for_portable_kernels_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "missing", lambda: "")
    monkeypatch.setattr(hopper_backward, "distrust", lambda *facts: "")
    spec = named_spec("causal")
    assert hopper_backward.takes(a_call(), [])
    kernel_choice.ask(spec.key, "portable")
    try:
        assert not hopper_backward.takes(a_call(), [])
    finally:
        kernel_choice.ask(spec.key, "auto")


@pytest.mark.skipif(not launch.interpreting() or bool(hopper.missing()), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", ["causal", "causal_low", "sinks"])
def test_what_is_prepared(name: str) -> None:
    """Base-2 logsumexp and delta of each row, rows that lie low set aside, gradients of sinks."""
    spec = named_spec(name)
    B, H, M, E, padded = 2, 3, 100, 24, 128
    torch.manual_seed(0)
    out, grad_out, captures = torch.randn(B, H, M, E), torch.randn(B, H, M, E), [torch.randn(H) for _ in spec.captures]
    low = torch.rand(B, H, M) < (0.02 if name == "causal_low" else 0.0)
    stats = torch.stack([torch.randn(B, H, M), torch.where(low, -1e30, 0.0)])[: spec.planes]
    call = launch.Call(spec, out, out, out, captures, ())
    rows, grad_sum = torch.full((2 * B * H, padded), float("nan")), torch.full((B * H, M, 64), float("nan"))
    delta, partial = torch.full((B, H, M), float("nan")), torch.full((1, B, H, M), float("nan"))
    flags = torch.full((B, H, 2), -1, dtype=torch.int32)
    module = kernel_module(spec, fast_tanh=True, hopper=True)
    call.run(
        module.flashfuse_hopper_prepare, 2 * B * H, out, grad_out, stats, rows, grad_sum, delta, flags, partial, call.inputs,
        *call.strides(out, grad_out), H, M, M, B * H * M, padded,
        E=E, E_PAD=32, D_PAD=64, BLOCK=64, LOW=name == "causal_low", SUMS=name == "sinks", num_warps=4,
    )  # fmt: skip
    lse, found = rows.view(B, H, 2, padded).unbind(2)
    expected = (out * grad_out).sum(-1)
    torch.testing.assert_close(lse[..., :M], torch.where(low, float("inf"), stats[0] * 1.4426950408889634))
    torch.testing.assert_close(found[..., :M], torch.where(low, 0.0, expected))
    assert (lse[..., M:] == float("inf")).all()
    assert not grad_sum.any()
    if name == "causal_low":
        assert low.any()
        torch.testing.assert_close(delta, expected)
        assert torch.equal(flags, torch.nn.functional.pad(low, (0, padded - M)).view(B, H, 2, 64).any(-1).int())
    if name == "sinks":
        torch.testing.assert_close(partial[0], -torch.exp(captures[0][:, None] - stats[0]) * expected)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CHECKED)
def test_gradients_within_twice_the_error_of_eager(name: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    shape = BIG.get(name, case.shape)
    case = dataclasses.replace(case, shape=(*shape[:5], head_dim, head_dim), needs=())
    refusals: list[str] = []
    takes = hopper_backward.takes

    def noted(call: launch.Call, wanted: list[int]) -> bool:
        refusals.append(hopper_backward.refusal(call, wanted, eager=True))
        return takes(call, wanted)

    monkeypatch.setattr(hopper_backward, "takes", noted)
    kernel_choice.ask(case.spec.key, "hopper")
    try:
        compare_with_eager(case, torch.bfloat16, "cuda")
    finally:
        kernel_choice.ask(case.spec.key, "auto")
    if any(refusals):
        pytest.skip(refusals[0])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_check_passes_here(head_dim: int) -> None:
    assert hopper_check.backward_fault(torch.device("cuda", torch.cuda.current_device()), head_dim) == ""


@pytest.mark.gpu
@needs_hopper
def test_a_wrong_kernel_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hopper_backward.launch

    def wrong(
        call: launch.Call, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, partial: None = None
    ) -> None:
        right(call, grad_query, grad_key, grad_value, partial)
        grad_key[1, 1, -1] = float("nan")

    monkeypatch.setattr(hopper_backward, "launch", wrong)
    assert "differ" in hopper_check.backward_fault(torch.device("cuda", torch.cuda.current_device()), 64)
