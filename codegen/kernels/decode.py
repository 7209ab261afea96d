# ruff: noqa: SIM102 -- a branch on a constexpr must be a statement of its own
"""Few queries against many keys: the keys of a head are split over programs, and a second kernel combines the parts.

Flash-Decoding (Dao, Haziza, Massa, Sizov 2023). Query heads that share a key head are packed into the rows of one tile, so
that keys and values are read once for all of them.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.forward import attend, finish, is_low
from flashfuse.codegen.kernels.plain_score import FACTOR, HAS_SINK, SCALE, key_range, named, sink_score  # SPLICE
from flashfuse.codegen.kernels.tiles import block_aligned, without_gap


@triton.jit(repr=named("flashfuse_decode"))
def flashfuse_decode(
    query, key, value, parts, part_stats, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, H, GROUP, M, N, splits, pack, rows,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """parts `[B * H * M, splits, E]`, not divided yet, and their largest scores and sums `[2, B * H * M, splits]`, float32.

    The grid is (splits * B * H / pack,): a program has all queries of `pack` heads of one group and a share of the keys.
    `rows` is B * H * M.
    """
    split = tl.program_id(0) % splits
    packs = H // pack
    b = tl.program_id(0) // splits // packs
    head = tl.program_id(0) // splits % packs * pack
    b_wide = tl.cast(b, tl.int64)
    g_wide = tl.cast(head // GROUP, tl.int64)
    lane = tl.arange(0, BLOCK_M)
    inside = lane < pack * M
    member = tl.minimum(lane // M, pack - 1)[:, None]  # rows to spare repeat the last head: all indices stay real
    m = (lane % M)[:, None]
    h = head + member
    inside_m = m < M
    key += b_wide * key_b + g_wide * key_g
    value += b_wide * value_b + g_wide * value_g

    lo, hi, full_lo, full_hi, gap_lo, gap_hi = key_range(0, M - 1, b, head, M, N, inputs)
    lo, full_lo, full_hi = block_aligned(lo, full_lo, full_hi, BLOCK_N)
    hi, gap_lo, skipped = without_gap(lo, hi, gap_lo, gap_hi, BLOCK_N)
    share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N), splits) * BLOCK_N
    lo = lo + split * share
    hi = tl.minimum(hi, lo + share)

    column = tl.arange(0, D_PAD)[None, :]
    address = query + b_wide * query_b + tl.cast(h, tl.int64) * query_h + tl.cast(m, tl.int64) * query_m + column
    q = tl.load(address, mask=inside[:, None] & (column < D), other=0.0)
    acc, total, top = attend(
        tl.zeros([BLOCK_M, E_PAD], tl.float32), tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32), q, key, key_n, value, value_n, lo, hi, full_lo, full_hi,
        gap_lo, skipped, b, h, m, inside_m, M, N, inputs,
        D, E, D_PAD, E_PAD, BLOCK_N, HAS_MASK, EVEN, SHIFTED, False, PRECISION, BRANCH,
    )  # fmt: skip

    place = (tl.cast(b * H + head, tl.int64) * M + lane) * splits + split
    tl.store(part_stats + place, top, mask=inside)
    tl.store(part_stats + tl.cast(rows, tl.int64) * splits + place, total, mask=inside)
    column = tl.arange(0, E_PAD)[None, :]
    tl.store(parts + place[:, None] * E + column, acc, mask=inside[:, None] & (column < E))


@triton.jit
def attend_low(
    query, key, value, out, stats, inputs, query_m, key_n, value_n, out_m, b, h, m, M, N, plane,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, EMPTY_ZERO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A low row by the whole program over all keys, stored; pointers are to the row and to its head's keys and values."""
    lane = tl.arange(0, 16)  # the fewest rows of a product
    only = lane == 0
    row = m + tl.zeros([16], tl.int32)
    inside = tl.full([16], 1, tl.int1)  # all lanes have the same, real indices; the first alone is stored
    column = tl.arange(0, D_PAD)[None, :]
    q = tl.load(query + lane[:, None] * query_m + column, mask=only[:, None] & (column < D), other=0.0)
    total = tl.zeros([16], tl.float32)
    top = tl.full([16], float("-inf"), tl.float32)
    if HAS_SINK:
        top = sink_score(b, h, row, inside, M, N, inputs) + tl.zeros([16], tl.float32)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc, total, top = attend(
        tl.zeros([16, E_PAD], tl.float32), total, top, q, key, key_n, value, value_n, 0, N, 0, 0, 0, 0,
        b, h, row[:, None], inside[:, None], M, N, inputs,
        D, E, D_PAD, E_PAD, BLOCK_N, False, False, True, True, PRECISION, False,
    )  # fmt: skip
    finish(
        acc, total, top, out, out_m, stats + lane, plane, only, only, only,
        E, E_PAD, 16, HAS_MASK, PLANES, EMPTY_ZERO, True,
    )  # fmt: skip


@triton.jit(repr=named("flashfuse_combine"))
def flashfuse_combine(
    query, key, value, parts, part_stats, out, stats, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, out_b, out_h, out_m, H, GROUP, M, N, plane, splits,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, EMPTY_ZERO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[B, H, M, E]` and stats `[PLANES, B, H, M]` from the parts; the grid is (B * H * M,). SPLITS holds `splits`.

    Rows too low for their mask are computed here too, from the whole program.
    """
    place = tl.program_id(0)
    b = place // M // H
    h = place // M % H
    m = place % M
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, E_PAD)[None, :]
    place_wide = tl.cast(place, tl.int64)
    part = place_wide * splits + split
    top = tl.load(part_stats + part, mask=split < splits, other=float("-inf"))
    total = tl.load(part_stats + tl.cast(plane, tl.int64) * splits + part, mask=split < splits, other=0.0)
    acc = tl.load(parts + part[:, None] * E + column, mask=(split < splits)[:, None] & (column < E), other=0.0)
    higher = tl.max(top, 0, keep_dims=True)
    if HAS_SINK:
        sink = sink_score(b, h, m + tl.arange(0, 1), tl.full([1], 1, tl.int1), M, N, inputs) / SCALE
        higher = tl.maximum(higher, sink)
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2((top - finite) * FACTOR)
    total = tl.sum(total * shrink, 0, keep_dims=True)
    acc = tl.sum(acc * shrink[:, None], 0, keep_dims=True)
    if HAS_SINK:
        total += tl.exp2((sink - finite) * FACTOR)
    out += tl.cast(b, tl.int64) * out_b + tl.cast(h, tl.int64) * out_h + tl.cast(m, tl.int64) * out_m
    stats += place_wide + tl.arange(0, 1)
    inside = tl.full([1], 1, tl.int1)
    low = 0
    if HAS_MASK and PLANES == 2:
        low = tl.max(is_low(higher * SCALE, total).to(tl.int32), 0)
    if low == 0:
        finish(
            acc, total, higher, out, out_m, stats, plane, inside, inside, inside,
            E, E_PAD, 1, HAS_MASK, PLANES, EMPTY_ZERO, False,
        )  # fmt: skip
    if HAS_MASK and PLANES == 2:
        if low != 0:
            query += tl.cast(b, tl.int64) * query_b + tl.cast(h, tl.int64) * query_h + tl.cast(m, tl.int64) * query_m
            key += tl.cast(b, tl.int64) * key_b + tl.cast(h // GROUP, tl.int64) * key_g
            value += tl.cast(b, tl.int64) * value_b + tl.cast(h // GROUP, tl.int64) * value_g
            attend_low(
                query, key, value, out, stats, inputs, query_m, key_n, value_n, out_m, b, h, m, M, N, plane,
                D, E, D_PAD, E_PAD, BLOCK_N, HAS_MASK, PLANES, EMPTY_ZERO, PRECISION,
            )  # fmt: skip
