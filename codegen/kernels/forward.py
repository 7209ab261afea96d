# ruff: noqa: SIM108 -- a branch on a constexpr must be a statement of its own
"""Forward: one program for a block of queries of one head, walking over the keys that its mask can keep.

FlashAttention-2, Algorithm 1: running maximum and sum, one rescaling of the accumulator a block, one division last.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.plain_score import (
    FACTOR,
    HAS_CHOICES,
    HAS_SINK,
    SCALE,
    keep,
    kept_score,
    key_range,
    named,
    score,
    sink_score,
    weighted,
)  # SPLICE
from flashfuse.codegen.kernels.tiles import (
    LOG2E,
    LOW_SCORE,
    block_aligned,
    load_block,
    load_tile,
    owned,
    past_gap,
    store_tile,
    with_table,
    without_gap,
)


@triton.jit
def masked(x, b, h, m, n, inside_m, inside_n, inside, M, N, inputs, MASKED: tl.constexpr):
    """Scores with -inf where the mask drops them (MASKED), and outside the tensors (`inside`)."""
    if MASKED:
        x = tl.where(inside & keep(b, h, m, n, inside_m, inside_n, M, N, inputs), x, float("-inf"))
    else:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def attend(
    acc, total, top, q, key, key_n, value, value_n, lo, hi, full_lo, full_hi, gap_lo, skipped,
    b, h, m, inside_m, M, N, inputs,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, SHIFTED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BRANCH: tl.constexpr, g=0, TMA: tl.constexpr = False,
):  # fmt: skip
    """Attend to the key blocks [lo, hi) past the gap: the accumulator, the sum of exponentials and the largest score so far.

    One loop: only blocks outside [full_lo, full_hi) take the branch that masks; without BRANCH all blocks are masked.
    MASKED: apply `keep`. EVEN: all blocks lie within N. WHOLE: the scores of the whole program. SHIFTED: subtract the
    maximum before any scaling, as scores near the smallest float and float32's precision need it. TMA: key and value are
    descriptors, of which head `g` is read (see `load_block`).
    """
    for step in tl.range(lo, hi, BLOCK_N):
        first = past_gap(step, gap_lo, skipped)
        n = first + tl.arange(0, BLOCK_N)[None, :]
        inside_n = tl.full([1, BLOCK_N], 1, tl.int1) if EVEN else n < N
        k = load_block(key, b, g, first, key_n, N, D, BLOCK_N, D_PAD, not EVEN, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if WHOLE:
            x = score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
            unit: tl.constexpr = LOG2E
        else:
            x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
            unit: tl.constexpr = FACTOR
        if MASKED or not EVEN:
            if BRANCH:
                if (first < full_lo) | (first >= full_hi):
                    x = masked(x, b, h, m, n, inside_m, inside_n, inside_n, M, N, inputs, MASKED)
            else:
                x = masked(x, b, h, m, n, inside_m, inside_n, inside_n, M, N, inputs, MASKED)
        higher = tl.maximum(top, tl.max(x, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        if SHIFTED:
            p = tl.exp2((x - finite[:, None]) * unit)
        else:
            p = tl.exp2(x * unit - (finite * unit)[:, None])
        shrink = tl.exp2((top - finite) * unit)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        p = weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs)
        v = load_block(value, b, g, first, value_n, N, E, BLOCK_N, E_PAD, not EVEN, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = higher
    return acc, total, top


@triton.jit
def is_low(top, total):
    """Whether rows with these largest scores, in natural units, and sums must be computed from the whole program."""
    return ((tl.abs(top) < -LOW_SCORE) == 0) | (total != total)


@triton.jit
def weigh_a_key(b, h, m, inside_m, M, N, inputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether rows weigh any key otherwise than by a zero in its place, which hides that its probability is NaN."""
    found = tl.zeros([BLOCK_M], tl.int32)
    for first in tl.range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[None, :]
        inside_n = n < N
        p = tl.full([BLOCK_M, BLOCK_N], float("nan"), tl.float32)
        p = weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs)
        found |= tl.max(((p != p) & inside_n).to(tl.int32), 1)
    return found != 0


@triton.jit
def finish(
    acc, total, top, out, out_m, stats, plane, inside, low_rows, weighing,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, EMPTY_ZERO: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Divide by the rows' sums, and store the rows that are `inside` (LOW: and low) with their statistics.

    LOW with HAS_CHOICES: a row whose sum is zero or NaN stays what it is, unless it is `weighing` a key (`weigh_a_key`).
    """
    if LOW:
        inside = inside & low_rows
        sums = tl.log(total)
        tl.store(stats + plane, tl.where(total != total, total, top), mask=inside)
    else:
        top = top * SCALE
        sums = top + tl.log(total)
        if PLANES == 2:
            low_rows = is_low(top, total)
            shift = tl.where(low_rows, tl.where(total != total, total, top), 0.0)
            if not HAS_MASK:
                sums = tl.where(low_rows, 0.0, top) + tl.log(total)
            tl.store(stats + plane, shift, mask=inside)
    if EMPTY_ZERO:
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        sums = tl.where(empty, float("inf"), sums)
    if LOW and HAS_CHOICES:
        total = tl.where(weighing | (total > 0.0), total, 1.0)
    store_tile(out, out_m, acc / total[:, None], inside, E, BLOCK_M, E_PAD)
    tl.store(stats, sums, mask=inside)


@triton.jit(repr=named("flashfuse_forward"))
def flashfuse_forward(
    query, key, value, out, stats, table, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, out_b, out_h, out_m,
    table_b, table_h, H, GROUP, M, N, plane, section,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_ROWS: tl.constexpr, EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, SHIFTED: tl.constexpr, EMPTY_ZERO: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, BRANCH: tl.constexpr, SWAPPED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out `[B, H, M, E]` and stats `[PLANES, B, H, M]`; the grid is (blocks of queries * B * H,).

    `section` and SWAPPED: the order of programs (see `tiles.owned`). TABLE_ROWS: how many queries a row of the range table stands
    for; 0 without a table. EVEN: BLOCK_N divides N. LOW: a second launch, which computes the rows that the first one found too
    low for its mask from the whole program. TMA: key and value are descriptors.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    block, b, h = owned(blocks, H, section, SWAPPED)
    head = b * H + h
    first = (blocks - 1 - block) * BLOCK_M  # later queries see more keys: start them first
    b_wide = tl.cast(b, tl.int64)
    h_wide = tl.cast(h, tl.int64)
    g = h // GROUP
    g_wide = tl.cast(g, tl.int64)
    first_wide = tl.cast(first, tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    m = row[:, None]
    inside_m = m < M
    query += b_wide * query_b + h_wide * query_h + first_wide * query_m
    if not TMA:
        key += b_wide * key_b + g_wide * key_g
        value += b_wide * value_b + g_wide * value_g
    out += b_wide * out_b + h_wide * out_h + first_wide * out_m
    stats += tl.cast(head, tl.int64) * M + row

    low_rows = row < 0
    if LOW:
        low_rows = tl.load(stats + plane, mask=row < M, other=0.0) != 0.0
        if tl.max(low_rows.to(tl.int32), 0) == 0:
            return
        lo, hi, full_lo, full_hi, gap_lo, gap_hi = 0, N, 0, 0, 0, 0
    else:
        last = tl.minimum(first + BLOCK_M, M) - 1
        lo, hi, full_lo, full_hi, gap_lo, gap_hi = key_range(first, last, b, h, M, N, inputs)
    if TABLE_ROWS > 0:
        table += b_wide * table_b + h_wide * table_h
        rows = tl.cdiv(M, TABLE_ROWS)
        lo, hi, full_lo, full_hi, gap_lo, gap_hi = with_table(lo, hi, table, first, rows, TABLE_ROWS, BLOCK_M)
    lo, full_lo, full_hi = block_aligned(lo, full_lo, full_hi, BLOCK_N)
    hi, gap_lo, skipped = without_gap(lo, hi, gap_lo, gap_hi, BLOCK_N)

    q = load_tile(query, query_m, M - first, D, BLOCK_M, D_PAD, True)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_SINK:
        sink = sink_score(b, h, row, row < M, M, N, inputs)
        total = tl.where(sink == float("-inf"), 0.0, 1.0)
        top = sink if LOW else sink / SCALE
    acc, total, top = attend(
        tl.zeros([BLOCK_M, E_PAD], tl.float32), total, top, q, key, key_n, value, value_n, lo, hi, full_lo, full_hi,
        gap_lo, skipped, b, h, m, inside_m, M, N, inputs,
        D, E, D_PAD, E_PAD, BLOCK_N, HAS_MASK and not LOW, EVEN, SHIFTED or LOW, LOW, PRECISION, BRANCH, g, TMA,
    )  # fmt: skip

    weighing = row < M
    if LOW and HAS_CHOICES:
        weighing = weigh_a_key(b, h, m, inside_m, M, N, inputs, BLOCK_M, BLOCK_N)
    finish(
        acc, total, top, out, out_m, stats, plane, row < M, low_rows, weighing,
        E, E_PAD, BLOCK_M, HAS_MASK, PLANES, EMPTY_ZERO, LOW,
    )  # fmt: skip
