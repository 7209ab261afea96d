"""Kinds of attention with their specs and, written independently in plain torch, their dense scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashfuse.ir import philox
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind

NEVER = -math.inf
LOWEST = torch.finfo(torch.float32).min


class Write:
    """Leaves of a score program under construction, and the captures declared on the way."""

    def __init__(self) -> None:
        self.builder = Builder()
        self.captures: list[Capture] = []
        self.s = self.builder.leaf("score")
        self.b, self.h, self.m, self.n = (self.builder.leaf("index", letter) for letter in "bhmn")
        self.M, self.N = self.builder.leaf("length", "M"), self.builder.leaf("length", "N")
        self.size = self.builder.leaf("size", 0, Kind.INT)
        self.zero = self.builder.const(0)
        self.p = self.builder.leaf("probability")

    def dropped(self, x: Value, p: float) -> Value:
        """`x` after dropout, with the seed as a capture."""
        seed = self.load("seed", Kind.INT)
        bits = seed.apply("random_bits", seed, self.b, self.h, self.m, self.n)
        return x * x.apply("where", bits < round(p * 2**philox.BITS), 0.0, 1 / (1 - p))

    def load(self, name: str, kind: Kind, *indices: Value) -> Value:
        """An element of a capture, declared at its first use."""
        known = [capture.name for capture in self.captures]
        if name not in known:
            self.captures.append(Capture(name, kind, len(indices)))
            known.append(name)
        return self.builder.leaf("load", known.index(name), kind, indices)

    def mask(self, keep: Value, x: Value, fill: float = NEVER) -> Value:
        return x.apply("where", keep, x, fill)

    def real(self, x: Value) -> Value:
        return x.apply("to_float", x)


@dataclass(frozen=True)
class Family:
    """`spec` and `dense(s, captures, b, h, m, n)` say the same; `captures(B, H, M, N)` makes tensors, floats in float64.

    So do `sink(captures)`, which broadcasts to `[B, H, M, 1]`, and `weight(p, captures, b, h, m, n)`.
    """

    name: str
    spec: AttentionSpec
    dense: Callable[..., Tensor]
    captures: Callable[[int, int, int, int], Sequence[Tensor]] = lambda B, H, M, N: ()
    needs: tuple[bool, ...] = ()
    sizes: tuple[int, ...] = ()
    shape: tuple[int, int, int, int, int, int, int] = (2, 4, 4, 90, 90, 8, 8)  # B H G M N D E
    sink: Callable[..., Tensor] | None = None
    weight: Callable[..., Tensor] | None = None


def family(name: str, write: Callable[[Write], Value], dense: Callable[..., Tensor], *,
           rows: EmptyRows = EmptyRows.EXACT, sink: Callable[[Write], Value] | None = None,
           weight: Callable[[Write], Value] | None = None, **more) -> Family:  # fmt: skip
    w = Write()
    result = w.builder.program(write(w))
    programs = {"sink": sink, "weight": weight}
    written = {name: w.builder.program(make(w)) for name, make in programs.items() if make is not None}
    spec = AttentionSpec(result, tuple(w.captures), rows, **written)
    spec.verify()
    more.setdefault("needs", (False,) * len(w.captures))
    more |= {name: more.pop(f"dense_{name}") for name in written}
    return Family(name, spec, dense, **more)


def fill(keep: Tensor, x: Tensor, value: float = NEVER) -> Tensor:
    return torch.where(keep, x, torch.tensor(value, dtype=x.dtype))


def _documents(B: int, H: int, M: int, N: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 4, (B, N)).sort(-1).values,)


def _padding(*lengths: int, left: bool = False) -> Callable[[int, int, int, int], tuple[Tensor, ...]]:
    def make(B: int, H: int, M: int, N: int) -> tuple[Tensor, ...]:
        ends = torch.tensor(lengths)[:, None]
        return (torch.arange(N) >= ends if left else torch.arange(N) < ends,)

    return make


def _randn(*letters: str) -> Callable[[int, int, int, int], tuple[Tensor, ...]]:
    def make(B: int, H: int, M: int, N: int) -> tuple[Tensor, ...]:
        sizes = {"b": B, "h": H, "m": M, "n": N, "1": 1}
        return tuple(torch.randn([sizes[letter] for letter in word], dtype=torch.float64) for word in letters)

    return make


def _causal_padded(w: Write) -> Value:
    return w.load("padding", Kind.BOOL, w.b, w.n) & (w.n <= w.m)


def _dense_causal_padded(value: float) -> Callable[..., Tensor]:
    return lambda s, c, b, h, m, n: fill(c[0][:, None, None, :] & (n <= m), s * 0.3, value)


def _lows(B: int, H: int, M: int, N: int) -> tuple[Tensor, ...]:
    """A float mask: some batches wholly lowest, some keys lowest, as Hugging Face makes them."""
    bias = torch.zeros(B, 1, 1, N, dtype=torch.float64)
    bias[0, ..., : N // 2] = LOWEST
    bias[1] = LOWEST
    return (bias,)


def _seeded(*letters: str) -> Callable[[int, int, int, int], tuple[Tensor, ...]]:
    """Random floats, and a seed behind them."""
    return lambda B, H, M, N: (*_randn(*letters)(B, H, M, N), torch.tensor(0x123456789ABCDEF))


def _dropped(x: Tensor, seed: Tensor, p: float, *index: Tensor) -> Tensor:
    """Dropout by the mask of a seed, taken element for element and not tile by tile."""
    whole = torch.broadcast_tensors(*index)
    bits = philox.random_bits(seed, *whole)
    return torch.where(bits < p * 2**philox.BITS, torch.zeros((), dtype=x.dtype), x / (1 - p))


SQUARE, WIDE = (2, 4, 4, 90, 90, 8, 8), (2, 4, 2, 70, 150, 8, 12)
IMPOSSIBLE, ZERO, EXACT = EmptyRows.IMPOSSIBLE, EmptyRows.ZERO, EmptyRows.EXACT

FAMILIES = [
    family("plain", lambda w: w.s * 0.3, lambda s, c, *i: s * 0.3, rows=IMPOSSIBLE),
    family("unscaled", lambda w: w.s, lambda s, c, *i: s, rows=IMPOSSIBLE, shape=WIDE),
    family("divided", lambda w: w.s / 3.0, lambda s, c, *i: s / 3.0),
    family("causal", lambda w: w.mask(w.n <= w.m, w.s * 0.3), lambda s, c, b, h, m, n: fill(n <= m, s * 0.3), rows=IMPOSSIBLE),
    family("causal_end", lambda w: w.mask(w.n <= w.m + (w.N - w.M), w.s), lambda s, c, b, h, m, n: fill(n <= m + 80, s),
           rows=IMPOSSIBLE, shape=WIDE),
    family("causal_end_empty", lambda w: w.mask(w.n <= w.m + (w.N - w.M), w.s), lambda s, c, b, h, m, n: fill(n <= m - 30, s),
           shape=(1, 2, 2, 80, 50, 8, 8)),
    family("window", lambda w: w.mask((w.n <= w.m) & (w.m - w.n < 20), w.s * 0.3),
           lambda s, c, b, h, m, n: fill((n <= m) & (m - n < 20), s * 0.3), rows=IMPOSSIBLE, shape=(1, 2, 1, 200, 200, 8, 8)),
    family("window_of_size", lambda w: w.mask((w.n <= w.m) & (w.m - w.n < w.size), w.s * 0.3, LOWEST),
           lambda s, c, b, h, m, n: fill((n <= m) & (m - n < 33), s * 0.3, LOWEST), sizes=(33,)),
    family("prefix", lambda w: w.mask((w.n <= w.m) | (w.n < w.size), w.s), lambda s, c, b, h, m, n: fill((n <= m) | (n < 40), s),
           sizes=(40,), rows=IMPOSSIBLE),
    family("lengths", lambda w: w.mask(w.n < w.load("length", Kind.INT, w.b), w.s),
           lambda s, c, b, h, m, n: fill(n < c[0][:, None, None, None], s), captures=lambda *_: (torch.tensor([30, 90]),)),
    family("lengths_by_head", lambda w: w.mask(w.n < w.load("length", Kind.INT, w.h), w.s, -1e9),
           lambda s, c, b, h, m, n: fill(n < c[0][:, None, None], s, -1e9),
           captures=lambda *_: (torch.tensor([0, 90, 7, 64]),)),
    family("padding", lambda w: w.mask(w.load("padding", Kind.BOOL, w.b, w.n), w.s),
           lambda s, c, b, h, m, n: fill(c[0][:, None, None, :], s), captures=_padding(13, 90)),
    family("documents", lambda w: w.mask(w.load("document", Kind.INT, w.b, w.m).eq(w.load("document", Kind.INT, w.b, w.n)), w.s),
           lambda s, c, b, h, m, n: fill(c[0][:, None, :, None] == c[0][:, None, None, :], s), captures=_documents,
           shape=(2, 4, 2, 180, 180, 8, 8)),
    family("documents_causal", lambda w: w.mask(
        w.load("document", Kind.INT, w.b, w.m).eq(w.load("document", Kind.INT, w.b, w.n)) & (w.n <= w.m), w.s),
           lambda s, c, b, h, m, n: fill((c[0][:, None, :, None] == c[0][:, None, None, :]) & (n <= m), s),
           captures=_documents, rows=IMPOSSIBLE, shape=(2, 4, 2, 180, 180, 8, 8)),
    family("rows_all_masked_infinite", lambda w: w.mask(_causal_padded(w), w.s * 0.3), _dense_causal_padded(NEVER),
           captures=_padding(40, 3, left=True)),
    family("rows_all_masked_lowest", lambda w: w.mask(_causal_padded(w), w.s * 0.3, LOWEST), _dense_causal_padded(LOWEST),
           captures=_padding(40, 3, left=True)),
    family("rows_all_masked_zero", lambda w: w.mask(_causal_padded(w), w.s * 0.3), _dense_causal_padded(NEVER),
           captures=_padding(40, 3, left=True), rows=ZERO),
    family("float_mask", lambda w: w.s * 0.3 + w.load("mask", Kind.FLOAT, w.b, w.zero, w.zero, w.n),
           lambda s, c, *i: s * 0.3 + c[0], captures=_lows),
    family("float_mask_causal", lambda w: w.mask(w.n <= w.m, w.s * 0.3 + w.load("mask", Kind.FLOAT, w.b, w.zero, w.zero, w.n)),
           lambda s, c, b, h, m, n: fill(n <= m, s * 0.3 + c[0]), captures=_lows),
    family("mask_matrix", lambda w: w.mask(w.load("mask", Kind.BOOL, w.zero, w.h, w.m, w.n), w.s, -1e9),
           lambda s, c, *i: fill(c[0], s, -1e9), captures=lambda B, H, M, N: (torch.rand(1, H, M, N) < 0.03,)),
    family("alibi", lambda w: w.mask(w.n <= w.m, w.s * 0.3 + w.load("slope", Kind.FLOAT, w.h) * w.real(w.n - w.m)),
           lambda s, c, b, h, m, n: fill(n <= m, s * 0.3 + c[0][:, None, None] * (n - m)), captures=_randn("h"), needs=(True,),
           rows=IMPOSSIBLE),
    family("softcap", lambda w: w.mask(w.n <= w.m, (w.s * 0.1).apply("tanh", w.s * 0.1) * 5.0),
           lambda s, c, b, h, m, n: fill(n <= m, (s * 0.1).tanh() * 5.0), rows=IMPOSSIBLE),
    family("bias", lambda w: w.s * 0.3 + w.load("bias", Kind.FLOAT, w.b, w.h, w.m, w.n), lambda s, c, *i: s * 0.3 + c[0],
           captures=_randn("bhmn"), needs=(True,), shape=WIDE),
    family("bias_of_heads", lambda w: w.mask(w.n <= w.m, w.s + w.load("bias", Kind.FLOAT, w.zero, w.h, w.m, w.n), LOWEST),
           lambda s, c, b, h, m, n: fill(n <= m, s + c[0], LOWEST), captures=_randn("1hmn"), needs=(True,),
           shape=(2, 4, 2, 90, 90, 8, 8)),
    family("bias_of_batches", lambda w: w.s - w.load("bias", Kind.FLOAT, w.b, w.zero, w.m, w.n), lambda s, c, *i: s - c[0],
           captures=_randn("b1mn"), needs=(True,)),
    family("bias_transposed", lambda w: w.load("bias", Kind.FLOAT, w.n, w.m) + w.s * 0.3, lambda s, c, *i: s * 0.3 + c[0].mT,
           captures=_randn("nm"), needs=(True,)),
    family("scale", lambda w: w.s * w.load("scale", Kind.FLOAT), lambda s, c, *i: s * c[0], captures=_randn(""), needs=(True,)),
    family("row_and_column", lambda w: w.mask(
        w.n <= w.m - 2, w.s * w.load("row", Kind.FLOAT, w.b, w.m) + w.load("column", Kind.FLOAT, w.h, w.n) * 2.0, LOWEST),
           lambda s, c, b, h, m, n: fill(n <= m - 2, s * c[0][:, None, :, None] + c[1][None, :, None, :] * 2.0, LOWEST),
           captures=_randn("bm", "hn"), needs=(True, True)),
    family("logarithm", lambda w: w.mask(w.n <= w.m, w.s + (w.load("x", Kind.FLOAT, w.n) * w.real(w.m + 1 - w.n)).apply(
        "log", w.load("x", Kind.FLOAT, w.n) * w.real(w.m + 1 - w.n))),  # NaN and infinite where the mask drops
           lambda s, c, b, h, m, n: fill(n <= m, s + (c[0] * (m + 1 - n).clamp_min(1)).log()),
           captures=lambda B, H, M, N: (torch.rand(N, dtype=torch.float64) + 0.5,), needs=(True,), rows=IMPOSSIBLE),
    family("relative_table", lambda w: w.s + w.load("table", Kind.FLOAT, w.h, w.n - w.m + (w.M - 1)),
           lambda s, c, b, h, m, n: s + c[0][:, (n - m + s.shape[2] - 1)[0, 0]],
           captures=lambda B, H, M, N: (torch.randn(H, M + N, dtype=torch.float64),), needs=(True,)),
    family("table_by_sum", lambda w: w.s + w.load("table", Kind.FLOAT, w.h, w.n + w.m),
           lambda s, c, b, h, m, n: s + c[0][:, (n + m)[0, 0]],
           captures=lambda B, H, M, N: (torch.randn(H, M + N, dtype=torch.float64),)),
    family("relative_bias", lambda w: w.mask(
        w.n <= w.m - 2, w.s * 0.3 + w.load("table", Kind.FLOAT, w.b, w.n - w.m + (w.M - 1)) * w.load("x", Kind.FLOAT, w.n),
        LOWEST),
           lambda s, c, b, h, m, n: fill(
               n <= m - 2, s * 0.3 + (c[0][:, (n - m + s.shape[2] - 1)[0, 0]] * c[1]).unsqueeze(1), LOWEST),
           captures=lambda B, H, M, N: (torch.randn(B, M + N - 1, dtype=torch.float64), torch.randn(N, dtype=torch.float64)),
           needs=(True, True)),
    family("dropout", lambda w: w.mask(w.n <= w.m, w.s * 0.3), lambda s, c, b, h, m, n: fill(n <= m, s * 0.3),
           rows=IMPOSSIBLE, weight=lambda w: w.dropped(w.p, 0.3),
           dense_weight=lambda p, c, *i: _dropped(p, c[0], 0.3, *i), captures=_seeded()),
    family("dropout_of_low_rows", lambda w: w.mask(w.load("padding", Kind.BOOL, w.b, w.n) & (w.n <= w.m), w.s * 0.3, LOWEST),
           _dense_causal_padded(LOWEST), weight=lambda w: w.dropped(w.p, 0.5),
           dense_weight=lambda p, c, *i: _dropped(p, c[1], 0.5, *i),
           captures=lambda *sizes: (*_padding(40, 3, left=True)(*sizes), torch.tensor(-7)), shape=(2, 4, 2, 90, 90, 8, 8)),
    family("mask_after_softmax", lambda w: w.s * 0.3, lambda s, c, *i: s * 0.3, rows=IMPOSSIBLE,
           weight=lambda w: w.mask((w.n <= w.m) & w.load("padding", Kind.BOOL, w.b, w.n), w.p, 0.0),
           dense_weight=lambda p, c, b, h, m, n: fill((n <= m) & c[0][:, None, None, :], p, 0.0), captures=_padding(13, 90)),
    family("head_and_query_masks", lambda w: w.mask(w.n <= w.m, w.s * w.load("x", Kind.FLOAT, w.h)),
           lambda s, c, b, h, m, n: fill(n <= m, s * c[0][:, None, None]), rows=IMPOSSIBLE,
           weight=lambda w: (
               w.p * w.load("x", Kind.FLOAT, w.h) * w.load("query", Kind.FLOAT, w.b, w.m) / w.load("key", Kind.FLOAT, w.n)),
           dense_weight=lambda p, c, *i: p * c[0][:, None, None] * c[1][:, None, :, None] / c[2], needs=(True, True, True),
           captures=lambda B, H, M, N: (*_randn("h", "bm")(B, H, M, N), torch.rand(N, dtype=torch.float64) + 0.5)),
    family("weight_of_elements", lambda w: w.mask(w.n <= w.m - 2, w.s + w.load("x", Kind.FLOAT, w.zero, w.h, w.m, w.n), LOWEST),
           lambda s, c, b, h, m, n: fill(n <= m - 2, s + c[0], LOWEST),
           weight=lambda w: w.p * w.load("x", Kind.FLOAT, w.zero, w.h, w.m, w.n) * 2.0,
           dense_weight=lambda p, c, *i: p * c[0] * 2.0, captures=_randn("1hmn"), needs=(True,)),
    family("softmax_plus_one", lambda w: w.mask(w.load("padding", Kind.BOOL, w.b, w.n), w.s), rows=IMPOSSIBLE,
           dense=lambda s, c, *i: fill(c[0][:, None, None, :], s), captures=_padding(0, 90),
           sink=lambda w: w.builder.const(0.0), dense_sink=lambda c: torch.zeros(1, dtype=torch.float64)),
    family("sinks_of_heads", lambda w: w.mask((w.n <= w.m) & (w.m - w.n < 20), w.s * 0.3),
           lambda s, c, b, h, m, n: fill((n <= m) & (m - n < 20), s * 0.3), rows=IMPOSSIBLE, captures=_randn("h"), needs=(True,),
           sink=lambda w: w.load("sink", Kind.FLOAT, w.h) * 2.0, dense_sink=lambda c: c[0][:, None, None] * 2.0,
           shape=(*WIDE[:3], 150, 150, 8, 12)),
    family("sinks_of_queries", lambda w: w.s * 0.3, lambda s, c, *i: s * 0.3, captures=_randn("bhm"), needs=(True,),
           sink=lambda w: w.load("sink", Kind.FLOAT, w.b, w.h, w.m), dense_sink=lambda c: c[0][..., None]),
    family("sinks_in_low_rows", lambda w: w.mask(_causal_padded(w), w.s * 0.3, LOWEST), _dense_causal_padded(LOWEST),
           captures=lambda *sizes: (*_padding(40, 3, left=True)(*sizes), torch.tensor([0.5, LOWEST, NEVER, -2e4]).double()),
           needs=(False, True), sink=lambda w: w.load("sink", Kind.FLOAT, w.h), dense_sink=lambda c: c[1][:, None, None]),
    family("sink_and_dropout", lambda w: w.mask(w.n <= w.m, w.s * 0.3), lambda s, c, b, h, m, n: fill(n <= m, s * 0.3),
           rows=IMPOSSIBLE, captures=_seeded("h"), needs=(True, False), shape=(2, 4, 2, 90, 90, 8, 8),
           sink=lambda w: w.load("sink", Kind.FLOAT, w.h), dense_sink=lambda c: c[0][:, None, None],
           weight=lambda w: w.dropped(w.p, 0.1), dense_weight=lambda p, c, *i: _dropped(p, c[1], 0.1, *i)),
]  # fmt: skip


def indices(B: int, H: int, M: int, N: int) -> tuple[Tensor, ...]:
    """b, h, m, n in the axes of scores."""
    return tuple(torch.arange(size).view([-1 if axis == place else 1 for axis in range(4)])
                 for place, size in enumerate((B, H, M, N)))  # fmt: skip


def dense(each: Family, query: Tensor, key: Tensor, value: Tensor, captures: Sequence[Tensor]) -> Tensor:
    """The attention, all scores at once, in the tensors' precision."""
    B, H, G, M, N, _, _ = each.shape
    repeated = [tensor.repeat_interleave(H // G, 1) for tensor in (key, value)]
    x = each.dense(query @ repeated[0].mT, captures, *indices(B, H, M, N)).expand(B, H, M, N)
    sinks = [] if each.sink is None else [each.sink(captures).to(x.dtype).expand(B, H, M, 1)]
    p = torch.cat([x, *sinks], -1).softmax(-1)[..., :N]
    if each.spec.empty_rows is ZERO:
        p = torch.where((x == NEVER).all(-1, keepdim=True), torch.zeros((), dtype=p.dtype), p)
    if each.weight is not None:
        p = each.weight(p, captures, *indices(B, H, M, N))
    return p @ repeated[1]
