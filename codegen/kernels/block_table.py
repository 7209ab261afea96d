"""Range tables for masks over captured tensors (document numbers, padding): `flashfuse/ir/block_table.py` says what is in one.

`flashfuse_block_bounds` takes the smallest and largest value of each vector in each block; `flashfuse_block_table` asks
interval arithmetic about every pair of blocks and writes, for each block, what it can see of the other side. The
work is (M / BLOCK) * (N / BLOCK), never M * N. Programs of blocks of queries come first, then those of blocks of keys.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.plain_score import block_certainty, named, store_key_bounds, store_query_bounds  # SPLICE

FAR = tl.constexpr(2147483647)


@triton.jit(repr=named("flashfuse_block_bounds"))
def flashfuse_block_bounds(
    bounds, inputs, query_plane, key_plane, key_offset, TH, M, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bounds of int64: `[2 * vectors, TB, TH, blocks]` of queries, then of keys; the grid is (query_plane + key_plane,)."""
    place = tl.program_id(0)
    if place < query_plane:
        blocks = tl.cdiv(M, BLOCK)
        m = place % blocks * BLOCK + tl.arange(0, BLOCK)
        pair = place // blocks
        store_query_bounds(bounds + place, query_plane, pair // TH, pair % TH, m, m < M, M, N, inputs)
    else:
        place -= query_plane
        blocks = tl.cdiv(N, BLOCK)
        n = place % blocks * BLOCK + tl.arange(0, BLOCK)
        pair = place // blocks
        store_key_bounds(bounds + key_offset + place, key_plane, pair // TH, pair % TH, n, n < N, M, N, inputs)


@triton.jit
def larger(a, b):
    """What the scan combines by."""
    return tl.maximum(a, b)


@triton.jit
def longer_run(length, end, latest, broken, place, inside):
    """The longest run of places that are not `broken`: its length and last place. `latest` is where the last break was."""
    before = tl.maximum(tl.associative_scan(tl.where(broken, place, -1), 0, larger), latest)
    here = tl.where(inside, place - before, 0)
    longest = tl.max(here, 0)
    end = tl.where(longest > length, tl.min(tl.where(here == longest, place, FAR), 0), end)
    return tl.maximum(longest, length), end, tl.max(before, 0)


@triton.jit
def other_side(
    own, pair, queries, query_plane, keys, key_plane, TH, M, N, inputs, size,
    KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of block `own`, in blocks of the other side: first and last + 1 of the possible, of the longest certain run, of the gap.

    KEYS: `own` is a block of keys and the others are queries; else the reverse. `size` is how many others there are.
    """
    b = pair // TH
    h = pair % TH
    lowest = tl.full([CHUNK], FAR, tl.int32)
    highest = tl.full([CHUNK], -1, tl.int32)
    for start in tl.range(0, size, CHUNK):
        other = start + tl.arange(0, CHUNK)
        inside = other < size
        m = other if KEYS else own + other * 0
        n = own + other * 0 if KEYS else other
        _certain, possible = block_certainty(queries + m, query_plane, keys + n, key_plane, inside, b, h, M, N, inputs)
        lowest = tl.minimum(lowest, tl.where(inside & possible, other, FAR))
        highest = tl.maximum(highest, tl.where(inside & possible, other, -1))
    lo = tl.minimum(tl.min(lowest, 0), size)
    hi = tl.max(highest, 0) + 1
    full, full_end, full_break = 0, -1, lo - 1
    gap, gap_end, gap_break = 0, -1, lo - 1
    for start in tl.range(lo // CHUNK * CHUNK, hi, CHUNK):
        other = start + tl.arange(0, CHUNK)
        inside = (other >= lo) & (other < hi)
        m = other if KEYS else own + other * 0
        n = own + other * 0 if KEYS else other
        certain, possible = block_certainty(queries + m, query_plane, keys + n, key_plane, inside, b, h, M, N, inputs)
        uncertain = tl.where(certain & possible, 0, 1) != 0
        full, full_end, full_break = longer_run(full, full_end, full_break, inside & uncertain, other, inside)
        gap, gap_end, gap_break = longer_run(gap, gap_end, gap_break, inside & possible, other, inside)
    return lo, hi, full_end + 1 - full, full_end + 1, gap_end + 1 - gap, gap_end + 1


@triton.jit
def store_row(row, found, length, BLOCK: tl.constexpr):
    """Blocks as elements, none beyond `length`."""
    for place in tl.static_range(6):
        tl.store(row + place, tl.minimum(found[place] * BLOCK, length))


@triton.jit(repr=named("flashfuse_block_table"))
def flashfuse_block_table(
    bounds, table, inputs, query_plane, key_plane, key_offset, TH, M, N,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """table `[TB, TH, blocks of queries + blocks of keys, 6]` of int32; the grid is (query_plane + key_plane,)."""
    blocks_m = tl.cdiv(M, BLOCK)
    blocks_n = tl.cdiv(N, BLOCK)
    place = tl.program_id(0)
    if place < query_plane:
        own = place % blocks_m
        pair = place // blocks_m
        queries = bounds + pair * blocks_m
        keys = bounds + key_offset + pair * blocks_n
        found = other_side(own, pair, queries, query_plane, keys, key_plane, TH, M, N, inputs, blocks_n, False, CHUNK)
        store_row(table + tl.cast(pair * (blocks_m + blocks_n) + own, tl.int64) * 6, found, N, BLOCK)
    else:
        place -= query_plane
        own = place % blocks_n
        pair = place // blocks_n
        queries = bounds + pair * blocks_m
        keys = bounds + key_offset + pair * blocks_n
        found = other_side(own, pair, queries, query_plane, keys, key_plane, TH, M, N, inputs, blocks_m, True, CHUNK)
        store_row(table + tl.cast(pair * (blocks_m + blocks_n) + blocks_m + own, tl.int64) * 6, found, M, BLOCK)
