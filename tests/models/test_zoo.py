"""A part of the zoo on every change: families with different spellings, each in one mode. All of it: `sweep.py`.

Every attention of these models is fused, but for those that are listed with their codes; outputs and gradients hold the rule of
`measure.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from catalogue import NAMES, build
from measure import ULPS, Mode, compare, measure
from tables import is_wrong

INFER, TRAIN = "infer-fp32-static", "train-fp32-static"
CASES = (
    ("deepseek_v3", INFER, 2), ("wavlm", INFER, 2), ("granite_swa", INFER, 2), ("gpt_neox", TRAIN, 2), ("opt", INFER, 2),
    ("gptj", INFER, 2), ("bloom", INFER, 2), ("mpt", INFER, 2), ("imagegpt", INFER, 2), ("albert", TRAIN, 2),
    ("deberta-v2", INFER, 2), ("mpnet", INFER, 2), ("flaubert", INFER, 2), ("nystromformer", INFER, 2),
    ("distilbert", "infer-bf16-static", 2), ("t5gemma", INFER, 6), ("whisper", INFER, 6), ("clip", TRAIN, 4),
    ("sam_vision_model", INFER, 2), ("swin", INFER, 4), ("lilt", INFER, 3), ("beit", INFER, 2), ("ibert", INFER, 2),
    ("timm xcit", INFER, 4), ("timm swin", TRAIN, 4), ("diffusers UNet2DConditionModel", INFER, 8),
    ("nn.MultiheadAttention causal", TRAIN, 1), ("nn.MultiheadAttention with weights", "infer-fp32-dynamic", 1),
)  # fmt: skip


@pytest.mark.parametrize(("name", "mode", "sites"), CASES, ids=lambda value: str(value))
def test_every_attention_is_fused_and_right(name: str, mode: str, sites: int):
    if name not in NAMES:
        pytest.skip(f"{name.split()[0]} is not installed")
    wanted = Mode.of(mode)
    model, inputs = build(name, dropout=wanted.dropout)
    row = measure(model, inputs, wanted)
    assert not row["failures"]
    assert (row["sites"], row["fused"]) == (sites, sites), Counter(each["code"] for each in row["refused"])
    assert not is_wrong({"state": "ok", **row}), f"{row['worst']}: ratio {row['ratio']:.2f}"


def test_a_wrong_result_would_be_found():
    exact = {"out": torch.linspace(-1, 1, 50, dtype=torch.float64)}
    eager = {"out": exact["out"].float()}
    good, bad = ({"out": eager["out"] + ulps * torch.finfo(torch.float32).eps} for ulps in (1, 3 * ULPS))
    assert compare(good, eager, exact, torch.float32)[0] <= 2 < compare(bad, eager, exact, torch.float32)[0]
    nan: dict[str, Any] = {"out": torch.full((50,), torch.nan)}
    assert compare(nan, eager, exact, torch.float32)[0] == float("inf")


def test_the_zoo_is_large():
    assert len(NAMES) == len(set(NAMES))
    assert len(NAMES) >= 300
