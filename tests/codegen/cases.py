"""The attentions that the kernels are tested on: each a spec and, independently of it, dense torch code."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flashfuse.ir import philox
from flashfuse.ir.attention_spec import EmptyRows
from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parent))
from specs import LOWEST, Case, Program

NEVER = float("-inf")
IMPOSSIBLE, ZERO, EXACT = EmptyRows.IMPOSSIBLE, EmptyRows.ZERO, EmptyRows.EXACT
Shape = tuple[int, int, int, int, int, int, int]
SMALL: Shape = (2, 2, 2, 37, 37, 16, 16)
LONG: Shape = (1, 2, 1, 70, 75, 16, 16)


def padded_and_biased(g: torch.Generator) -> list[Tensor]:
    """A row of the batch without keys, and a bias of -inf for a whole query: NaN where it has keys."""
    padding = torch.rand(2, 37, generator=g) < 0.7
    padding[1] = False
    bias = torch.randn(2, 37, 37, generator=g)
    bias[0, 3] = NEVER
    return [padding, bias]


def _f(value):  # type: ignore[no-untyped-def]
    return value.apply("to_float", value)


def _plain() -> list[Case]:
    cases = []
    for name, shape, layout in (
        ("plain", SMALL, "contiguous"), ("plain_odd", (1, 3, 3, 33, 65, 40, 40), "contiguous"),
        ("plain_gqa", (2, 4, 2, 20, 35, 16, 32), "bmhe"), ("plain_mqa", (1, 4, 1, 33, 16, 16, 16), "contiguous"),
        ("plain_dims", (1, 1, 1, 17, 19, 64, 17), "columns"), ("plain_d1", (1, 2, 2, 5, 6, 1, 1), "contiguous"),
        ("plain_d80", (1, 1, 1, 18, 34, 80, 80), "bmhe"), ("plain_one", (1, 1, 1, 1, 1, 16, 16), "contiguous"),
        ("plain_expanded", (3, 2, 2, 18, 18, 16, 16), "expanded"),
    ):  # fmt: skip
        p = Program()
        scale = 1 / math.sqrt(shape[5])
        spec = p.spec(p.s * scale, IMPOSSIBLE)
        cases.append(Case(name, spec, lambda s, c, z, i, scale=scale: s * scale, shape=shape, layout=layout))
    p = Program()
    cases.append(Case("plain_exact", p.spec(p.s / 4.0), lambda s, c, z, i: s / 4.0))
    p = Program()
    cases.append(Case("negative_scale", p.spec(p.s * -0.25, IMPOSSIBLE), lambda s, c, z, i: s * -0.25))
    return cases


def _mask_case(
    name: str, make: Callable[[Program], object], keep: Callable[..., Tensor], rows: EmptyRows, *, fill: float = NEVER,
    additive: bool = False, **more: object,
) -> Case:  # fmt: skip
    """A masked, scaled case. `keep(captures, sizes, indices)` is the dense predicate."""
    p = Program()
    kept = make(p)
    added = p.s * 0.25 + p.masked(kept, p.builder.const(0.0), fill)  # type: ignore[arg-type]
    result = added if additive else p.masked(kept, p.s * 0.25, fill)  # type: ignore[arg-type]

    def dense(s: Tensor, captures: list[Tensor], sizes: tuple[int, ...], indices: tuple[Tensor, ...]) -> Tensor:
        mask = keep(captures, sizes, indices)
        filled = torch.full((), fill, dtype=s.dtype)
        if additive:
            return s * 0.25 + torch.where(mask, torch.zeros((), dtype=s.dtype, device=s.device), filled.to(s.device))
        return torch.where(mask, s * 0.25, filled.to(s.device))

    return Case(name, p.spec(result, rows), dense, zero_rows=rows is ZERO, **more)  # type: ignore[arg-type]


def _masks() -> list[Case]:
    def causal(c, z, i):  # type: ignore[no-untyped-def]
        return i[3] <= i[2]

    def bounds(low: int, high: int, *shape: int) -> Callable[[torch.Generator], list[Tensor]]:
        return lambda generator: [torch.randint(low, high, shape, generator=generator)]

    def documents(p: Program) -> object:
        d = p.declare("document", Kind.INT, 2)
        return p.load(d, p.b, p.m).eq(p.load(d, p.b, p.n))

    def sorted_documents(generator: torch.Generator) -> list[Tensor]:
        return [torch.randint(0, 4, (2, 75), generator=generator).sort(-1).values]

    def padding(generator: torch.Generator) -> list[Tensor]:
        return [torch.arange(75)[None, :] < torch.tensor([[40], [75]])]

    def left_padding(generator: torch.Generator) -> list[Tensor]:
        return [torch.arange(75)[None, :] >= torch.tensor([[50], [3]])]

    def offset(p: Program) -> object:
        return p.n <= p.m + (p.N - p.M)

    def prefix(p: Program) -> object:
        return (p.n <= p.m) | (p.n < p.size(0))

    square: Shape = (2, 2, 1, 75, 75, 16, 16)
    return [
        _mask_case("causal", lambda p: p.n <= p.m, causal, IMPOSSIBLE, shape=(1, 2, 2, 75, 75, 16, 16)),
        _mask_case("causal_wide", lambda p: p.n <= p.m, causal, IMPOSSIBLE, shape=LONG),
        _mask_case("causal_exact", lambda p: p.n <= p.m, causal, EXACT, shape=LONG),
        _mask_case("causal_additive", lambda p: p.n <= p.m, causal, EXACT, fill=LOWEST, additive=True, shape=LONG),
        _mask_case("causal_end", offset, lambda c, z, i: i[3] <= i[2] + 5, IMPOSSIBLE, shape=LONG),
        _mask_case("causal_end_short", offset, lambda c, z, i: i[3] <= i[2] - 30, ZERO, shape=(1, 2, 2, 70, 40, 16, 16)),
        _mask_case(
            "window",
            lambda p: (p.n <= p.m) & (p.m - p.n < 20),
            lambda c, z, i: (i[3] <= i[2]) & (i[2] - i[3] < 20),
            IMPOSSIBLE,
            shape=(1, 2, 1, 75, 75, 16, 16),
        ),
        _mask_case(
            "window_sides",
            lambda p: (p.n - p.m <= 9) & (p.m - p.n <= p.size(0)),
            lambda c, z, i: (i[3] - i[2] <= 9) & (i[2] - i[3] <= z[0]),
            IMPOSSIBLE,
            sizes=(33,),
            shape=square,
        ),
        _mask_case("window_unbounded", lambda p: (p.n <= p.m) & (p.m - p.n < p.size(0)), causal, IMPOSSIBLE, sizes=(2**31 - 1,)),
        _mask_case("prefix", prefix, lambda c, z, i: (i[3] <= i[2]) | (i[3] < z[0]), IMPOSSIBLE, sizes=(41,), shape=square),
        _mask_case(
            "lengths",
            lambda p: p.n < p.capture("lengths", Kind.INT, p.b),
            lambda c, z, i: i[3] < c[0][:, None, None, None],
            IMPOSSIBLE,
            captures=bounds(20, 75, 2),
            shape=square,
        ),
        _mask_case(
            "padding",
            lambda p: p.capture("padding", Kind.BOOL, p.b, p.n),
            lambda c, z, i: c[0][:, None, None, :],
            IMPOSSIBLE,
            captures=padding,
            shape=square,
        ),
        _mask_case(
            "padding_zero",
            lambda p: p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m),
            lambda c, z, i: c[0][:, None, None, :] & (i[3] <= i[2]),
            ZERO,
            captures=left_padding,
            shape=square,
        ),
        _mask_case(
            "padding_infinite",
            lambda p: p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m),
            lambda c, z, i: c[0][:, None, None, :] & (i[3] <= i[2]),
            EXACT,
            captures=left_padding,
            shape=square,
        ),
        _mask_case(
            "padding_finite",
            lambda p: p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m),
            lambda c, z, i: c[0][:, None, None, :] & (i[3] <= i[2]),
            EXACT,
            fill=LOWEST,
            captures=left_padding,
            shape=square,
        ),
        _mask_case(
            "padding_additive",
            lambda p: p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m),
            lambda c, z, i: c[0][:, None, None, :] & (i[3] <= i[2]),
            EXACT,
            fill=-1e9,
            additive=True,
            reference=torch.float32,
            captures=left_padding,
            shape=square,
        ),
        _mask_case(
            "documents",
            documents,
            lambda c, z, i: c[0][:, None, :, None] == c[0][:, None, None, :],
            IMPOSSIBLE,
            captures=sorted_documents,
            shape=square,
        ),
        _mask_case(
            "documents_causal",
            lambda p: documents(p) & (p.n <= p.m),  # type: ignore[operator]
            lambda c, z, i: (c[0][:, None, :, None] == c[0][:, None, None, :]) & (i[3] <= i[2]),
            EXACT,
            captures=sorted_documents,
            shape=square,
        ),
        _mask_case(
            "sinks_window",
            lambda p: (p.n <= p.m) & ((p.n < 4) | (p.m - p.n < 20)),
            lambda c, z, i: (i[3] <= i[2]) & ((i[3] < 4) | (i[2] - i[3] < 20)),
            IMPOSSIBLE,
            shape=(1, 2, 1, 75, 75, 16, 16),
        ),
        _mask_case(
            "strips_finite",
            lambda p: (p.n < p.m - 50) | (p.n > p.m + 40),
            lambda c, z, i: (i[3] < i[2] - 50) | (i[3] > i[2] + 40),
            EXACT,
            fill=LOWEST,
            shape=(1, 2, 1, 75, 75, 16, 16),
        ),
        _mask_case(
            "chunks",
            lambda p: (p.n <= p.m) & p.m.apply("floordiv", p.m, 20).eq(p.n.apply("floordiv", p.n, 20)),
            lambda c, z, i: (i[3] <= i[2]) & (i[3] // 20 == i[2] // 20),
            IMPOSSIBLE,
            shape=(1, 2, 1, 75, 75, 16, 16),
        ),
        _mask_case(
            "documents_global",
            lambda p: (documents(p) & (p.n <= p.m)) | (p.n < 2),  # type: ignore[operator]
            lambda c, z, i: ((c[0][:, None, :, None] == c[0][:, None, None, :]) & (i[3] <= i[2])) | (i[3] < 2),
            IMPOSSIBLE,
            captures=lambda g: [torch.arange(75).expand(2, 75) // torch.tensor([[25], [70]])],
            shape=square,
        ),
        _mask_case(
            "tensor_mask",
            lambda p: p.capture("mask", Kind.BOOL, p.zero, p.h, p.m, p.n),
            lambda c, z, i: c[0],
            EXACT,
            captures=lambda g: [torch.rand(1, 2, 37, 37, generator=g) < 0.1],
        ),
        _mask_case(
            "every_other",
            lambda p: (p.m - p.n).apply("mod", p.m - p.n, 3).eq(1),
            lambda c, z, i: (i[2] - i[3]) % 3 == 1,
            ZERO,
            shape=SMALL,
        ),
    ]


def _scores() -> list[Case]:
    cases = []
    p = Program()
    capped = (p.s * 0.2).apply("tanh", p.s * 0.2) * 5.0
    cases.append(
        Case(
            "softcap",
            p.spec(p.masked(p.n <= p.m, capped, NEVER), IMPOSSIBLE),
            lambda s, c, z, i: torch.where(
                i[3] <= i[2], (s * 0.2).tanh() * 5.0, torch.full((), NEVER, dtype=s.dtype, device=s.device)
            ),
            shape=LONG,
        )
    )
    p = Program()
    small = p.s * 0.25
    functions = small.apply("sin", small) + small.apply("cos", small) + small.apply("erf", small)
    cases.append(
        Case(
            "sin_cos_erf",
            p.spec(functions, IMPOSSIBLE),
            lambda s, c, z, i: (s * 0.25).sin() + (s * 0.25).cos() + (s * 0.25).erf(),
        )
    )
    p = Program()
    slope = p.capture("slopes", Kind.FLOAT, p.h)
    cases.append(
        Case(
            "alibi",
            p.spec(p.masked(p.n <= p.m, p.s * 0.25 + slope * _f(p.n - p.m), NEVER), IMPOSSIBLE),
            lambda s, c, z, i: torch.where(
                i[3] <= i[2],
                s * 0.25 + c[0][:, None, None] * (i[3] - i[2]).to(s.dtype),
                torch.full((), NEVER, dtype=s.dtype, device=s.device),
            ),
            lambda g: [torch.rand(2, generator=g)],
            shape=LONG,
            needs=(True,),
        )
    )
    p = Program()
    scale = p.capture("scale", Kind.FLOAT)
    cases.append(
        Case(
            "learned_scale",
            p.spec(p.s * scale, IMPOSSIBLE),
            lambda s, c, z, i: s * c[0],
            lambda g: [torch.rand((), generator=g)],
            needs=(True,),
        )
    )
    for name, letters, shape in (
        ("bias_full", "bhmn", (2, 2, 37, 37)),
        ("bias_heads", "0hmn", (1, 2, 37, 37)),
        ("bias_batch", "b0mn", (2, 1, 37, 37)),
        ("bias_shared", "mn", (37, 37)),
        ("bias_transposed", "nm", (37, 37)),
    ):
        p = Program()
        letter = {"b": p.b, "h": p.h, "m": p.m, "n": p.n, "0": p.zero}
        bias = p.capture("bias", Kind.FLOAT, *(letter[x] for x in letters))
        spec = p.spec(p.s * 0.25 + bias, IMPOSSIBLE if name != "bias_heads" else EXACT)
        cases.append(
            Case(
                name,
                spec,
                lambda s, c, z, i, name=name: s * 0.25 + (c[0].mT if name == "bias_transposed" else c[0]),
                lambda g, shape=shape: [torch.randn(shape, generator=g)],
                needs=(True,),
            )
        )
    p = Program()
    factor, added = p.capture("factor", Kind.FLOAT, p.m, p.n), p.capture("added", Kind.FLOAT, p.h, p.m, p.n)
    cases.append(
        Case(
            "scaled_by_element",
            p.spec(p.s * factor + added),
            lambda s, c, z, i: s * c[0] + c[1],
            lambda g: [torch.rand(37, 37, generator=g), torch.randn(2, 37, 37, generator=g)],
            needs=(True, True),
        )
    )
    for name, own in (("zeros_after_a_mask", True), ("zeros_after_another_mask", False)):
        p = Program()
        padding = p.capture("padding", Kind.BOOL, p.b, p.n)
        bias = p.capture("bias", Kind.FLOAT, p.h, p.m, p.n)
        spec = p.spec(p.masked(padding, p.s * 0.25 + bias, NEVER), weight=p.masked(padding if own else p.n < 30, p.p, 0.0))
        cases.append(
            Case(
                name,
                spec,
                lambda s, c, z, i: torch.where(c[0][:, None, None, :], s * 0.25 + c[1], NEVER),
                padded_and_biased,
                needs=(False, True),
                weight=lambda p, c, i, own=own: torch.where(c[0][:, None, None, :] if own else i[3] < 30, p, 0.0),
            )
        )
    p = Program()
    masked_bias = p.capture("bias", Kind.FLOAT, p.m, p.n)
    cases.append(
        Case(
            "bias_causal",
            p.spec(p.masked(p.n <= p.m - 3, p.s * 0.25 + masked_bias, LOWEST)),
            lambda s, c, z, i: torch.where(
                i[3] <= i[2] - 3, s * 0.25 + c[0], torch.full((), LOWEST, dtype=s.dtype, device=s.device)
            ),
            lambda g: [torch.randn(40, 37, generator=g)[:37]],
            needs=(True,),
        )
    )
    p = Program()
    low_bias = p.capture("bias", Kind.FLOAT, p.b, p.zero, p.zero, p.n)

    def low_rows(g: torch.Generator) -> list[Tensor]:
        bias = torch.randn(2, 1, 1, 37, generator=g)
        bias[0, 0, 0, :20] = LOWEST
        bias[1] = LOWEST
        return [bias]

    cases.append(Case("float_mask", p.spec(p.s * 0.25 + low_bias), lambda s, c, z, i: s * 0.25 + c[0], low_rows))
    p = Program()
    high_bias = p.capture("bias", Kind.FLOAT, p.b, p.zero, p.zero, p.n)
    cases.append(
        Case(
            "float_mask_negated",
            p.spec(p.s * 0.25 - high_bias),
            lambda s, c, z, i: s * 0.25 - c[0],
            low_rows,
        )
    )
    p = Program()
    low_bias = p.capture("bias", Kind.FLOAT, p.b, p.zero, p.zero, p.n)
    cases.append(
        Case(
            "float_mask_causal",
            p.spec(p.masked(p.n <= p.m, p.s * 0.25 + low_bias, NEVER)),
            lambda s, c, z, i: torch.where(i[3] <= i[2], s * 0.25 + c[0], torch.full((), NEVER, dtype=s.dtype, device=s.device)),
            low_rows,
        )
    )
    p = Program()
    column, row = p.capture("column", Kind.FLOAT, p.h, p.n), p.capture("row", Kind.FLOAT, p.b, p.m)
    x = p.s * row + column * column
    cases.append(
        Case(
            "row_and_column",
            p.spec(p.masked(p.n <= p.m - 2, x, LOWEST)),
            lambda s, c, z, i: torch.where(
                i[3] <= i[2] - 2,
                s * c[1][:, None, :, None] + c[0][None, :, None, :] ** 2,
                torch.full((), LOWEST, dtype=s.dtype, device=s.device),
            ),
            lambda g: [torch.randn(2, 37, generator=g), torch.rand(2, 37, generator=g)],
            needs=(True, True),
        )
    )
    p = Program()
    table = p.declare("table", Kind.FLOAT, 2)
    place = (p.n - p.m).apply("maximum", (p.n - p.m).apply("minimum", p.n - p.m, 8), -8) + 8
    cases.append(
        Case(
            "relative",
            p.spec(p.s * 0.25 + p.load(table, p.h, place), IMPOSSIBLE),
            lambda s, c, z, i: s * 0.25 + c[0][:, ((i[3] - i[2]).clamp(-8, 8) + 8)[0, 0]],
            lambda g: [torch.randn(2, 17, generator=g)],
        )
    )
    return cases


def dropped(p: Tensor, seed: Tensor, rate: float, indices: tuple[Tensor, ...]) -> Tensor:
    """Dropout by the mask of a seed, each element by itself."""
    bits = philox.random_bits(seed.cpu(), *torch.broadcast_tensors(*(index.cpu() for index in indices)))
    threshold, factor = philox.dropping(rate)
    return p * torch.where(bits < threshold, 0.0, factor).to(p)


def _seed(generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(-(2**63), 2**63 - 1, (), generator=generator)]


def _never(keep: Tensor, s: Tensor, fill: float = NEVER) -> Tensor:
    return torch.where(keep, s, torch.full((), fill, dtype=s.dtype, device=s.device))


def _left_padding(generator: torch.Generator) -> list[Tensor]:
    return [torch.arange(37)[None, :] >= torch.tensor([[20], [3]])]


def _dense_low(s: Tensor, c: list[Tensor], z: tuple[int, ...], i: tuple[Tensor, ...]) -> Tensor:
    return _never(c[0][:, None, None, :] & (i[3] <= i[2]), s * 0.25, LOWEST)


def _diagonals() -> list[Case]:
    """A bias by the distance of query and key, of heads and of batches, with and without low rows."""
    cases = []
    small, other = (1, 2, 1, 37, 45, 16, 16), (2, 2, 1, 18, 33, 16, 16)
    for name, letter, fill, shape in (("diagonals", "h", NEVER, small), ("diagonals_low", "b", LOWEST, other)):
        p = Program()
        table = p.capture("table", Kind.FLOAT, getattr(p, letter), (p.n - p.m) + (p.M - 1))
        own = p.n <= p.m - 3 if letter == "b" else p.n <= p.m
        spec = p.spec(p.masked(own, p.s * 0.25 + table * 2.0, fill), EXACT if letter == "b" else IMPOSSIBLE)

        def dense(s, c, z, i, letter=letter, fill=fill):  # type: ignore[no-untyped-def]
            bias = c[0][:, i[3] - i[2] + s.shape[2] - 1].reshape(-1, *s.shape[2:])
            bias = bias if letter == "h" else bias[:, None]
            keep = i[3] <= (i[2] - 3 if letter == "b" else i[2])
            return torch.where(keep, s * 0.25 + bias * 2.0, torch.full((), fill, dtype=s.dtype, device=s.device))

        count = shape[3] + shape[4] - 1
        cases.append(Case(name, spec, dense, lambda g, count=count: [torch.randn(2, count, generator=g)],
                          shape=shape, needs=(True,)))  # fmt: skip
    return cases


def _weights() -> list[Case]:
    square: Shape = (2, 2, 1, 37, 37, 16, 16)
    cases = []
    for name, rate, shape in (("dropout", 0.25, LONG), ("dropout_gqa", 0.5, (1, 4, 2, 20, 20, 16, 32))):
        p = Program()
        spec = p.spec(p.masked(p.n <= p.m, p.s * 0.25, NEVER), IMPOSSIBLE, weight=p.dropped(p.p, rate))
        cases.append(Case(name, spec, lambda s, c, z, i: _never(i[3] <= i[2], s * 0.25), _seed, shape=shape,
                          weight=lambda p, c, i, rate=rate: dropped(p, c[0], rate, i)))  # fmt: skip
    p = Program()
    spec = p.spec(p.s, IMPOSSIBLE, weight=p.p * 0.0)
    cases.append(Case("dropout_of_all", spec, lambda s, c, z, i: s, weight=lambda p, c, i: p * 0.0))
    p = Program()
    kept = p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m)
    spec = p.spec(p.masked(kept, p.s * 0.25, LOWEST), weight=p.dropped(p.p, 0.5))
    cases.append(Case("dropout_low_rows", spec, _dense_low,
                      lambda g: [*_left_padding(g), *_seed(g)], shape=square,
                      weight=lambda p, c, i: dropped(p, c[1], 0.5, i)))  # fmt: skip
    p = Program()
    kept = p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m)
    spec = p.spec(p.s * 0.25, IMPOSSIBLE, weight=p.masked(kept, p.p, 0.0))
    cases.append(Case("mask_after_softmax", spec, lambda s, c, z, i: s * 0.25, _left_padding, shape=square,
                      weight=lambda p, c, i: p * (c[0][:, None, None, :] & (i[3] <= i[2])).to(p)))  # fmt: skip
    p = Program()
    head = p.declare("head", Kind.FLOAT, 1)
    query, key = p.capture("query", Kind.FLOAT, p.b, p.m), p.capture("key", Kind.FLOAT, p.n)
    spec = p.spec(p.masked(p.n <= p.m, p.s * p.load(head, p.h), NEVER), IMPOSSIBLE, weight=p.p * p.load(head, p.h) * query / key)
    cases.append(Case("weight_vectors", spec, lambda s, c, z, i: _never(i[3] <= i[2], s * c[0][:, None, None]),
                      lambda g: [torch.rand(2, generator=g), torch.randn(2, 37, generator=g), torch.rand(37, generator=g) + 0.5],
                      needs=(True, True, True),
                      weight=lambda p, c, i: p * c[0][:, None, None] * c[1][:, None, :, None] / c[2]))  # fmt: skip
    p = Program()
    element = p.capture("element", Kind.FLOAT, p.zero, p.h, p.m, p.n)
    spec = p.spec(p.masked(p.n <= p.m - 2, p.s + element, LOWEST), weight=p.p * element)
    cases.append(Case("weight_matrix", spec, lambda s, c, z, i: _never(i[3] <= i[2] - 2, s + c[0], LOWEST),
                      lambda g: [torch.randn(1, 2, 37, 37, generator=g)], needs=(True,),
                      weight=lambda p, c, i: p * c[0]))  # fmt: skip
    return cases


def _sinks() -> list[Case]:
    square: Shape = (2, 2, 1, 37, 37, 16, 16)
    cases = []
    p = Program()
    spec = p.spec(p.masked(p.capture("padding", Kind.BOOL, p.b, p.n), p.s * 0.25, NEVER), IMPOSSIBLE, sink=p.builder.const(0.0))
    cases.append(Case("softmax_plus_one", spec, lambda s, c, z, i: _never(c[0][:, None, None, :], s * 0.25),
                      lambda g: [torch.arange(37)[None, :] >= torch.tensor([[37], [3]])], shape=square,
                      sink=lambda c: torch.zeros(1, device=c[0].device)))  # fmt: skip
    for name, mask in (("sinks_causal", True), ("sinks_plain", False)):
        p = Program()
        sink = p.capture("sink", Kind.FLOAT, p.h)
        spec = p.spec(p.masked(p.n <= p.m, p.s * 0.25, NEVER) if mask else p.s * 0.25, IMPOSSIBLE, sink=sink)
        cases.append(Case(name, spec, lambda s, c, z, i, mask=mask: _never(i[3] <= i[2], s * 0.25) if mask else s * 0.25,
                          lambda g: [torch.randn(2, generator=g) * 3], shape=LONG, needs=(True,),
                          sink=lambda c: c[0][:, None, None]))  # fmt: skip
    p = Program()
    row, column = p.capture("row", Kind.FLOAT, p.b, p.h, p.m), p.capture("column", Kind.FLOAT, p.n)
    spec = p.spec(p.s * 0.25 + column, sink=row * 2.0, weight=p.p * row)
    cases.append(Case("sinks_rows", spec, lambda s, c, z, i: s * 0.25 + c[1],
                      lambda g: [torch.randn(2, 2, 37, generator=g), torch.randn(37, generator=g)], needs=(True, True),
                      sink=lambda c: c[0][..., None] * 2.0, weight=lambda p, c, i: p * c[0][..., None]))  # fmt: skip
    p = Program()
    kept = p.capture("padding", Kind.BOOL, p.b, p.n) & (p.n <= p.m)
    spec = p.spec(p.masked(kept, p.s * 0.25, LOWEST), sink=p.capture("sink", Kind.FLOAT, p.h))
    for name, sinks in (("sinks_low", [0.5, LOWEST]), ("sinks_lower", [NEVER, -2.0e4])):
        cases.append(Case(name, spec, _dense_low,
                          lambda g, sinks=sinks: [*_left_padding(g), torch.tensor(sinks)], shape=square, needs=(False, True),
                          sink=lambda c: c[1][:, None, None]))  # fmt: skip
    return cases


def pair_bias(length: int, head_dim: int) -> Case:
    """Evoformer's: a mask of keys that is added, and a bias of pairs that all batches share."""
    p = Program()
    mask = p.capture("mask", Kind.FLOAT, p.b, p.n)
    pair = p.capture("pair", Kind.FLOAT, p.zero, p.h, p.m, p.n)
    return Case(
        "pair_bias",
        p.spec(p.s * 0.25 + (mask - 1.0) * 1e9 + pair),
        lambda s, c, z, i: s * 0.25 + (c[0][:, None, None] - 1.0) * 1e9 + c[1],
        lambda g: [(torch.rand(4, length, generator=g) < 0.9).float(), torch.randn(1, 4, length, length, generator=g)],
        shape=(4, 4, 2, length, length, head_dim, head_dim),
        needs=(False, True),
    )


CASES = [*_plain(), *_masks(), *_scores(), *_diagonals(), *_weights(), *_sinks()]
WIDE = [  # head dims above 256
    dataclasses.replace(next(case for case in CASES if case.name == name), name=f"{name}_wide", shape=shape)
    for name, shape in (("causal", (1, 2, 1, 33, 40, 512, 512)), ("causal_exact", (1, 2, 2, 21, 34, 300, 20)))
]
