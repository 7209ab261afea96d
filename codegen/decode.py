"""When few queries meet many keys (decoding), and the launches for it: see `kernels/decode.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashfuse.codegen.plan import Tile
from flashfuse.ir.attention_spec import EmptyRows
from flashfuse.ir.derivative import index_letters

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

_FREE_ROWS = 16  # a tile of the matrix instruction: up to here packed queries cost nothing
_MOST_ROWS = 128  # beyond that they still cost less than reading the keys more than once
_MOST_SPLITS = 128
_KEYS = 128  # fewer are not worth a program
_WAVES = 2  # programs that share a multiprocessor
_LOW_KEYS = (64, 16)  # keys at a time for a low row, at head dims to 128 and above


@dataclass(frozen=True)
class Split:
    """`parts` shares of the keys for each `pack` query heads of a group."""

    parts: int
    pack: int


def split_of(call: Call) -> Split | None:
    """How to spread a call over the device that has fewer blocks of queries than multiprocessors; None if it need not be."""
    if call.spec.weight is not None or call.M > _FREE_ROWS or call.N < 2 * _KEYS:
        return None
    group = call.H // call.G
    keep = call.spec.split.keep
    ranges_by_head = keep is not None and "h" in index_letters(keep, keep.result)
    pack = 1 if ranges_by_head else max(p for p in range(1, group + 1) if group % p == 0 and p * call.M <= _MOST_ROWS)
    programs = call.B * call.H // pack
    wanted = -(-_WAVES * _processors(call.query.device) // programs)
    parts = min(wanted, call.N // _KEYS, _MOST_SPLITS)
    return Split(parts, pack) if parts > 1 or pack > 1 else None


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def run(call: Call, split: Split, out: Tensor, stats: Tensor) -> None:
    """Fill `out` and `stats`, of low rows too."""
    rows = call.B * call.H * call.M
    parts = call.empty((rows, split.parts, call.E), torch.float32)
    part_stats = call.empty((2, rows, split.parts), torch.float32)
    call.launch("decode", lambda tile: _decode(call, tile, split, parts, part_stats))
    constants = {name: value for name, value in call.constants.items() if name != "SHIFTED"}
    call.start(
        "flashfuse_combine", rows,
        call.query, call.key, call.value, parts, part_stats, out, stats, call.inputs,
        *call.strides(call.query, call.key, call.value, out), *call.shape, call.plane, split.parts,
        BLOCK_N=_LOW_KEYS[max(call.padded) > 128], SPLITS=_power_of_two(split.parts), **constants,
        EMPTY_ZERO=call.spec.empty_rows is EmptyRows.ZERO, num_warps=4, num_stages=1,
    )  # fmt: skip


def _decode(call: Call, tile: Tile, split: Split, parts: Tensor, part_stats: Tensor) -> Any:
    packs = call.B * call.H // split.pack
    return call.start(
        "flashfuse_decode", packs * split.parts,
        call.query, call.key, call.value, parts, part_stats, call.inputs,
        *call.strides(call.query, call.key, call.value), *call.shape, split.parts, split.pack, parts.shape[0],
        BLOCK_M=max(tile.block_m, _power_of_two(split.pack * call.M)), BLOCK_N=tile.block_n,
        EVEN=call.N % tile.block_n == 0, **call.constants, BRANCH=tile.branch,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
