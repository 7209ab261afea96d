"""A score in two steps, its loads at keys and the rest, is the score."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashfuse.codegen import launch
from flashfuse.codegen.emit import KERNELS
from flashfuse.codegen.score_functions import splice_text
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parent))
from specs import Program

M, N, BLOCK = 13, 11, 16
KERNEL = """


@triton.jit
def both(whole, parted, scores, b, h, M, N, inputs, BLOCK: tl.constexpr):
    m = tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, BLOCK)[None, :]
    s = tl.load(scores + m * BLOCK + n)
    loaded = load_ahead(b, h, m, n, m < M, n < N, M, N, inputs)
    tl.store(whole + m * BLOCK + n, kept_score(s, b, h, m, n, m < M, n < N, M, N, inputs))
    tl.store(parted + m * BLOCK + n, kept_score_of(s, loaded, b, h, m, n, m < M, n < N, M, N, inputs))
"""


def pair_bias(p: Program) -> tuple[AttentionSpec, list[torch.Tensor]]:
    """Evoformer: a mask of keys and a bias of pairs."""
    mask = p.capture("mask", Kind.FLOAT, p.b, p.n)
    pair = p.capture("pair", Kind.FLOAT, p.zero, p.h, p.m, p.n)
    return p.spec(p.s * 0.125 + (mask - 1.0) * 1e9 + pair), [torch.rand(2, N).half().round(), torch.randn(1, 3, M, N).half()]


def by_distance(p: Program) -> tuple[AttentionSpec, list[torch.Tensor]]:
    table = p.capture("table", Kind.FLOAT, p.h, (p.n - p.m) + (p.M - 1))
    return p.spec(p.s + table, EmptyRows.IMPOSSIBLE), [torch.randn(3, M + N - 1)]


def by_class(p: Program) -> tuple[AttentionSpec, list[torch.Tensor]]:
    """A bias at an index that is loaded itself, a slope of the head, a choice by a bool."""
    kind = p.capture("kind", Kind.INT, p.b, p.n)
    bias = p.capture("bias", Kind.FLOAT, p.m, kind)
    slope = p.capture("slope", Kind.FLOAT, p.h)
    near = p.capture("near", Kind.BOOL, p.m, p.n)
    score = p.s * slope + p.s.apply("where", near, bias, p.s)
    captures = [torch.randint(0, 5, (2, N)), torch.randn(M, 5), torch.rand(3), torch.rand(M, N) < 0.5]
    return p.spec(score, EmptyRows.IMPOSSIBLE), captures


def module_of(spec: AttentionSpec, folder: Path) -> ModuleType:
    path = folder / "parts.py"
    text = (KERNELS / "maths.py").read_text() + "\n\n" + splice_text(spec) + KERNEL
    path.write_text("import triton\nimport triton.language as tl\n\n" + text)
    specification = importlib.util.spec_from_file_location(f"parts_{folder.name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("make", "loads"), [(pair_bias, 2), (by_distance, 1), (by_class, 3)])
def test_both_steps_make_the_score(
    make: Callable[[Program], tuple[AttentionSpec, list[torch.Tensor]]], loads: int, tmp_path: Path
) -> None:
    spec, captures = make(Program())
    text = splice_text(spec)
    ahead = text.split("def load_ahead", 1)[1].split("def kept_score_of", 1)
    assert ahead[0].count("tl.load") == loads
    rest = ahead[1].split("@triton.jit", 1)[0]
    assert rest.count("loaded[") == loads
    assert rest.count("tl.load") == (1 if make is by_class else 0)  # the slope, which no key changes
    assert "LOADS_AHEAD = tl.constexpr(True)" in text
    shown = [c.view(torch.int8) if c.dtype is torch.bool else c for c in captures]
    inputs = tuple(word for capture in shown for word in (capture, *capture.stride()))
    scores, whole, parted = torch.randn(BLOCK, BLOCK), torch.empty(BLOCK, BLOCK), torch.empty(BLOCK, BLOCK)
    module_of(spec, tmp_path).both[(1,)](whole, parted, scores, 1, 2, M, N, inputs, BLOCK=BLOCK)
    assert torch.equal(whole, parted)
    assert not torch.equal(whole, scores)


def test_a_score_without_loads_at_keys_has_one_step() -> None:
    p = Program()
    text = splice_text(p.spec(p.s * p.capture("slope", Kind.FLOAT, p.h), EmptyRows.IMPOSSIBLE))
    assert "LOADS_AHEAD = tl.constexpr(False)" in text
    assert "return kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)" in text
