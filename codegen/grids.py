"""The launches of the portable kernels: for each its grid, and the arguments in the order of the kernel's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashfuse.codegen import tuning
from flashfuse.codegen.capture_gradients import CaptureBuffers
from flashfuse.codegen.descriptors import in_blocks
from flashfuse.codegen.order import bytes_of_keys, bytes_of_queries, order_of
from flashfuse.codegen.plan import Tile
from flashfuse.ir.attention_spec import EmptyRows

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call


def _options(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.warps, "num_stages": tile.stages}


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def forward(call: Call, tile: Tile, out: Tensor, stats: Tensor, *, low: bool) -> Any:
    """Fill out and stats; `low`: only in rows that lie low, from the whole program."""
    table = call.no_table if low else call.table
    order = order_of(call, call.H, bytes_of_keys(call))
    (key, value), tma = _keys(call, tile, low)
    return call.start(
        "flashfuse_forward", _blocks(call.M, tile.block_m) * call.B * call.H,
        call.query, key, value, out, stats, table.tensor, call.inputs,
        *call.strides(call.query, call.key, call.value, out), *table.strides, *call.shape, call.plane, order.section,
        TABLE_ROWS=table.rows, EVEN=call.N % tile.block_n == 0, LOW=low, SWAPPED=order.swapped,
        EMPTY_ZERO=call.spec.empty_rows is EmptyRows.ZERO,
        **call.constants, BRANCH=tile.branch, TMA=tma, **_options(tile),
    )  # fmt: skip


def _keys(call: Call, tile: Tile, low: bool) -> tuple[Sequence[Any], bool]:
    """Key and value for the loop of a kernel that owns queries, and whether these are descriptors; never for `low` rows."""
    if low:
        return (call.key, call.value), False
    return in_blocks(call, tile, tile.block_n, (call.key, call.value), call.padded)


def grad_query(call: Call, tile: Tile, grad: Tensor, gradients: CaptureBuffers, *, low: bool) -> Any:
    """Fill the query's gradient, `call.delta` and row sums; `low`: add to them what rows that lie low give."""
    partial = gradients.row_partial
    table = call.no_table if low else call.table
    blocks = _blocks(call.M, tile.block_m)
    if not low:
        call.flags = call.empty((call.B, call.H, blocks), torch.int32) if call.low_rows else call.delta
    order = order_of(call, call.H, bytes_of_keys(call))
    (key, value), tma = _keys(call, tile, low)
    return call.start(
        "flashfuse_grad_query", blocks * call.B * call.H,
        call.query, key, value, call.out, call.grad_out, call.stats, call.delta, call.flags, table.tensor, grad,
        call.delta if partial is None else partial, call.delta if call.grad_stats is None else call.grad_stats, call.inputs,
        *call.strides(call.query, call.key, call.value, call.out, call.grad_out, grad), *table.strides, *call.shape, call.plane,
        order.section, TABLE_ROWS=table.rows, EVEN=call.N % tile.block_n == 0, LOW=low, SUMS=partial is not None,
        EXACT_DELTA=not low and gradients.summed, GRAD_STATS=call.grad_stats is not None, SWAPPED=order.swapped,
        **call.constants, BRANCH=tile.branch, TMA=tma, **_options(tile),
    )  # fmt: skip


def grad_key_value(call: Call, tile: Tile, grad_key: Tensor, grad_value: Tensor, partial: Tensor | None) -> Any:
    """Fill both gradients and column sums; returns the compiled kernel, of two the one that spills more."""
    table = call.table
    order = order_of(call, call.G, bytes_of_queries(call))
    (query, grad_out), tma = in_blocks(call, tile, tile.block_m, (call.query, call.grad_out), call.padded)
    compiled = [
        call.start(
            "flashfuse_grad_key_value", _blocks(call.N, tile.block_n) * call.B * call.G,
            query, call.key, call.value, grad_out, call.stats, call.delta, table.tensor,
            grad_key, grad_value, call.delta if partial is None else partial, call.inputs,
            *call.strides(call.query, call.key, call.value, call.grad_out, grad_key, grad_value), *table.strides,
            *call.shape, call.plane, call.B * call.H * call.N, order.section,
            TABLE_ROWS=table.rows, EVEN=call.M % tile.block_m == 0, SUMS=partial is not None, SWAPPED=order.swapped,
            **call.constants, BRANCH=tile.branch, KEY="k" in wanted, VALUE="v" in wanted, TMA=tma, **_options(tile),
        )
        for wanted in (("k", "v") if tile.split else ("kv",))
    ]  # fmt: skip
    return max(compiled, key=tuning.spills)


def add_low_queries(call: Call, tile: Tile, grad_key: Tensor, grad_value: Tensor, partial: Tensor | None) -> Any:
    """Add what queries whose rows lie low give to both gradients."""
    constants = {name: value for name, value in call.constants.items() if name not in ("HAS_MASK", "PLANES", "SHIFTED")}
    return call.start(
        "flashfuse_add_low_queries", _blocks(call.N, tile.block_n) * call.B * call.G,
        call.query, call.key, call.value, call.grad_out, call.stats, call.delta, call.flags,
        grad_key, grad_value, call.delta if partial is None else partial, call.inputs,
        *call.strides(call.query, call.key, call.value, call.grad_out, grad_key, grad_value),
        *call.shape, call.plane, call.B * call.H * call.N, call.flags.shape[-1],
        SUMS=partial is not None, **constants, **_options(tile),
    )  # fmt: skip


def grad_capture(call: Call, tile: Tile, capture: int, grad: Tensor) -> Any:
    """Fill a capture's gradient `[B or 1, H or 1, M, N]`."""
    kept_b, kept_h = grad.shape[0], grad.shape[1]
    tiles = _blocks(call.M, tile.block_m) * _blocks(call.N, tile.block_n)
    return call.start(
        "flashfuse_grad_capture", tiles * kept_b * kept_h,
        call.query, call.key, call.value, call.grad_out, call.stats, call.delta, grad, call.inputs,
        *call.strides(call.query, call.key, call.value, call.grad_out), *grad.stride(), *call.shape, call.plane,
        kept_h, call.B // kept_b, call.H // kept_h, CAPTURE=capture,
        EVEN=call.M % tile.block_m == 0 and call.N % tile.block_n == 0, **call.constants, **_options(tile),
    )  # fmt: skip


def grad_diagonals(call: Call, tile: Tile, capture: int, gradients: CaptureBuffers) -> Any:
    """Fill the sums along diagonals of a capture's gradient, in strips."""
    block = min(tile.block_m, tile.block_n)
    strips = gradients.strips(capture, block)
    kept_b, kept_h, count = strips.shape[:3]
    return call.start(
        "flashfuse_grad_diagonals", count * kept_b * kept_h,
        call.query, call.key, call.value, call.grad_out, call.stats, call.delta, strips, call.inputs,
        *call.strides(call.query, call.key, call.value, call.grad_out), *call.shape, call.plane,
        kept_h, call.B // kept_b, call.H // kept_h, CAPTURE=capture, BLOCK=block,
        EVEN=call.M % block == 0 and call.N % block == 0, **call.constants,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
