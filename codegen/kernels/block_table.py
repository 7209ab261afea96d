"""Range tables for masks that compare captured vectors (document numbers, padding).

`flashfuse_block_bounds` takes the smallest and largest value of each vector in each block; `flashfuse_block_table` asks
interval arithmetic about every pair of blocks and writes, for each block, which range of the other side it can see and
one run that it sees whole. The work is (M / BLOCK) * (N / BLOCK), never M * N.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.plain_score import block_certainty, named, store_key_bounds, store_query_bounds  # SPLICE


@triton.jit(repr=named("flashfuse_block_bounds"))
def flashfuse_block_bounds(
    bounds, inputs, plane, TH, M, N, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """bounds `[vectors, 2, TB, TH, blocks]` of int64; the grid is (blocks * TB * TH,)."""
    blocks = tl.cdiv(N, BLOCK) if KEYS else tl.cdiv(M, BLOCK)
    place = tl.program_id(0)
    index = place % blocks * BLOCK + tl.arange(0, BLOCK)
    b = place // blocks // TH
    h = place // blocks % TH
    if KEYS:
        store_key_bounds(bounds + place, plane, b, h, index, index < N, M, N, inputs)
    else:
        store_query_bounds(bounds + place, plane, b, h, index, index < M, M, N, inputs)


@triton.jit(repr=named("flashfuse_block_table"))
def flashfuse_block_table(
    queries, keys, table, inputs, query_plane, key_plane, TH, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """table `[TB, TH, blocks, 4]` of int32: lo, hi, full_lo, full_hi in elements of the other side.

    KEYS: a row is a block of keys and its ranges are queries; else the reverse.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    own_blocks = blocks_n if KEYS else blocks_m
    blocks = blocks_m if KEYS else blocks_n
    own = tl.program_id(0) % own_blocks
    pair = tl.program_id(0) // own_blocks
    b = pair // TH
    h = pair % TH
    queries += pair * blocks_m
    keys += pair * blocks_n
    lowest = tl.full([CHUNK], 2147483647, tl.int32)
    highest = tl.full([CHUNK], -1, tl.int32)
    certain_first = tl.full([CHUNK], 2147483647, tl.int32)
    for start in tl.range(0, blocks, CHUNK):
        other = start + tl.arange(0, CHUNK)
        inside = other < blocks
        query_place = queries + (other if KEYS else own + other * 0)
        key_place = keys + (own + other * 0 if KEYS else other)
        certain, possible = block_certainty(query_place, query_plane, key_place, key_plane, inside, b, h, M, N, inputs)
        lowest = tl.minimum(lowest, tl.where(inside & possible, other, 2147483647))
        highest = tl.maximum(highest, tl.where(inside & possible, other, -1))
        certain_first = tl.minimum(certain_first, tl.where(inside & certain, other, 2147483647))
    lo = tl.min(lowest, 0)
    hi = tl.max(highest, 0) + 1
    full_lo = tl.min(certain_first, 0)
    uncertain = tl.full([CHUNK], 2147483647, tl.int32)
    if full_lo < blocks:
        for start in tl.range(full_lo // CHUNK * CHUNK, blocks, CHUNK):
            other = start + tl.arange(0, CHUNK)
            inside = other < blocks
            query_place = queries + (other if KEYS else own + other * 0)
            key_place = keys + (own + other * 0 if KEYS else other)
            certain, possible = block_certainty(query_place, query_plane, key_place, key_plane, inside, b, h, M, N, inputs)
            stops = inside & (other > full_lo) & (tl.where(inside & certain, 1, 0) == 0)
            uncertain = tl.minimum(uncertain, tl.where(stops, other, 2147483647))
    full_hi = tl.minimum(tl.min(uncertain, 0), blocks)
    size = BLOCK_M if KEYS else BLOCK_N
    length = M if KEYS else N
    table += tl.cast(tl.program_id(0), tl.int64) * 4
    tl.store(table, tl.minimum(lo, blocks) * size)
    tl.store(table + 1, tl.minimum(hi * size, length))
    tl.store(table + 2, tl.minimum(full_lo, blocks) * size)
    tl.store(table + 3, tl.where(full_lo < blocks, tl.minimum(full_hi * size, length), 0))
