"""Gradient of a capture that has an element for each query and key (an additive bias, say), or for each distance of both.

One program owns a tile of one kept (batch, head), or a strip of tiles along a diagonal, and loops over the batches and heads
that the capture is broadcast over: deterministic, and the only tensor of M x N elements is a gradient that has so many.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.backward import load_rows, low_probability, probability
from flashfuse.codegen.kernels.plain_score import (
    keep,
    kept_score,
    key_range,
    named,
    score,
    tile_gradient,
    weight_gradient,
)  # SPLICE
from flashfuse.codegen.kernels.tiles import load_tile


@triton.jit
def add_tile(
    acc, query, key, value, grad_out, stats, delta, inputs, first_m, first_n, b, h,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
    H, GROUP, M, N, plane,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, HAS_MASK: tl.constexpr, PLANES: tl.constexpr,
    SHIFTED: tl.constexpr, CAPTURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus the gradient of the elements of capture CAPTURE in one tile of one batch and head.

    EVEN: the tile lies within M and N. Without a mask there is no branch, so that the loop around this can load ahead.
    """
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    b_wide = tl.cast(b, tl.int64)
    h_wide = tl.cast(h, tl.int64)
    g_wide = tl.cast(h // GROUP, tl.int64)
    query += b_wide * query_b + h_wide * query_h + tl.cast(first_m, tl.int64) * query_m
    key += b_wide * key_b + g_wide * key_g + tl.cast(first_n, tl.int64) * key_n
    value += b_wide * value_b + g_wide * value_g + tl.cast(first_n, tl.int64) * value_n
    grad_out += b_wide * grad_b + h_wide * grad_h + tl.cast(first_m, tl.int64) * grad_m
    place = (b_wide * H + h) * M + row
    lse, shift, row_delta = load_rows(stats, delta, place, plane, row < M, PLANES)
    if HAS_MASK:
        last_m = tl.minimum(first_m + BLOCK_M, M) - 1
        lo, hi, _full_lo, _full_hi, _gap_lo, _gap_hi = key_range(first_m, last_m, b, h, M, N, inputs)
        visible = (first_n < hi) & (first_n + BLOCK_N > lo)
        if PLANES == 2:
            visible = visible | (tl.max((shift != 0.0).to(tl.int32), 0) > 0)
        if visible:
            acc += part_of(
                query, key, value, grad_out, query_m, key_n, value_n, grad_m, lse, shift, row_delta, row, column, b, h,
                M, N, inputs, D, E, D_PAD, E_PAD, BLOCK_M, BLOCK_N, EVEN, HAS_MASK, PLANES, SHIFTED, CAPTURE, PRECISION,
            )  # fmt: skip
    else:
        acc += part_of(
            query, key, value, grad_out, query_m, key_n, value_n, grad_m, lse, shift, row_delta, row, column, b, h,
            M, N, inputs, D, E, D_PAD, E_PAD, BLOCK_M, BLOCK_N, EVEN, HAS_MASK, PLANES, SHIFTED, CAPTURE, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def part_of(
    query, key, value, grad_out, query_m, key_n, value_n, grad_m, lse, shift, row_delta, row, column, b, h, M, N, inputs,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, HAS_MASK: tl.constexpr, PLANES: tl.constexpr,
    SHIFTED: tl.constexpr, CAPTURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """That gradient, from the first rows of a tile's queries, keys, values and output gradients."""
    m = row[:, None]
    n = column[None, :]
    inside_m = tl.full([BLOCK_M, 1], 1, tl.int1) if EVEN else m < M
    inside_n = tl.full([1, BLOCK_N], 1, tl.int1) if EVEN else n < N
    rows_m = M - tl.min(row, 0)
    rows_n = N - tl.min(column, 0)
    q = load_tile(query, query_m, rows_m, D, BLOCK_M, D_PAD, not EVEN)
    k = load_tile(key, key_n, rows_n, D, BLOCK_N, D_PAD, not EVEN)
    v = load_tile(value, value_n, rows_n, E, BLOCK_N, E_PAD, not EVEN)
    do = load_tile(grad_out, grad_m, rows_m, E, BLOCK_M, E_PAD, not EVEN)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    low = shift != 0.0
    inside = inside_m & inside_n
    ordinary = inside
    if HAS_MASK:
        ordinary = inside & keep(b, h, m, n, inside_m, inside_n, M, N, inputs)
        if PLANES == 2:
            ordinary = ordinary & (low == 0)[:, None]
    x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
    p = probability(x, lse[:, None], shift[:, None], SHIFTED)
    dx = p * (weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs) - row_delta[:, None])
    part = tile_gradient(s, dx, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, CAPTURE, False)
    if HAS_MASK or not EVEN:
        part = tl.where(ordinary, part, 0.0)
    if PLANES == 2 and HAS_MASK:
        x = score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
        p = low_probability(x, lse[:, None], shift[:, None])
        dx = p * (weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs) - row_delta[:, None])
        own = tile_gradient(s, dx, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, CAPTURE, True)
        part += tl.where(inside & low[:, None], own, 0.0)
    return part


@triton.jit(repr=named("flashfuse_grad_capture"))
def flashfuse_grad_capture(
    query, key, value, grad_out, stats, delta, grad, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
    dc_b, dc_h, dc_m, dc_n, H, GROUP, M, N, plane, kept_h, summed_b, summed_h,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, HAS_MASK: tl.constexpr, PLANES: tl.constexpr,
    SHIFTED: tl.constexpr, CAPTURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad, by strides dc_*, of capture CAPTURE; the grid is (tiles * kept batches * kept heads,)."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    kept = tl.program_id(0) // tiles
    first_m = tl.program_id(0) % tiles // tiles_n * BLOCK_M
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    row = first_m + tl.arange(0, BLOCK_M)
    column = first_n + tl.arange(0, BLOCK_N)
    m = row[:, None]
    n = column[None, :]
    inside_m = m < M
    inside_n = n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in tl.range(0, summed_b * summed_h):
        b = kept // kept_h + member // summed_h
        h = kept % kept_h + member % summed_h
        acc = add_tile(
            acc, query, key, value, grad_out, stats, delta, inputs, first_m, first_n, b, h,
            query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
            H, GROUP, M, N, plane,
            D, E, D_PAD, E_PAD, BLOCK_M, BLOCK_N, EVEN, HAS_MASK, PLANES, SHIFTED, CAPTURE, PRECISION,
        )  # fmt: skip
    place = grad + tl.cast(kept // kept_h, tl.int64) * dc_b + tl.cast(kept % kept_h, tl.int64) * dc_h
    place = place + tl.cast(m, tl.int64) * dc_m + tl.cast(n, tl.int64) * dc_n
    tl.store(place, acc.to(grad.dtype.element_ty), mask=inside_m & inside_n)


@triton.jit(repr=named("flashfuse_grad_diagonals"))
def flashfuse_grad_diagonals(
    query, key, value, grad_out, stats, delta, grad, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
    H, GROUP, M, N, plane, kept_h, summed_b, summed_h,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, HAS_MASK: tl.constexpr, PLANES: tl.constexpr, SHIFTED: tl.constexpr,
    CAPTURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad `[kept batches, kept heads, strips, BLOCK, BLOCK]`, float32; the grid is (strips * kept batches * kept heads,).

    A strip is the square tiles whose corners have one distance n - m, BLOCK more than in the strip before: what is summed over
    them lies at the same place in every tile. Its sums along diagonals are left to the caller.
    """
    blocks_m = tl.cdiv(M, BLOCK)
    blocks_n = tl.cdiv(N, BLOCK)
    strips = blocks_m + blocks_n - 1
    kept = tl.program_id(0) // strips
    distance = tl.program_id(0) % strips - (blocks_m - 1)  # in blocks
    start = tl.maximum(-distance, 0)
    steps = tl.minimum(blocks_m, blocks_n - distance) - start
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for member in tl.range(0, summed_b * summed_h * steps):
        b = kept // kept_h + member // steps // summed_h
        h = kept % kept_h + member // steps % summed_h
        first_m = (start + member % steps) * BLOCK
        first_n = first_m + distance * BLOCK
        acc = add_tile(
            acc, query, key, value, grad_out, stats, delta, inputs, first_m, first_n, b, h,
            query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
            H, GROUP, M, N, plane,
            D, E, D_PAD, E_PAD, BLOCK, BLOCK, EVEN, HAS_MASK, PLANES, SHIFTED, CAPTURE, PRECISION,
        )  # fmt: skip
    row = tl.arange(0, BLOCK)[:, None]
    place = grad + tl.cast(tl.program_id(0), tl.int64) * (BLOCK * BLOCK) + row * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(place, acc)
