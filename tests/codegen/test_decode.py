"""Few queries, many keys: split over programs and combined, against dense float64 attention."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashfuse.codegen import decode, launch, replay

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from decode_cases import DECODE_CASES
from specs import Case, make_inputs
from test_kernels import compare_with_eager

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")


def split_of(case: Case, device: str = "cpu") -> decode.Split | None:
    inputs = make_inputs(case, torch.float16, device=device)
    return decode.split_of(launch.Call(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes))


@interpreted
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_within_twice_the_error_of_eager(case: Case) -> None:
    split = split_of(case)
    assert split is not None
    assert split.parts > 1
    compare_with_eager(case, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_within_twice_the_error_of_eager_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    assert split_of(case, "cuda") is not None
    compare_with_eager(case, dtype, "cuda")


@interpreted
def test_heads_of_a_group_share_a_program_unless_their_ranges_differ() -> None:
    by_name = {case.name: case for case in [*CASES, *DECODE_CASES]}
    for name, pack in {"decode": 4, "decode_causal": 4, "decode_heads": 1, "decode_full": 16, "decode_prime": 17}.items():
        found = split_of(by_name[name])
        assert found is not None
        assert found.pack == pack
    assert split_of(by_name["plain"]) is None
    assert split_of(by_name["dropout"]) is None


@interpreted
def test_low_rows_need_no_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in DECODE_CASES if case.name == "decode_nothing_finite")
    names: list[str] = []
    start = launch.Call.start
    monkeypatch.setattr(
        launch.Call, "start", lambda call, name, *rest, **more: names.append(name) or start(call, name, *rest, **more)
    )
    inputs = make_inputs(case, torch.float16)
    _out, stats = launch.forward(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes)
    assert names == ["flashfuse_decode", "flashfuse_combine"]
    assert (stats[1] != 0).flatten(1).all(1).tolist() == [False, True]  # the rows of the second sequence were low


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["decode", "decode_nothing_finite", "decode_sinks"])
def test_recordings_and_graphs_compute_what_launches_one_by_one_do(name: str) -> None:
    """Bit for bit, with new keys each time."""
    (known,) = (case for case in DECODE_CASES if case.name == name)
    shape = known.shape[:4] + ((300,) if known.spec.split.keep is not None else (8192,)) + (64, 64)
    case = dataclasses.replace(known, shape=shape)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    tensors = (inputs.query, inputs.key, inputs.value)

    def forward() -> list[Tensor]:
        return list(launch.forward(case.spec, *tensors, inputs.captures, case.sizes))

    rounds = 50
    generator = torch.Generator("cuda").manual_seed(0)
    keys = [torch.randn(inputs.key.shape, device="cuda", generator=generator).to(inputs.key) for _ in range(rounds)]
    expected = []
    for key in keys:
        inputs.key.copy_(key)
        replay.forget()
        expected.append(forward())
    found = []
    for key in keys:
        inputs.key.copy_(key)
        found.append(forward())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = forward()
    for key in keys:
        inputs.key.copy_(key)
        graph.replay()
        found.append([tensor.clone() for tensor in static])
    assert all(
        torch.equal(one, other) for pair in zip(found, expected * 2, strict=True) for one, other in zip(*pair, strict=True)
    )
    assert not torch.equal(found[0][0], found[1][0])
