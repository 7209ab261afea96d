# ruff: noqa: SIM108, SIM102, RUF005 -- a branch on a constexpr must be a statement of its own; Triton's lists are added
"""Forward for Hopper: warp-specialised, persistent, with the softmax of one block of keys under the products of the next.

FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2. One partition of warps loads by TMA; each of CONSUMERS others owns
64 rows of queries and multiplies, takes the softmax and multiplies again. A program takes tiles (a block of queries of
a head) until there are none left. With a second buffer of queries (QUERIES) the loader runs ahead into the next tile.

Shapes are powers of two. A head dim that is none, 96 or 192, is taken in two parts, 64 + 32 or 128 + 64: each tensor has a
descriptor and buffers for each part (`query` and `query_rest`), the scores are the sum of two products, the output has two
accumulators.

Why no wait can last for ever. Each buffer has two barriers: `full`, completed by the bytes of its load, and `empty`,
completed by one arrival of each of its readers. The loader and the readers walk the same tiles and the same blocks in the same
order (`tile_of` and `keys_of` are functions of the program's number alone), the loader fills what the readers read in
their order (queries, then keys, then values of a block), and every reader arrives once for every fill: for a buffer of
keys after the scores are read, of values after the product is waited for, of a tile's queries once, with or without
blocks. All parts of a head dim lie behind one barrier, which waits for the bytes of all. The k-th fill of a buffer waits
for the (k-1)-th round of arrivals, the k-th read for the k-th fill; so by induction on the order of fills each wait is for
something that needs no later one.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.hopper_api import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashfuse.codegen.kernels.plain_score import (
    FACTOR,
    HAS_SINK,
    LOADS_AHEAD,
    SCALE,
    keep,
    kept_score,
    kept_score_of,
    key_range,
    load_ahead,
    named,
    sink_score,
    weighted,
)  # SPLICE
from flashfuse.codegen.kernels.tiles import LOW_SCORE, block_aligned

ROWS = gl.constexpr(64)  # of queries a consumer owns: what one warpgroup multiplies at a time


@gluon.jit
def turns_of(tiles):
    """How many tiles this program takes."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    whole = tiles // programs
    if whole % 2 == 1:
        place = programs - 1 - place
    return whole + (place < tiles % programs).to(gl.int32)


@gluon.jit
def tile_of(turn, blocks, B, H, section, BLOCK_M: gl.constexpr, SWAPPED: gl.constexpr):
    """The first query, the batch and the head of the tile that this program takes in a turn.

    Tiles are numbered section by section: heads whose keys and values fit the L2 cache together. Within a section blocks
    of queries go up or down, in turns, so that lengths change slowly, and down in the last section: under a causal mask the
    shortest tiles come last. Programs take the numbers to and fro, so that none gets the longer tile of each round.
    SWAPPED: batches follow each other before heads (see `codegen/order.py`).
    """
    heads = B * H
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    number = turn * programs + place
    at = number // (section * blocks)
    before = at * section
    number -= before * blocks
    here = gl.minimum(heads - before, section)
    block = number // here
    if ((heads - 1) // section - at) % 2 == 0:
        block = blocks - 1 - block
    head = before + number % here
    if SWAPPED:
        b = head % B
        h = head // B
    else:
        b = head // H
        h = head % H
    return block * BLOCK_M, b, h


@gluon.jit
def with_rows_of_table(lo, hi, full_lo, full_hi, table, first, blocks, ROWS: gl.constexpr, BLOCK: gl.constexpr):
    """`tiles.with_table`, a row of the table at a time."""
    table_lo = gl.to_tensor(2147483647)
    table_hi = gl.to_tensor(0)
    full_lo = gl.to_tensor(0)
    full_hi = gl.to_tensor(2147483647)
    for i in gl.static_range(BLOCK // ROWS):
        place = first // ROWS + i
        row = table + place * 6
        table_lo = gl.minimum(table_lo, gl.load(row, mask=place < blocks, other=2147483647))
        table_hi = gl.maximum(table_hi, gl.load(row + 1, mask=place < blocks, other=0))
        full_lo = gl.maximum(full_lo, gl.load(row + 2, mask=place < blocks, other=0))
        full_hi = gl.minimum(full_hi, gl.load(row + 3, mask=place < blocks, other=2147483647))
    return gl.maximum(lo, table_lo), gl.minimum(hi, table_hi), full_lo, full_hi


@gluon.jit
def keys_of(
    first, b, h, M, N, table, table_b, table_h, inputs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TABLE_ROWS: gl.constexpr,
):  # fmt: skip
    """The blocks of keys [lo, hi) of a tile, how many they are, and those that need no mask, [full_lo, full_hi)."""
    last = gl.minimum(first + BLOCK_M, M) - 1
    lo, hi, full_lo, full_hi, _gap_lo, _gap_hi = key_range(first, last, b, h, M, N, inputs)
    if TABLE_ROWS > 0:
        table += b.to(gl.int64) * table_b + h.to(gl.int64) * table_h
        rows = (M + TABLE_ROWS - 1) // TABLE_ROWS
        lo, hi, full_lo, full_hi = with_rows_of_table(lo, hi, full_lo, full_hi, table, first, rows, TABLE_ROWS, BLOCK_M)
    lo, full_lo, full_hi = block_aligned(lo, full_lo, gl.minimum(full_hi, N), BLOCK_N)
    return lo, gl.maximum((hi - lo + BLOCK_N - 1) // BLOCK_N, 0), full_lo, full_hi


@gluon.jit
def load_rows(source, target, place, b, h, first, full):
    """Load rows of one head, all parts of their head dim, into a buffer, and complete a barrier with their bytes."""
    nbytes: gl.constexpr = source[0].block_type.nbytes + (source[1].block_type.nbytes if len(source) == 2 else 0)
    mbarrier.expect(full, nbytes)
    tma_load(source[0], [b, h, first, 0], full, target[0].index(place))
    if len(source) == 2:
        tma_load(source[1], [b, h, first, source[0].block_type.shape[3]], full, target[1].index(place))


@gluon.jit
def load(
    query, key, value, buffers, table, inputs, lengths,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    TABLE_ROWS: gl.constexpr, SWAPPED: gl.constexpr,
):  # fmt: skip
    """The loading partition: each tile's queries, then its keys and values block by block."""
    queries, keys, values, _staged, query_full, query_empty, key_full, key_empty, value_full, value_empty = buffers
    table_b, table_h, B, H, GROUP, M, N, section = lengths
    blocks = (M + BLOCK_M - 1) // BLOCK_M
    step = 0
    for turn in range(turns_of(blocks * B * H)):
        first, b, h = tile_of(turn, blocks, B, H, section, BLOCK_M, SWAPPED)
        g = h // GROUP
        lo, count, _full_lo, _full_hi = keys_of(first, b, h, M, N, table, table_b, table_h, inputs, BLOCK_M, BLOCK_N, TABLE_ROWS)
        for consumer in gl.static_range(CONSUMERS):
            place = turn % QUERIES * CONSUMERS + consumer
            mbarrier.wait(query_empty.index(place), turn // QUERIES & 1 ^ 1)
            load_rows(query, queries, place, b, h, first + consumer * ROWS, query_full.index(place))
        for i in range(count):
            stage = step % STAGES
            used = step // STAGES & 1 ^ 1
            n = lo + i * BLOCK_N
            mbarrier.wait(key_empty.index(stage), used)
            load_rows(key, keys, stage, b, g, n, key_full.index(stage))
            mbarrier.wait(value_empty.index(stage), used)
            load_rows(value, values, stage, b, g, n, value_full.index(stage))
            step += 1


@gluon.jit
def scores_of(q, keys, stage, zero):
    """The running product of queries and a block of keys: the sum over the parts of the head dim."""
    BLOCK_N: gl.constexpr = zero.shape[1]
    k = keys[0].index(stage).reshape([BLOCK_N, keys[0].type.shape[4]]).permute((1, 0))
    scores = warpgroup_mma(q[0], k, zero, use_acc=False, is_async=True)
    if len(keys) == 2:
        k = keys[1].index(stage).reshape([BLOCK_N, keys[1].type.shape[4]]).permute((1, 0))
        scores = warpgroup_mma(q[1], k, scores, is_async=True)
    return scores


@gluon.jit
def added(acc, p, values, stage):
    """The running products of probabilities and a block of values, a part of the head dim each, on the accumulators."""
    BLOCK_N: gl.constexpr = p.shape[1]
    first = warpgroup_mma(p, values[0].index(stage).reshape([BLOCK_N, values[0].type.shape[4]]), acc[0], is_async=True)
    if len(values) == 2:
        p = gl.convert_layout(p, gl.DotOperandLayout(0, acc[1].type.layout, k_width=2))  # the same registers
        second = warpgroup_mma(p, values[1].index(stage).reshape([BLOCK_N, values[1].type.shape[4]]), acc[1], is_async=True)
        products = (first, second)
    else:
        products = (first,)
    return products


@gluon.jit
def waited(products):
    """The accumulators, once no product is under way."""
    if len(products) == 2:
        first, second = warpgroup_mma_wait(0, deps=[products[0], products[1]])
        acc = (first, second)
    else:
        acc = (warpgroup_mma_wait(0, deps=[products[0]]),)
    return acc


@gluon.jit
def scaled(acc, factor):
    """Every accumulator's rows by a factor each."""
    first = acc[0] * gl.convert_layout(factor, gl.SliceLayout(1, acc[0].type.layout))[:, None]
    if len(acc) == 2:
        scaled_acc = (first, acc[1] * gl.convert_layout(factor, gl.SliceLayout(1, acc[1].type.layout))[:, None])
    else:
        scaled_acc = (first,)
    return scaled_acc


@gluon.jit
def elements_of(first, b, h, m, inside_m, column, M, N, inputs, EVEN: gl.constexpr):
    """What a block's scores are made of besides the product: loads that are under way while that is made."""
    if LOADS_AHEAD:
        n = first + column
        if EVEN:
            inside_n = gl.full(column.shape, 1, gl.int1, column.type.layout)
        else:
            inside_n = n < N
        loaded = load_ahead(b, h, m, n, inside_m, inside_n, M, N, inputs)
    else:
        loaded = (first,)
    return loaded


@gluon.jit
def in_lanes(x):
    """A tile with its columns apart: `[rows, 8, column blocks / 8, lanes, 2]`, where only lanes lie in other threads."""
    return x.reshape([x.shape[0], 8, x.shape[1] // 64, 4, 2])


@gluon.jit
def largest(x):
    """The rows' maxima: two or four short chains a row, of which `gl.max(x, 1)` would make one long one."""
    return gl.max(gl.max(gl.max(gl.max(in_lanes(x), 1), 3), 1), 1)


@gluon.jit
def added_up(p):
    """The rows' sums, of each of the four lanes that hold a row: `[rows, 4]`, for `gl.sum(., 1)` once a tile is done."""
    return gl.sum(gl.sum(gl.sum(in_lanes(p), 1), 3), 1)


@gluon.jit
def soften(
    s, loaded, top, total, first, full_lo, full_hi, b, h, m, inside_m, column, M, N, inputs,
    MASKED: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr,
):  # fmt: skip
    """A block's unnormalised probabilities, the factor by which older ones shrink, and the rows' new maximum and sum."""
    n = first + column
    if EVEN:
        inside_n = gl.full(column.shape, 1, gl.int1, column.type.layout)
    else:
        inside_n = n < N
    if LOADS_AHEAD:
        x = kept_score_of(s, loaded, b, h, m, n, inside_m, inside_n, M, N, inputs)
    else:
        x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
    if MASKED or not EVEN:
        if (first < full_lo) | (first >= full_hi):
            if MASKED:
                x = gl.where(keep(b, h, m, n, inside_m, inside_n, M, N, inputs), x, float("-inf"))
            if not EVEN:
                x = gl.where(inside_n, x, float("-inf"))
    higher = gl.maximum(top, gl.convert_layout(largest(x), top.type.layout))
    finite = gl.where(higher == float("-inf"), 0.0, higher)
    if SHIFTED:
        p = gl.exp2((x - finite[:, None]) * FACTOR)
    else:
        p = gl.exp2(x * FACTOR - (finite * FACTOR)[:, None])
    shrink = gl.exp2((top - finite) * FACTOR)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + added_up(p)
    p = weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs)
    return p, shrink, higher, total


@gluon.jit
def finish(
    acc, total, top, stats, plane, row, inside,
    HAS_MASK: gl.constexpr, PLANES: gl.constexpr, EMPTY_ZERO: gl.constexpr,
):  # fmt: skip
    """Divide by the rows' sums, and store the statistics of rows that are `inside` (as the portable kernel does)."""
    top = top * SCALE
    sums = top + gl.log(total)
    if PLANES == 2:
        low_rows = (((top > LOW_SCORE) & (top < -LOW_SCORE)) == 0) | (total != total)
        shift = gl.where(low_rows, gl.where(total != total, total, top), 0.0)
        if not HAS_MASK:
            sums = gl.where(low_rows, 0.0, top) + gl.log(total)
        gl.store(stats + row + plane, shift, mask=inside)
    if EMPTY_ZERO:
        empty = total == 0.0
        total = gl.where(empty, 1.0, total)
        sums = gl.where(empty, float("inf"), sums)
    gl.store(stats + row, sums, mask=inside)
    return scaled(acc, 1.0 / total)


@gluon.jit
def store_rows(out, out_m, tile, row, inside, FIRST: gl.constexpr, E: gl.constexpr):
    """Store the rows of a tile that are `inside`, from column FIRST up to column E, from registers."""
    E_PAD: gl.constexpr = tile.shape[1]
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (E_PAD // 8), E_PAD // 8], [4, 1], [1, 0])
    rows = gl.convert_layout(row, gl.SliceLayout(1, stored))[:, None]
    columns = FIRST + gl.arange(0, E_PAD, gl.SliceLayout(0, stored))[None, :]
    mask = gl.convert_layout(inside, gl.SliceLayout(1, stored))[:, None] & (columns < E)
    gl.store(out + rows.to(gl.int64) * out_m + columns, gl.convert_layout(tile, stored), mask=mask)


@gluon.jit
def stage_rows(out, staged, place, tile, b, h, first, FIRST: gl.constexpr):
    """Store a tile at column FIRST through its buffer."""
    staged.index(place).reshape([ROWS, tile.shape[1]]).store(tile)
    fence_async_shared()
    tma_store(out, [b, h, first, FIRST], staged.index(place))


@gluon.jit
def pass_over(step, number, key_full, key_empty, value_full, value_empty, STAGES: gl.constexpr):
    """Blocks that other consumers need: only say that they were read, once they are there. Returns the step after them."""
    for i in range(step, step + number):
        mbarrier.wait(key_full.index(i % STAGES), i // STAGES & 1)
        mbarrier.arrive(key_empty.index(i % STAGES), count=1)
        mbarrier.wait(value_full.index(i % STAGES), i // STAGES & 1)
        mbarrier.arrive(value_empty.index(i % STAGES), count=1)
    return step + number


@gluon.jit
def attend(
    out, stats, buffers, table, inputs, lengths, out_strides, plane,
    CONSUMER: gl.constexpr, E: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, TABLE_ROWS: gl.constexpr, EVEN: gl.constexpr, HAS_MASK: gl.constexpr, PLANES: gl.constexpr,
    SHIFTED: gl.constexpr, EMPTY_ZERO: gl.constexpr, STAGED: gl.constexpr, SWAPPED: gl.constexpr,
):  # fmt: skip
    """A consuming partition: 64 rows of each tile.

    The order in the loop is scores of this block, product of the last block, softmax of this block, so that the product
    runs under the softmax. The wait for the next keys stands before that for the product: where it spins a basic
    block ends, over which ptxas does not move the wait for the product (before the exponentials, where it would undo all this).
    """
    queries, keys, values, staged, query_full, query_empty, key_full, key_empty, value_full, value_empty = buffers
    table_b, table_h, B, H, _GROUP, M, N, section = lengths
    out_b, out_h, out_m = out_strides
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    E_PAD: gl.constexpr = values[0].type.shape[4]
    dtype: gl.constexpr = values[0].dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E_PAD, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, k_width=2)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))[None, :]
    blocks = (M + BLOCK_M - 1) // BLOCK_M
    step = 0
    for turn in range(turns_of(blocks * B * H)):
        first, b, h = tile_of(turn, blocks, B, H, section, BLOCK_M, SWAPPED)
        lo, count, _full_lo, _full_hi = keys_of(first, b, h, M, N, table, table_b, table_h, inputs, BLOCK_M, BLOCK_N, TABLE_ROWS)
        first += CONSUMER * ROWS
        own_lo, own_count, full_lo, full_hi = keys_of(
            first, b, h, M, N, table, table_b, table_h, inputs, ROWS, BLOCK_N, TABLE_ROWS
        )
        own_count = gl.where(first < M, own_count, 0)  # no queries are left for this consumer
        before = gl.minimum(gl.maximum((own_lo - lo) // BLOCK_N, 0), count)
        after = count - before - gl.minimum(gl.maximum((own_lo - lo) // BLOCK_N + own_count - before, 0), count - before)
        count -= before + after
        lo += before * BLOCK_N
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
        m = row[:, None]
        inside_m = m < M
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
        total = added_up(zero)
        if HAS_SINK:
            sink = sink_score(b, h, row, row < M, M, N, inputs)
            own = gl.where(sink == float("-inf"), 0.0, 1.0)
            lane = gl.arange(0, 4, gl.SliceLayout(0, total.type.layout))[None, :]
            total = gl.where(lane == 0, gl.convert_layout(own, gl.SliceLayout(1, total.type.layout))[:, None], total)
            top = sink / SCALE
        acc = (gl.zeros([ROWS, E_PAD], gl.float32, out_layout),)
        if len(values) == 2:
            E_REST: gl.constexpr = values[1].type.shape[4]
            rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E_REST, 16])
            acc = (acc[0], gl.zeros([ROWS, E_REST], gl.float32, rest_layout))
        place = turn % QUERIES * CONSUMERS + CONSUMER
        q = (queries[0].index(place).reshape([ROWS, queries[0].type.shape[4]]),)
        if len(queries) == 2:
            q = (q[0], queries[1].index(place).reshape([ROWS, queries[1].type.shape[4]]))
        mbarrier.wait(query_full.index(place), turn // QUERIES & 1)
        step = pass_over(step, before, key_full, key_empty, value_full, value_empty, STAGES)
        if count > 0:
            stage = step % STAGES
            loaded = elements_of(lo, b, h, m, inside_m, column, M, N, inputs, EVEN)
            mbarrier.wait(key_full.index(stage), step // STAGES & 1)
            s = warpgroup_mma_wait(0, deps=[scores_of(q, keys, stage, zero)])
            mbarrier.arrive(key_empty.index(stage), count=1)
            p, shrink, top, total = soften(
                s, loaded, top, total, lo, full_lo, full_hi, b, h, m, inside_m, column, M, N, inputs, HAS_MASK, EVEN, SHIFTED
            )
            p = gl.convert_layout(p.to(dtype), operand)
            mbarrier.wait(key_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=count > 1)
            for i in range(1, count):
                last = (step + i - 1) % STAGES
                stage = (step + i) % STAGES
                loaded = elements_of(lo + i * BLOCK_N, b, h, m, inside_m, column, M, N, inputs, EVEN)
                scores = scores_of(q, keys, stage, zero)
                mbarrier.wait(value_full.index(last), (step + i - 1) // STAGES & 1)
                products = added(acc, p, values, last)
                s = warpgroup_mma_wait(len(values), deps=[scores])
                mbarrier.arrive(key_empty.index(stage), count=1)
                p, shrink, top, total = soften(
                    s, loaded, top, total, lo + i * BLOCK_N, full_lo, full_hi, b, h, m, inside_m, column, M, N, inputs,
                    HAS_MASK, EVEN, SHIFTED,
                )  # fmt: skip
                following = step + i + 1
                mbarrier.wait(key_full.index(following % STAGES), following // STAGES & 1, pred=i + 1 < count)
                acc = waited(products)
                mbarrier.arrive(value_empty.index(last), count=1)
                acc = scaled(acc, shrink)
                p = gl.convert_layout(p.to(dtype), operand)
            mbarrier.arrive(query_empty.index(place), count=1)
            step += count
            last = (step - 1) % STAGES
            mbarrier.wait(value_full.index(last), (step - 1) // STAGES & 1)
            acc = waited(added(acc, p, values, last))
            mbarrier.arrive(value_empty.index(last), count=1)
        else:
            mbarrier.arrive(query_empty.index(place), count=1)
        step = pass_over(step, after, key_full, key_empty, value_full, value_empty, STAGES)
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, score_layout))
        acc = finish(acc, total, top, stats + (b * H + h).to(gl.int64) * M, plane, row, row < M, HAS_MASK, PLANES, EMPTY_ZERO)
        if STAGED:
            tma_store_wait(0)  # what the last tile stored has been read
            stage_rows(out[0], staged[0], CONSUMER, acc[0].to(dtype), b, h, first, 0)
            if len(values) == 2:
                stage_rows(out[1], staged[1], CONSUMER, acc[1].to(dtype), b, h, first, E_PAD)
        else:
            target = out[0] + b.to(gl.int64) * out_b + h.to(gl.int64) * out_h
            store_rows(target, out_m, acc[0].to(dtype), row, row < M, 0, E)
            if len(values) == 2:
                store_rows(target, out_m, acc[1].to(dtype), row, row < M, E_PAD, E)
    if STAGED:
        tma_store_wait(0)


@gluon.jit
def barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """That many initialised barriers."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def rows_buffers(number: gl.constexpr, source):
    """That many buffers for the blocks of a tensor, of each part of its head dim."""
    first = gl.allocate_shared_memory(source[0].dtype, [number] + source[0].block_type.shape, source[0].layout)
    if len(source) == 2:
        second = gl.allocate_shared_memory(source[1].dtype, [number] + source[1].block_type.shape, source[1].layout)
        made = (first, second)
    else:
        made = (first,)
    return made


@gluon.jit
def parts(first, rest):
    """Descriptors of a tensor's parts as a tuple; `rest` is None where the head dim is a power of two."""
    if rest is None:
        both = (first,)
    else:
        both = (first, rest)
    return both


@gluon.jit(
    repr=named("flashfuse_hopper_forward"),
    do_not_specialize=["table_b", "table_h", "B", "H", "GROUP", "M", "N", "section", "plane"],  # nothing in the loop gains by it
)
def flashfuse_hopper_forward(
    query, query_rest, key, key_rest, value, value_rest, out, out_rest, stats, table, inputs,
    out_b, out_h, out_m, table_b, table_h, B, H, GROUP, M, N, section, plane,
    D: gl.constexpr, E: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, REGISTERS: gl.constexpr, TABLE_ROWS: gl.constexpr, EVEN: gl.constexpr,
    HAS_MASK: gl.constexpr, PLANES: gl.constexpr, SHIFTED: gl.constexpr, EMPTY_ZERO: gl.constexpr, STAGED: gl.constexpr,
    SWAPPED: gl.constexpr,
):  # fmt: skip
    """out `[B, H, M, E]` and stats `[PLANES, B, H, M]` from descriptors of query, key and value.

    The grid is as many programs as run at once. `section`: heads whose tiles are taken together (see `tile_of`). QUERIES:
    tiles whose queries are in shared memory at once. STAGED: `out` is a descriptor, and results leave through shared memory.
    """
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    query = parts(query, query_rest)
    key = parts(key, key_rest)
    value = parts(value, value_rest)
    out = parts(out, out_rest)
    queries = rows_buffers(QUERIES * CONSUMERS, query)
    keys = rows_buffers(STAGES, key)
    values = rows_buffers(STAGES, value)
    staged = queries  # of which nothing is read, unless there is room for the results
    if STAGED:
        staged = rows_buffers(CONSUMERS, out)
    query_full = barriers(QUERIES * CONSUMERS, 1)
    query_empty = barriers(QUERIES * CONSUMERS, 1)
    key_full = barriers(STAGES, 1)
    key_empty = barriers(STAGES, CONSUMERS)
    value_full = barriers(STAGES, 1)
    value_empty = barriers(STAGES, CONSUMERS)
    fence_async_shared()
    buffers = (queries, keys, values, staged, query_full, query_empty, key_full, key_empty, value_full, value_empty)
    lengths = (table_b, table_h, B, H, GROUP, M, N, section)
    strides = (out_b, out_h, out_m)
    if CONSUMERS == 2:  # the list must be a literal
        gl.warp_specialize([
            (load, (
                query, key, value, buffers, table, inputs, lengths,
                BLOCK_M, BLOCK_N, CONSUMERS, STAGES, QUERIES, TABLE_ROWS, SWAPPED,
            )),
            (attend, (
                out, stats, buffers, table, inputs, lengths, strides, plane,
                0, E, BLOCK_M, BLOCK_N, STAGES, QUERIES, TABLE_ROWS, EVEN, HAS_MASK, PLANES, SHIFTED, EMPTY_ZERO, STAGED, SWAPPED,
            )),
            (attend, (
                out, stats, buffers, table, inputs, lengths, strides, plane,
                1, E, BLOCK_M, BLOCK_N, STAGES, QUERIES, TABLE_ROWS, EVEN, HAS_MASK, PLANES, SHIFTED, EMPTY_ZERO, STAGED, SWAPPED,
            )),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (load, (
                query, key, value, buffers, table, inputs, lengths,
                BLOCK_M, BLOCK_N, CONSUMERS, STAGES, QUERIES, TABLE_ROWS, SWAPPED,
            )),
            (attend, (
                out, stats, buffers, table, inputs, lengths, strides, plane,
                0, E, BLOCK_M, BLOCK_N, STAGES, QUERIES, TABLE_ROWS, EVEN, HAS_MASK, PLANES, SHIFTED, EMPTY_ZERO, STAGED, SWAPPED,
            )),
            (attend, (
                out, stats, buffers, table, inputs, lengths, strides, plane,
                1, E, BLOCK_M, BLOCK_N, STAGES, QUERIES, TABLE_ROWS, EVEN, HAS_MASK, PLANES, SHIFTED, EMPTY_ZERO, STAGED, SWAPPED,
            )),
            (attend, (
                out, stats, buffers, table, inputs, lengths, strides, plane,
                2, E, BLOCK_M, BLOCK_N, STAGES, QUERIES, TABLE_ROWS, EVEN, HAS_MASK, PLANES, SHIFTED, EMPTY_ZERO, STAGED, SWAPPED,
            )),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
