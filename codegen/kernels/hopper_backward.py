# ruff: noqa: SIM102, RUF005 -- a branch on a constexpr must be a statement of its own; Triton's lists are added
"""Backward for Hopper: warp-specialised, five products for each pair of blocks, the query's gradient added by TMA.

FlashAttention-3's backward (Shah et al. 2024, appendix B.2) in the transposed layout: one partition of warps loads by TMA,
two others own 64 keys each of the program's 128, and walk the queries that see them. `flashfuse_hopper_prepare` runs
before, `flashfuse_hopper_round` after it. The sum of a query's gradient depends on the order in which blocks arrive.

Why no wait can last for ever. Buffers of queries and of output gradients are handed to and fro as in the forward: loader and
readers walk the same blocks in the same order, every reader arrives once for every fill, and the k-th fill waits for
the (k-1)-th round of arrivals. Where readers exchange gradients of scores (`ds_full`), both arrive once for every block
before either waits for it. Two buffers suffice: who fills one for block i has passed the exchange of block i - 1, for
which the other arrived after its product of block i - 2 had read the same buffer.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.hopper_api import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_add,
    tma_load,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashfuse.codegen.kernels.hopper_forward import barriers
from flashfuse.codegen.kernels.plain_score import (
    FACTOR,
    SCALE,
    add_sink_sums,
    keep,
    kept_gradient,
    kept_score,
    named,
    query_range,
    sink_score,
    start_row_sums,
    store_row_sums,
    weight_gradient,
    weighted,
)  # SPLICE
from flashfuse.codegen.kernels.tiles import LOG2E, block_aligned, load_tile, store_tile

OWN = gl.constexpr(64)  # keys of a consumer


@triton.jit(repr=named("flashfuse_hopper_prepare"))
def flashfuse_hopper_prepare(
    out, grad_out, stats, rows, grad_sum, delta, flags, partial, inputs,
    out_b, out_h, out_m, grad_b, grad_h, grad_m, H, M, N, plane, rows_padded,
    E: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Fill rows `[B * H, 2, rows_padded]` with what the loop reads of a query, and zero grad_sum `[B * H, M, D_PAD]`.

    The first is the logsumexp, to base 2, infinite beyond M; the second is delta, the sum of output times its gradient.
    LOW: rows that lie low get probability zero there; `delta` and `flags` are for the launches that add what they give.
    SUMS: `partial` gets the rows' gradients of what the sinks read.
    """
    blocks = tl.cdiv(rows_padded, BLOCK)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    b = tl.cast(head // H, tl.int64)
    h = tl.cast(head % H, tl.int64)
    head_wide = tl.cast(head, tl.int64)
    first_wide = tl.cast(first, tl.int64)
    row = first + tl.arange(0, BLOCK)
    inside = row < M
    o = load_tile(out + b * out_b + h * out_h + first_wide * out_m, out_m, M - first, E, BLOCK, E_PAD, True)
    do = load_tile(grad_out + b * grad_b + h * grad_h + first_wide * grad_m, grad_m, M - first, E, BLOCK, E_PAD, True)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    place = head_wide * M + row
    lse = tl.load(stats + place, mask=inside, other=float("inf"))
    if SUMS:
        own = tl.exp2((sink_score(head // H, head % H, row, inside, M, N, inputs) - lse) * LOG2E)
        sums = add_sink_sums(start_row_sums(BLOCK), -own * row_delta, head // H, head % H, row, inside, M, N, inputs)
        store_row_sums(sums, partial + place, plane, inside)
    if LOW:
        low = tl.load(stats + plane + place, mask=inside, other=0.0) != 0.0
        tl.store(flags + head_wide * blocks + first // BLOCK, tl.max(low.to(tl.int32), 0))
        tl.store(delta + place, row_delta, mask=inside)
        lse = tl.where(low, float("inf"), lse)
        row_delta = tl.where(low, 0.0, row_delta)
    target = rows + head_wide * 2 * rows_padded + row
    tl.store(target, lse * LOG2E)
    tl.store(target + rows_padded, row_delta)
    zeros = tl.zeros([BLOCK, D_PAD], tl.float32)
    store_tile(grad_sum + (head_wide * M + first_wide) * D_PAD, D_PAD, zeros, inside, D_PAD, BLOCK, D_PAD)


@triton.jit(repr=named("flashfuse_hopper_round"))
def flashfuse_hopper_round(
    grad_sum, grad, grad_b, grad_h, grad_m, H, M, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """The query's gradient from its sum, scaled."""
    blocks = tl.cdiv(M, BLOCK)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    first_wide = tl.cast(first, tl.int64)
    total = load_tile(grad_sum + (tl.cast(head, tl.int64) * M + first_wide) * D_PAD, D_PAD, M - first, D_PAD, BLOCK, D_PAD, True)
    target = grad + tl.cast(head // H, tl.int64) * grad_b + tl.cast(head % H, tl.int64) * grad_h + first_wide * grad_m
    store_tile(target, grad_m, total * SCALE, first + tl.arange(0, BLOCK) < M, D, BLOCK, D_PAD)


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x in 16 bits, two elements to an instruction.

    Of a plain cast whose result is wanted in float32 again Triton makes one conversion an element, and those are as slow
    as exponentials.
    """
    if dtype == gl.bfloat16:
        y = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        y = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2)
    return y


@gluon.jit
def queries_of(first, b, h, M, N, inputs, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The blocks of queries from lo on of a block of keys, how many they are, and those without a mask, [full_lo, full_hi)."""
    last = gl.minimum(first + BLOCK_N, N) - 1
    lo, hi, full_lo, full_hi, _gap_lo, _gap_hi = query_range(first, last, b, h, M, N, inputs)
    lo, full_lo, full_hi = block_aligned(lo, full_lo, full_hi, BLOCK_M)
    return lo, gl.maximum((hi - lo + BLOCK_M - 1) // BLOCK_M, 0), full_lo, full_hi


@gluon.jit
def block_of(blocks, B, G, section, BLOCK_N: gl.constexpr, SWAPPED: gl.constexpr):
    """The first key, the batch and the head of keys of this program: by sections of heads, the first blocks of keys first.

    Under a causal mask those are seen by most queries. SWAPPED: batches follow each other before heads (see `codegen/order.py`).
    """
    heads = B * G
    number = gl.program_id(0)
    before = number // (section * blocks) * section
    number -= before * blocks
    here = gl.minimum(heads - before, section)
    head = before + number % here
    if SWAPPED:
        b = head % B
        g = head // B
    else:
        b = head // G
        g = head % G
    return number // here * BLOCK_N, b, g


@gluon.jit
def load_queries(
    query, key, value, grad_out, rows, buffers, inputs, lengths,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SWAPPED: gl.constexpr,
):  # fmt: skip
    """The loading partition: keys and values, then queries, output gradients and rows block by block."""
    queries, keys, values, grads, lses, deltas = buffers[:6]
    key_full, query_full, query_empty, grad_full, grad_empty, _ds_full = buffers[8:]
    B, H, G, M, N, section = lengths
    first, b, g = block_of((N + BLOCK_N - 1) // BLOCK_N, B, G, section, BLOCK_N, SWAPPED)
    group = H // G
    mbarrier.expect(key_full.index(0), key.block_type.nbytes + value.block_type.nbytes)
    tma_load(key, [b, g, first, 0], key_full.index(0), keys)
    tma_load(value, [b, g, first, 0], key_full.index(0), values)
    step = 0
    for h in range(g * group, g * group + group):
        lo, count, _full_lo, _full_hi = queries_of(first, b, h, M, N, inputs, BLOCK_M, BLOCK_N)
        row = (b * H + h) * 2
        for i in range(count):
            m = lo + i * BLOCK_M
            stage = step % STAGES
            used = step // STAGES & 1 ^ 1
            mbarrier.wait(query_empty.index(stage), used)
            mbarrier.expect(query_full.index(stage), query.block_type.nbytes + rows.block_type.nbytes)
            tma_load(query, [b, h, m, 0], query_full.index(stage), queries.index(stage))
            tma_load(rows, [row, m], query_full.index(stage), lses.index(stage))
            mbarrier.wait(grad_empty.index(stage), used)
            mbarrier.expect(grad_full.index(stage), grad_out.block_type.nbytes + rows.block_type.nbytes)
            tma_load(grad_out, [b, h, m, 0], grad_full.index(stage), grads.index(stage))
            tma_load(rows, [row + 1, m], grad_full.index(stage), deltas.index(stage))
            step += 1


@gluon.jit
def differentiate(
    grad_key, grad_value, grad_sum, buffers, inputs, lengths, strides,
    CONSUMER: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, EVEN: gl.constexpr, HAS_MASK: gl.constexpr, SWAPPED: gl.constexpr,
):  # fmt: skip
    """A consuming partition: gradients of 64 keys and values, and a part of the gradients of the queries.

    Order in the loop: both products that the scores' gradient needs, the probabilities under the second, the value's product
    under the scores' gradient, the key's while that gradient goes to shared memory, from where it is multiplied once more
    for the queries. A block's statistics are loaded before a product is issued: after it they would wait behind its own reads.
    At head dim 128 both partitions exchange their halves of that gradient, and each sums over all keys for half of the
    columns: of sums over its own keys a thread could not hold so many. At head dim 64 it is shared memory's bandwidth that
    bounds, and keys and values are held in registers.
    """
    queries, keys, values, grads, lses, deltas, staged, sums = buffers[:8]
    key_full, query_full, query_empty, grad_full, grad_empty, ds_full = buffers[8:]
    B, H, G, M, N, section = lengths
    key_b, key_g, key_n, value_b, value_g, value_n = strides
    D_PAD: gl.constexpr = keys.type.shape[3]
    E_PAD: gl.constexpr = values.type.shape[3]
    dtype: gl.constexpr = keys.dtype
    COLUMNS: gl.constexpr = sums.type.shape[3]  # of the queries' gradient that this partition sums
    EXCHANGED: gl.constexpr = COLUMNS < D_PAD
    first_column: gl.constexpr = CONSUMER * COLUMNS if EXCHANGED else 0
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    key_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
    value_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E_PAD, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    for_score: gl.constexpr = gl.DotOperandLayout(0, score_layout, k_width=2)
    for_key: gl.constexpr = gl.DotOperandLayout(0, key_layout, k_width=2)
    for_value: gl.constexpr = gl.DotOperandLayout(0, value_layout, k_width=2)
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, score_layout))[None, :]
    zero = gl.zeros([OWN, BLOCK_M], gl.float32, score_layout)
    zero_sum = gl.zeros([BLOCK_M, COLUMNS], gl.float32, sum_layout)
    own_keys = keys.reshape([BLOCK_N, D_PAD]).slice(CONSUMER * OWN, OWN, 0)
    own_values = values.reshape([BLOCK_N, E_PAD]).slice(CONSUMER * OWN, OWN, 0)
    summed_keys = own_keys
    if EXCHANGED:
        summed_keys = keys.reshape([BLOCK_N, D_PAD]).slice(first_column, COLUMNS, 1)
    first, b, g = block_of((N + BLOCK_N - 1) // BLOCK_N, B, G, section, BLOCK_N, SWAPPED)
    group = H // G
    own = first + CONSUMER * OWN
    n = (own + gl.arange(0, OWN, gl.SliceLayout(1, score_layout)))[:, None]
    inside_n = n < N
    dk = gl.zeros([OWN, D_PAD], gl.float32, key_layout)
    dv = gl.zeros([OWN, E_PAD], gl.float32, value_layout)
    mbarrier.wait(key_full.index(0), 0)
    k = own_keys
    if D_PAD == 64:
        k = own_keys.load(for_score)
    v = own_values
    if E_PAD == 64:
        v = own_values.load(for_score)
    step = 0
    for h in range(g * group, g * group + group):
        lo, count, full_lo, full_hi = queries_of(first, b, h, M, N, inputs, BLOCK_M, BLOCK_N)
        for i in range(count):
            begin = lo + i * BLOCK_M
            m = begin + column
            inside_m = m < M
            stage = step % STAGES
            filled = step // STAGES & 1
            mbarrier.wait(query_full.index(stage), filled)
            lse = lses.index(stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
            q = queries.index(stage).reshape([BLOCK_M, D_PAD])
            scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(grad_full.index(stage), filled)
            do = grads.index(stage).reshape([BLOCK_M, E_PAD])
            products = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[scores])
            x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
            if HAS_MASK or not EVEN:
                if (begin < full_lo) | (begin >= full_hi) | (first + BLOCK_N > N):
                    inside = inside_m & inside_n  # a key beyond N must not reach the query's gradient, not even as inf * 0
                    if HAS_MASK:
                        inside = inside & keep(b, h, m, n, inside_m, inside_n, M, N, inputs)
                    x = gl.where(inside, x, float("-inf"))
            p = gl.exp2(x * FACTOR - lse[None, :])
            if EXCHANGED:
                p = rounded(p, dtype).to(gl.float32)  # as it is multiplied: half the registers until it is needed again
            delta = deltas.index(stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
            pv = weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs)
            pv = gl.convert_layout(pv.to(dtype), for_value)
            values_grad = warpgroup_mma(pv, do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[products])
            dx = p * (weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs) - delta[None, :])
            ds = kept_gradient(s, dx, b, h, m, n, inside_m, inside_n, M, N, inputs).to(dtype)
            shared = staged.index(step % staged.type.shape[0])
            own_part = shared.slice(CONSUMER * OWN, OWN, 0)
            if EXCHANGED:
                own_part.store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(0), count=1)
                keys_grad = warpgroup_mma(gl.convert_layout(ds, for_key), q, dk, is_async=True)
                mbarrier.wait(ds_full.index(0), step & 1)
                part = warpgroup_mma(shared.permute((1, 0)), summed_keys, zero_sum, use_acc=False, is_async=True)
                dv = warpgroup_mma_wait(2, deps=[values_grad])
                mbarrier.arrive(grad_empty.index(stage), count=1)
            else:
                keys_grad = warpgroup_mma(gl.convert_layout(ds, for_key), q, dk, is_async=True)
                own_part.store(ds)
                fence_async_shared()
                dv = warpgroup_mma_wait(1, deps=[values_grad])
                mbarrier.arrive(grad_empty.index(stage), count=1)
                part = warpgroup_mma(own_part.permute((1, 0)), summed_keys, zero_sum, use_acc=False, is_async=True)
            dk = warpgroup_mma_wait(1, deps=[keys_grad])
            mbarrier.arrive(query_empty.index(stage), count=1)
            part = warpgroup_mma_wait(0, deps=[part])
            tma_store_wait(0)  # what was added last has been read
            sums.index(CONSUMER).reshape([BLOCK_M, COLUMNS]).store(part)
            fence_async_shared()
            tma_add(grad_sum, [b * H + h, begin, first_column], sums.index(CONSUMER))
            step += 1
    store_own(grad_key + b.to(gl.int64) * key_b + g.to(gl.int64) * key_g, key_n, (dk * SCALE).to(dtype), own, N, D)
    store_own(grad_value + b.to(gl.int64) * value_b + g.to(gl.int64) * value_g, value_n, dv.to(dtype), own, N, E)
    tma_store_wait(0)


@gluon.jit
def store_own(pointer, stride, tile, first, length, DIM: gl.constexpr):
    """Store a tile's rows from `first` on that lie within `length`, and its first DIM columns."""
    ROWS: gl.constexpr = tile.shape[0]
    PAD: gl.constexpr = tile.shape[1]
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (PAD // 8), PAD // 8], [4, 1], [1, 0])
    row = (first + gl.arange(0, ROWS, gl.SliceLayout(1, stored)))[:, None]
    column = gl.arange(0, PAD, gl.SliceLayout(0, stored))[None, :]
    tile = gl.convert_layout(tile, stored)
    gl.store(pointer + row.to(gl.int64) * stride + column, tile, mask=(row < length) & (column < DIM))


@gluon.jit(repr=named("flashfuse_hopper_backward"), do_not_specialize=["B", "H", "G", "M", "N", "section"])
def flashfuse_hopper_backward(
    query, key, value, grad_out, rows, grad_sum, grad_key, grad_value, inputs,
    key_b, key_g, key_n, value_b, value_g, value_n, B, H, G, M, N, section,
    D: gl.constexpr, E: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, EVEN: gl.constexpr, HAS_MASK: gl.constexpr, SWAPPED: gl.constexpr,
):  # fmt: skip
    """Gradients of key and value, and the sum of those of the query, from descriptors of the rest.

    The grid is (blocks of 128 keys * B * G,). `section`: heads whose blocks are taken together. EVEN: no block reaches
    beyond M or N.
    """
    BLOCK_N: gl.constexpr = 2 * OWN
    queries = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    keys = gl.allocate_shared_memory(key.dtype, key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, value.block_type.shape, value.layout)
    grads = gl.allocate_shared_memory(grad_out.dtype, [STAGES] + grad_out.block_type.shape, grad_out.layout)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES] + rows.block_type.shape, rows.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES] + rows.block_type.shape, rows.layout)
    ds_buffers: gl.constexpr = 2 if grad_sum.block_type.shape[2] < query.block_type.shape[3] else 1
    staged_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], key.dtype)
    staged = gl.allocate_shared_memory(key.dtype, [ds_buffers, BLOCK_N, BLOCK_M], staged_layout)
    sums = gl.allocate_shared_memory(gl.float32, [2] + grad_sum.block_type.shape, grad_sum.layout)
    key_full = barriers(1, 1)
    query_full = barriers(STAGES, 1)
    query_empty = barriers(STAGES, 2)
    grad_full = barriers(STAGES, 1)
    grad_empty = barriers(STAGES, 2)
    ds_full = barriers(1, 2)
    fence_async_shared()
    buffers = (
        queries, keys, values, grads, lses, deltas, staged, sums,
        key_full, query_full, query_empty, grad_full, grad_empty, ds_full,
    )  # fmt: skip
    lengths = (B, H, G, M, N, section)
    strides = (key_b, key_g, key_n, value_b, value_g, value_n)
    gl.warp_specialize([
        (load_queries, (query, key, value, grad_out, rows, buffers, inputs, lengths, BLOCK_M, BLOCK_N, STAGES, SWAPPED)),
        (differentiate, (
            grad_key, grad_value, grad_sum, buffers, inputs, lengths, strides,
            0, D, E, BLOCK_M, BLOCK_N, STAGES, EVEN, HAS_MASK, SWAPPED,
        )),
        (differentiate, (
            grad_key, grad_value, grad_sum, buffers, inputs, lengths, strides,
            1, D, E, BLOCK_M, BLOCK_N, STAGES, EVEN, HAS_MASK, SWAPPED,
        )),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
