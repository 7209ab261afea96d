"""Random masks and fills: leaving blocks out changes no result, rows without a key and NaN included.

The reference is eager code in the same precision, since a row of fills depends on how scores are rounded beside them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashfuse import attention_op
from flashfuse.chunk_ranges import Shape, chunk_ranges
from flashfuse.ir.attention_spec import AttentionSpec, Capture
from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parents[1] / "ir"))
from programs import Predicates, on_grid

FILLS = (float("-inf"), torch.finfo(torch.float32).min, -1.0e9)
CAPTURES = (Capture("document", Kind.INT, 1), Capture("real", Kind.BOOL, 1))


def make(seed: int, additive: bool, fill: float) -> tuple[AttentionSpec, Predicates]:
    """A random mask on scaled scores, half of them also over documents and padding."""
    makes = Predicates(seed, vectors=seed % 2 == 0)
    keep, score = makes.predicate(), makes.builder.leaf("score") * 0.5
    op = makes.builder.op
    filled = score + op("where", keep, 0.0, fill) if additive else op("where", keep, score, fill)
    return AttentionSpec(makes.builder.program(filled), CAPTURES), makes


def vectors(seed: int, length: int) -> list[Tensor]:
    chance = random.Random(seed)
    ids = torch.arange(length) // chance.randint(length // 5, length)
    return [ids if seed % 4 else ids[torch.randperm(length)], torch.arange(length) >= chance.randint(0, length // 2)]


def check(seed: int, M: int, N: int) -> AttentionSpec:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    fill = chance.choice(FILLS)
    spec, _ = make(seed, chance.random() < 0.4 and fill != float("-inf"), fill)
    captures, sizes = vectors(seed, max(M, N)), [chance.randint(0, N)]
    inputs = [torch.randn(1, 1, length, 16, requires_grad=True) for length in (M, N, N)]
    grad_out = torch.randn(1, 1, M, 16)
    query, key, value = inputs
    scores = (query @ key.mT)[0, 0]
    grid = on_grid_float32(spec, M, N, scores, captures, sizes)
    expected = torch.softmax(grid, -1) @ value
    expected_grads = torch.autograd.grad(expected, inputs, grad_out)
    out = torch.ops.flashfuse.attention(*inputs, captures, sizes, spec.to_text(), "bhme")[0]
    grads = torch.autograd.grad(out, inputs, grad_out)
    for mine, eager in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4, equal_nan=True)
    return spec


def on_grid_float32(spec: AttentionSpec, M: int, N: int, scores: Tensor, captures: list[Tensor], sizes: list[int]) -> Tensor:
    """The final scores as eager code computes them."""
    keep = spec.split.keep
    if keep is None:
        return on_grid(spec.score, M, N, score=scores, captures=captures, sizes=sizes).to(scores.dtype)
    kept = on_grid(keep, M, N, captures=captures, sizes=sizes)
    whole = spec.score.statements[spec.score.result]
    fill = torch.tensor(spec.split.fill)
    if whole.op == "add":
        return scores * 0.5 + torch.where(kept, torch.tensor(0.0), fill)
    return torch.where(kept, scores * 0.5, fill)


@pytest.mark.parametrize("seed", range(40))
def test_in_chunks(seed: int) -> None:
    check(seed, 190, 230 if seed % 3 else 190)


@pytest.mark.parametrize("seed", range(4))
def test_in_kernels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("triton was imported for the device")
    for name in ("TRITON_INTERPRET", "FLASHFUSE_INTERPRET", "FLASHFUSE_STRICT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(attention_op, "_failed", {})
    check(102 + seed, 70, 70 if seed % 2 else 85)


def test_blocks_are_skipped() -> None:
    """The random masks above are no test of skipping if nothing is skipped."""
    skipping = 0
    for seed in range(60):
        spec, _ = make(seed, False, float("-inf"))
        if spec.split.keep is None:
            continue
        ranges = chunk_ranges(spec, Shape(1, 1, 1, 190, 230), 64, vectors(seed, 230), [90], torch.float32)
        skipping += bool((ranges.table[1] - ranges.table[0]).min() < 230)
    assert skipping > 20
