# ruff: noqa: SIM108 -- a branch on a constexpr must be a statement of its own
"""Backward: recompute the probabilities from the row statistics (FlashAttention-2, Algorithm 2), in two kernels.

`flashfuse_grad_query` owns a block of queries, prepares what the other kernels need of its rows, and loops over keys.
`flashfuse_grad_key_value` owns a block of keys and loops over queries in the transposed layout, so that probabilities
feed the next product from registers. No atomics: equal inputs give equal gradients, bit for bit.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.forward import masked
from flashfuse.codegen.kernels.plain_score import (
    FACTOR,
    HAS_SINK,
    SCALE,
    add_column_sums,
    add_row_sums,
    add_sink_sums,
    keep,
    kept_gradient,
    kept_score,
    key_range,
    load_column_sums,
    named,
    query_range,
    score,
    score_gradient,
    sink_score,
    start_column_sums,
    start_row_sums,
    store_column_sums,
    store_row_sums,
    weight_gradient,
    weighted,
)  # SPLICE
from flashfuse.codegen.kernels.tiles import (
    LOG2E,
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
def probability(x, lse, shift, SHIFTED: tl.constexpr):
    """exp(score - shift - lse); `lse` and `shift` broadcast to the tile, `x` is a score in units of SCALE.

    SHIFTED: take differences first, as scores near the smallest float and float32's precision need it.
    """
    if SHIFTED:
        p = tl.exp2(((x * SCALE - shift) - lse) * LOG2E)
    else:
        p = tl.exp2(x * FACTOR - lse * LOG2E)
    return p


@triton.jit
def low_probability(x, lse, shift):
    """The same for a score in natural units: the shift goes first, since such scores overflow when scaled."""
    return tl.exp2((x - shift) * LOG2E - lse * LOG2E)


@triton.jit
def load_stats(stats, place, plane, inside, PLANES: tl.constexpr):
    """lse and shift of rows; rows that are not `inside` get probability zero."""
    lse = tl.load(stats + place, mask=inside, other=float("inf"))
    if PLANES == 2:
        shift = tl.load(stats + plane + place, mask=inside, other=0.0)
    else:
        shift = tl.zeros_like(lse)
    return lse, shift


@triton.jit
def load_rows(stats, delta, place, plane, inside, PLANES: tl.constexpr):
    """lse, shift and delta of rows."""
    lse, shift = load_stats(stats, place, plane, inside, PLANES)
    return lse, shift, tl.load(delta + place, mask=inside, other=0.0)


@triton.jit
def delta_from_scores(
    q, do, key, key_n, value, value_n, lse, shift, lo, hi, full_lo, full_hi, gap_lo, skipped, b, h, m, inside_m, M, N, inputs,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, g, TMA: tl.constexpr,
):  # fmt: skip
    """Sums over keys of probability times its gradient, and of probability: delta, which does not see that `out` was rounded.

    That rounding is the same for a whole row, so it adds up in sums over keys with growing factors, as of ALiBi's slopes.
    """
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in tl.range(lo, hi, BLOCK_N):
        first = past_gap(step, gap_lo, skipped)
        n = first + tl.arange(0, BLOCK_N)[None, :]
        inside_n = tl.full([1, BLOCK_N], 1, tl.int1) if EVEN else n < N
        k = load_block(key, b, g, first, key_n, N, D, BLOCK_N, D_PAD, not EVEN, TMA)
        v = load_block(value, b, g, first, value_n, N, E, BLOCK_N, E_PAD, not EVEN, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
        if (MASKED or not EVEN) and ((first < full_lo) | (first >= full_hi)):
            x = masked(x, b, h, m, n, inside_m, inside_n, inside_n, M, N, inputs, MASKED)
        p = probability(x, lse[:, None], shift[:, None], SHIFTED)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        row_delta += tl.sum(p * weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs), 1)
        total += tl.sum(p, 1)
    return row_delta, total


@triton.jit
def descend_keys(
    acc, sums, q, do, key, key_n, value, value_n, lse, shift, row_delta, rows, lo, hi, full_lo, full_hi,
    gap_lo, skipped, b, h, m, inside_m, M, N, inputs,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, SHIFTED: tl.constexpr, WHOLE: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, BRANCH: tl.constexpr, g, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, and row sums of captures' gradients, over the key blocks [lo, hi) past the gap.

    WHOLE: the whole program, for the low `rows` only. The rest as in `attend`.
    """
    for step in tl.range(lo, hi, BLOCK_N):
        first = past_gap(step, gap_lo, skipped)
        n = first + tl.arange(0, BLOCK_N)[None, :]
        inside_n = tl.full([1, BLOCK_N], 1, tl.int1) if EVEN else n < N
        k = load_block(key, b, g, first, key_n, N, D, BLOCK_N, D_PAD, not EVEN, TMA)
        v = load_block(value, b, g, first, value_n, N, E, BLOCK_N, E_PAD, not EVEN, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if WHOLE:
            x = score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
            p = low_probability(x, lse[:, None], shift[:, None])
        else:
            x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
            if MASKED or not EVEN:
                if BRANCH:
                    if (first < full_lo) | (first >= full_hi):
                        x = masked(x, b, h, m, n, inside_m, inside_n, inside_n, M, N, inputs, MASKED)
                else:
                    x = masked(x, b, h, m, n, inside_m, inside_n, inside_n, M, N, inputs, MASKED)
            p = probability(x, lse[:, None], shift[:, None], SHIFTED)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dx = p * (weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs) - row_delta[:, None])
        if WHOLE:
            ds = score_gradient(s, dx, b, h, m, n, inside_m, inside_n, M, N, inputs) / SCALE
            ds = tl.where(inside_n & rows[:, None], ds, 0.0)
        else:
            ds = kept_gradient(s, dx, b, h, m, n, inside_m, inside_n, M, N, inputs)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
        if SUMS:
            kept = inside_n
            if WHOLE:
                kept = inside_n & rows[:, None]
            elif MASKED:
                kept = inside_n & keep(b, h, m, n, inside_m, inside_n, M, N, inputs)
            sums = add_row_sums(sums, kept, s, dx, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, WHOLE)
    return acc, sums


@triton.jit(repr=named("flashfuse_grad_query"))
def flashfuse_grad_query(
    query, key, value, out, grad_out, stats, delta, flags, table, grad_query, partial, grad_stats, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, out_b, out_h, out_m,
    grad_b, grad_h, grad_m, dq_b, dq_h, dq_m, table_b, table_h, H, GROUP, M, N, plane, section,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_ROWS: tl.constexpr, EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, SHIFTED: tl.constexpr, LOW: tl.constexpr, SUMS: tl.constexpr,
    EXACT_DELTA: tl.constexpr, GRAD_STATS: tl.constexpr, PRECISION: tl.constexpr, BRANCH: tl.constexpr, SWAPPED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """grad_query `[B, H, M, D]`, partial `[captures, B, H, M]`; the grid is (blocks of queries * B * H,).

    Also delta `[B, H, M]`, the sum over e of out * grad_out (EXACT_DELTA: not of the rounded out; GRAD_STATS: less the gradient
    of the row's logsumexp), and, where low rows can be, flags `[B, H, blocks of queries]`: whether a block has some. LOW: a
    second launch, for the low rows, by the whole program. TMA: key and value are descriptors.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    block, b, h = owned(blocks, H, section, SWAPPED)
    head = b * H + h
    first = (blocks - 1 - block) * BLOCK_M
    b_wide = tl.cast(b, tl.int64)
    h_wide = tl.cast(h, tl.int64)
    g = h // GROUP
    g_wide = tl.cast(g, tl.int64)
    first_wide = tl.cast(first, tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < M
    m = row[:, None]
    inside_m = m < M
    query += b_wide * query_b + h_wide * query_h + first_wide * query_m
    if not TMA:
        key += b_wide * key_b + g_wide * key_g
        value += b_wide * value_b + g_wide * value_g
    grad_out += b_wide * grad_b + h_wide * grad_h + first_wide * grad_m
    grad_query += b_wide * dq_b + h_wide * dq_h + first_wide * dq_m
    place = tl.cast(head, tl.int64) * M + row
    lse, shift = load_stats(stats, place, plane, inside, PLANES)
    low = shift != 0.0
    if LOW:
        if tl.max(low.to(tl.int32), 0) == 0:
            return
        inside = inside & low
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
    do = load_tile(grad_out, grad_m, M - first, E, BLOCK_M, E_PAD, True)
    if LOW:
        row_delta = tl.load(delta + place, mask=inside, other=0.0)
    else:
        o = load_tile(out + b_wide * out_b + h_wide * out_h + first_wide * out_m, out_m, M - first, E, BLOCK_M, E_PAD, True)
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if PLANES == 2 and HAS_MASK:  # the second launch's rows get probability zero
            tl.store(flags + tl.cast(head, tl.int64) * blocks + first // BLOCK_M, tl.max(low.to(tl.int32), 0))
            lse = tl.where(low, float("inf"), lse)
            shift = tl.zeros_like(lse)
        if EXACT_DELTA:
            exact, total = delta_from_scores(
                q, do, key, key_n, value, value_n, lse, shift, lo, hi, full_lo, full_hi,
                gap_lo, skipped, b, h, m, inside_m, M, N, inputs,
                D, E, D_PAD, E_PAD, BLOCK_M, BLOCK_N, HAS_MASK, EVEN, SHIFTED, PRECISION, g, TMA,
            )  # fmt: skip
            if HAS_SINK:
                total += low_probability(sink_score(b, h, row, inside, M, N, inputs), lse, shift)
            if HAS_MASK:
                row_delta = tl.where(low | (total == 0.0), row_delta, exact / total)
            else:
                row_delta = exact / total
        if GRAD_STATS:
            row_delta -= tl.load(grad_stats + place, mask=inside, other=0.0)
        tl.store(delta + place, row_delta, mask=inside)
        if PLANES == 2 and HAS_MASK:
            row_delta = tl.where(low, 0.0, row_delta)
    acc, sums = descend_keys(
        tl.zeros([BLOCK_M, D_PAD], tl.float32), start_row_sums(BLOCK_M), q, do, key, key_n, value, value_n,
        lse, shift, row_delta, low, lo, hi, full_lo, full_hi, gap_lo, skipped, b, h, m, inside_m, M, N, inputs,
        D, E, D_PAD, E_PAD, BLOCK_N, HAS_MASK and not LOW, EVEN, SHIFTED, LOW, SUMS, PRECISION, BRANCH, g, TMA,
    )  # fmt: skip
    store_tile(grad_query, dq_m, acc * SCALE, inside, D, BLOCK_M, D_PAD)
    if SUMS and HAS_SINK:
        own = low_probability(sink_score(b, h, row, inside, M, N, inputs), lse, shift)
        sums = add_sink_sums(sums, -own * row_delta, b, h, row, inside, M, N, inputs)
    if SUMS:
        store_row_sums(sums, partial + place, plane, inside)


@triton.jit
def descend_queries(
    dk, dv, sums, k, v, query, query_m, grad_out, grad_m, stats, delta, plane, lo, hi, full_lo, full_hi,
    gap_lo, skipped, b, h, n, inside_n, M, N, inputs,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, EVEN: tl.constexpr, PLANES: tl.constexpr, SHIFTED: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BRANCH: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values over the query blocks [lo, hi) past the gap, of one head.

    Tiles are `[keys, queries]`. KEY, VALUE: which of the two to compute; column sums come with the key's. MASKED and EVEN
    as in `attend`.
    """
    for step in tl.range(lo, hi, BLOCK_M):
        first = past_gap(step, gap_lo, skipped)
        row = first + tl.arange(0, BLOCK_M)
        m = row[None, :]
        inside = tl.full([BLOCK_M], 1, tl.int1) if EVEN else row < M
        inside_m = tl.full([1, BLOCK_M], 1, tl.int1) if EVEN else m < M
        q = load_block(query, b, h, first, query_m, M, D, BLOCK_M, D_PAD, not EVEN, TMA)
        do = load_block(grad_out, b, h, first, grad_m, M, E, BLOCK_M, E_PAD, not EVEN, TMA)
        lse, shift, row_delta = load_rows(stats, delta, row, plane, inside, PLANES)
        if PLANES == 2 and MASKED:
            low = shift != 0.0
            lse = tl.where(low, float("inf"), lse)
            shift = tl.zeros_like(lse)
            row_delta = tl.where(low, 0.0, row_delta)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        x = kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
        if MASKED or not EVEN:
            if BRANCH:
                if (first < full_lo) | (first >= full_hi):
                    x = masked(x, b, h, m, n, inside_m, inside_n, inside_m, M, N, inputs, MASKED)
            else:
                x = masked(x, b, h, m, n, inside_m, inside_n, inside_m, M, N, inputs, MASKED)
        p = probability(x, lse[None, :], shift[None, :], SHIFTED)
        if VALUE:
            pv = weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs)
            dv = tl.dot(pv.to(do.dtype), do, dv, input_precision=PRECISION)
        if KEY:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dx = p * (weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs) - row_delta[None, :])
            ds = kept_gradient(s, dx, b, h, m, n, inside_m, inside_n, M, N, inputs)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if SUMS and KEY:
            kept = inside_m
            if MASKED:
                kept = inside_m & keep(b, h, m, n, inside_m, inside_n, M, N, inputs)
            sums = add_column_sums(sums, kept, s, dx, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, False)
    return dk, dv, sums


@triton.jit
def descend_low_queries(
    dk, dv, sums, k, v, query, query_m, grad_out, grad_m, stats, delta, plane,
    b, h, n, inside_n, M, N, inputs,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for the low rows among all queries, by the whole program."""
    for first in tl.range(0, M, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        m = row[None, :]
        inside_m = m < M
        lse, shift, row_delta = load_rows(stats, delta, row, plane, row < M, 2)
        low = shift != 0.0
        if tl.max(low.to(tl.int32), 0) > 0:
            first_wide = tl.cast(first, tl.int64)
            q = load_tile(query + first_wide * query_m, query_m, M - first, D, BLOCK_M, D_PAD, True)
            do = load_tile(grad_out + first_wide * grad_m, grad_m, M - first, E, BLOCK_M, E_PAD, True)
            kept = low[None, :] & inside_m
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            x = score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)
            p = tl.where(kept, low_probability(x, lse[None, :], shift[None, :]), 0.0)
            pv = weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs)
            dv = tl.dot(pv.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            row_delta = tl.where(low, row_delta, 0.0)
            dx = p * (weight_gradient(p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs) - row_delta[None, :])
            ds = score_gradient(s, dx, b, h, m, n, inside_m, inside_n, M, N, inputs) / SCALE
            ds = tl.where(kept, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if SUMS:
                sums = add_column_sums(sums, kept, s, dx, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, True)
    return dk, dv, sums


@triton.jit(repr=named("flashfuse_grad_key_value"))
def flashfuse_grad_key_value(
    query, key, value, grad_out, stats, delta, table, grad_key, grad_value, partial, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
    dk_b, dk_g, dk_n, dv_b, dv_g, dv_n, table_b, table_h, H, GROUP, M, N, plane, sum_plane, section,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TABLE_ROWS: tl.constexpr, EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr, PLANES: tl.constexpr, SHIFTED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BRANCH: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SWAPPED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value `[B, G, N, .]`, partial `[captures, B, H, N]`; the grid is (blocks of keys * B * G,).

    KEY: compute grad_key and partial; VALUE: compute grad_value. Large head dims take a launch for each. TMA: query and
    grad_out are descriptors.
    """
    block, b, g = owned(tl.cdiv(N, BLOCK_N), H // GROUP, section, SWAPPED)
    first = block * BLOCK_N
    b_wide = tl.cast(b, tl.int64)
    g_wide = tl.cast(g, tl.int64)
    first_wide = tl.cast(first, tl.int64)
    column = first + tl.arange(0, BLOCK_N)
    inside = column < N
    n = column[:, None]
    inside_n = n < N
    key += b_wide * key_b + g_wide * key_g + first_wide * key_n
    value += b_wide * value_b + g_wide * value_g + first_wide * value_n
    grad_key += b_wide * dk_b + g_wide * dk_g + first_wide * dk_n
    grad_value += b_wide * dv_b + g_wide * dv_g + first_wide * dv_n
    k = load_tile(key, key_n, N - first, D, BLOCK_N, D_PAD, True)
    v = load_tile(value, value_n, N - first, E, BLOCK_N, E_PAD, True)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    last = tl.minimum(first + BLOCK_N, N) - 1
    for member in tl.range(0, GROUP):
        h = g * GROUP + member
        h_wide = tl.cast(h, tl.int64)
        head = b_wide * H + h
        q_head = query if TMA else query + b_wide * query_b + h_wide * query_h
        do_head = grad_out if TMA else grad_out + b_wide * grad_b + h_wide * grad_h
        sums = start_column_sums(BLOCK_N)
        lo, hi, full_lo, full_hi, gap_lo, gap_hi = query_range(first, last, b, h, M, N, inputs)
        if TABLE_ROWS > 0:
            own = table + b_wide * table_b + h_wide * table_h + tl.cdiv(M, TABLE_ROWS) * 6  # behind the queries' rows
            rows = tl.cdiv(N, TABLE_ROWS)
            lo, hi, full_lo, full_hi, gap_lo, gap_hi = with_table(lo, hi, own, first, rows, TABLE_ROWS, BLOCK_N)
        lo, full_lo, full_hi = block_aligned(lo, full_lo, full_hi, BLOCK_M)
        hi, gap_lo, skipped = without_gap(lo, hi, gap_lo, gap_hi, BLOCK_M)
        dk, dv, sums = descend_queries(
            dk, dv, sums, k, v, q_head, query_m, do_head, grad_m, stats + head * M, delta + head * M, plane,
            lo, hi, full_lo, full_hi, gap_lo, skipped, b, h, n, inside_n, M, N, inputs,
            D, E, D_PAD, E_PAD, BLOCK_M, HAS_MASK, EVEN, PLANES, SHIFTED, SUMS, PRECISION, BRANCH, KEY, VALUE, TMA,
        )  # fmt: skip
        if SUMS and KEY:
            store_column_sums(sums, partial + head * N + column, sum_plane, inside)
    if KEY:
        store_tile(grad_key, dk_n, dk * SCALE, inside, D, BLOCK_N, D_PAD)
    if VALUE:
        store_tile(grad_value, dv_n, dv, inside, E, BLOCK_N, E_PAD)


@triton.jit(repr=named("flashfuse_add_low_queries"))
def flashfuse_add_low_queries(
    query, key, value, grad_out, stats, delta, flags, grad_key, grad_value, partial, inputs,
    query_b, query_h, query_m, key_b, key_g, key_n, value_b, value_g, value_n, grad_b, grad_h, grad_m,
    dk_b, dk_g, dk_n, dv_b, dv_g, dv_n, H, GROUP, M, N, plane, sum_plane, flag_blocks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what low rows, by the whole program, give to grad_key, grad_value and partial; nothing to do without any.

    The flags are loaded many at a time, so that the usual case costs one load a head.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    groups = H // GROUP
    pair = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_N
    b = pair // groups
    g = pair % groups
    b_wide = tl.cast(b, tl.int64)
    g_wide = tl.cast(g, tl.int64)
    first_wide = tl.cast(first, tl.int64)
    flags += (b_wide * H + g_wide * GROUP) * flag_blocks  # those of the group's heads follow each other
    flagged = tl.zeros([256], tl.int32)
    for start in tl.range(0, flag_blocks * GROUP, 256):
        flag = start + tl.arange(0, 256)
        flagged |= tl.load(flags + flag, mask=flag < flag_blocks * GROUP, other=0)
    if tl.max(flagged, 0) == 0:
        return
    column = first + tl.arange(0, BLOCK_N)
    inside = column < N
    n = column[:, None]
    inside_n = n < N
    key += b_wide * key_b + g_wide * key_g + first_wide * key_n
    value += b_wide * value_b + g_wide * value_g + first_wide * value_n
    grad_key += b_wide * dk_b + g_wide * dk_g + first_wide * dk_n
    grad_value += b_wide * dv_b + g_wide * dv_g + first_wide * dv_n
    k = load_tile(key, key_n, N - first, D, BLOCK_N, D_PAD, True)
    v = load_tile(value, value_n, N - first, E, BLOCK_N, E_PAD, True)
    dk = load_tile(grad_key, dk_n, N - first, D, BLOCK_N, D_PAD, True).to(tl.float32) / SCALE
    dv = load_tile(grad_value, dv_n, N - first, E, BLOCK_N, E_PAD, True).to(tl.float32)
    for member in tl.range(0, GROUP):
        h = g * GROUP + member
        h_wide = tl.cast(h, tl.int64)
        head = b_wide * H + h
        sums = load_column_sums(partial + head * N + column, sum_plane, inside) if SUMS else start_column_sums(BLOCK_N)
        dk, dv, sums = descend_low_queries(
            dk, dv, sums, k, v, query + b_wide * query_b + h_wide * query_h, query_m,
            grad_out + b_wide * grad_b + h_wide * grad_h, grad_m, stats + head * M, delta + head * M, plane,
            b, h, n, inside_n, M, N, inputs, D, E, D_PAD, E_PAD, BLOCK_M, SUMS, PRECISION,
        )  # fmt: skip
        if SUMS:
            store_column_sums(sums, partial + head * N + column, sum_plane, inside)
    store_tile(grad_key, dk_n, dk * SCALE, inside, D, BLOCK_N, D_PAD)
    store_tile(grad_value, dv_n, dv, inside, E, BLOCK_N, E_PAD)
