"""Attentions of few queries against many keys, where the keys are split over programs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parent))
from cases import EXACT, IMPOSSIBLE, NEVER, ZERO, _f, _mask_case, _never
from specs import LOWEST, Case, Program

N = 300


def _padding(generator: torch.Generator) -> list[Tensor]:
    """Of the second sequence nothing is left."""
    return [torch.arange(N)[None, :] >= torch.tensor([[260], [N]])]


def _padded(c: list[Tensor]) -> Tensor:
    return c[0][:, None, None, :]


def _masks() -> list[Case]:
    def last(p: Program) -> object:
        return p.n <= p.m + (p.N - p.M)

    def padded(p: Program) -> object:
        return p.capture("padding", Kind.BOOL, p.b, p.n)

    one, group, few = (2, 4, 1, 1, N, 16, 16), (1, 8, 2, 4, N, 16, 16), (2, 2, 2, 3, N, 16, 16)
    return [
        _mask_case("decode_causal", last, lambda c, z, i: i[3] <= i[2] + (N - 4), IMPOSSIBLE, shape=group),
        _mask_case(
            "decode_window",
            lambda p: last(p) & (p.m + (p.N - p.M) - p.n < p.size(0)),  # type: ignore[operator]
            lambda c, z, i: (i[3] <= i[2] + (N - 3)) & (i[2] + (N - 3) - i[3] < z[0]),
            IMPOSSIBLE, sizes=(70,), shape=few,
        ),
        _mask_case("decode_cache", lambda p: p.n <= p.capture("position", Kind.INT, p.m), lambda c, z, i: i[3] <= c[0][:, None],
                   EXACT, captures=lambda g: [torch.tensor([40, 41, 200])], fill=LOWEST, shape=few),
        _mask_case("decode_nothing", padded, lambda c, z, i: _padded(c), ZERO, captures=_padding, shape=one),
        _mask_case("decode_nothing_infinite", padded, lambda c, z, i: _padded(c), EXACT, captures=_padding, shape=one),
        _mask_case("decode_nothing_finite", padded, lambda c, z, i: _padded(c), EXACT, captures=_padding, fill=LOWEST,
                   additive=True, reference=torch.float32, shape=one),
        _mask_case("decode_heads", lambda p: p.n < p.capture("lengths", Kind.INT, p.h),
                   lambda c, z, i: i[3] < c[0][:, None, None], IMPOSSIBLE,
                   captures=lambda g: [torch.tensor([300, 1, 64, 129])], shape=(1, 4, 1, 2, N, 16, 16)),
    ]  # fmt: skip


def _scores() -> list[Case]:
    cases = []
    for name, shape, layout in (
        ("decode", (2, 8, 2, 1, N, 16, 16), "contiguous"), ("decode_odd", (1, 6, 2, 3, 289, 40, 24), "bmhe"),
        ("decode_full", (1, 16, 1, 1, 256, 16, 16), "contiguous"), ("decode_sixteen", (1, 2, 2, 16, N, 16, 16), "contiguous"),
        ("decode_prime", (1, 17, 1, 1, 256, 16, 16), "contiguous"),
    ):  # fmt: skip
        p = Program()
        cases.append(Case(name, p.spec(p.s * 0.25, IMPOSSIBLE), lambda s, c, z, i: s * 0.25, shape=shape, layout=layout))
    p = Program()
    cases.append(Case("decode_unproved", p.spec(p.s * 0.25), lambda s, c, z, i: s * 0.25, shape=(1, 4, 2, 2, N, 16, 16)))
    p = Program()
    slope = p.capture("slope", Kind.FLOAT, p.h) * _f(p.n - p.m)
    bias = p.capture("bias", Kind.FLOAT, p.zero, p.h, p.m, p.n)
    spec = p.spec(p.masked(p.n <= p.m + 290, (p.s * 0.25).apply("tanh", p.s * 0.25) + slope + bias, NEVER), IMPOSSIBLE)
    cases.append(Case(
        "decode_biases", spec,
        lambda s, c, z, i: _never(i[3] <= i[2] + 290, (s * 0.25).tanh() + c[0][:, None, None] * (i[3] - i[2]) + c[1]),
        lambda g: [-torch.rand(8, generator=g) / 100, torch.randn(1, 8, 2, N, generator=g)], shape=(1, 8, 4, 2, N, 16, 16),
        needs=(True, True),  # eight slopes: the largest of a few errors in sums that cancel is a matter of luck
    ))  # fmt: skip
    for name, mask in (("decode_sinks", False), ("decode_sinks_padded", True)):
        p = Program()
        score = p.s * 0.25
        if mask:
            score = p.masked(p.capture("padding", Kind.BOOL, p.b, p.n), score, LOWEST)
        spec = p.spec(score, EXACT if mask else IMPOSSIBLE, sink=p.capture("sink", Kind.FLOAT, p.h))
        cases.append(Case(
            name, spec, lambda s, c, z, i, mask=mask: _never(_padded(c), s * 0.25, LOWEST) if mask else s * 0.25,
            lambda g, mask=mask: [*(_padding(g) if mask else []), torch.randn(4, generator=g)], shape=(2, 4, 1, 1, N, 16, 16),
            needs=(False, True) if mask else (True,), sink=lambda c: c[-1][:, None, None],
        ))  # fmt: skip
    return cases


DECODE_CASES = [*_scores(), *_masks()]
