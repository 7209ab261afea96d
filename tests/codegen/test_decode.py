"""Few queries, many keys: split over programs and combined, against dense float64 attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashfuse.codegen import decode, launch

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
