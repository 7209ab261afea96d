"""Range tables for masks over captured tensors, by two small kernels: see `flashfuse/ir/block_table.py`.

A rewritten graph makes a table once for all layers that share a mask, and for their backward; a call that gets none
makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashfuse.codegen.launches import Launches, interpreting
from flashfuse.codegen.replay import Recording, repeated
from flashfuse.codegen.score_functions import bounded_vectors
from flashfuse.errors import UnsupportedError
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.block_table import BLOCK, blocks, table_shape

_CHUNK = 128  # blocks of the other side at a time
_INTERPRETED_CHUNK = 16  # the interpreter goes through a scan element by element


@dataclass(frozen=True)
class Table:
    """A range table and its strides over batch and head as kernels take them; `rows` is a block's, 0 for no table."""

    tensor: Tensor
    strides: tuple[int, int]
    rows: int

    @classmethod
    def of(cls, tensor: Tensor) -> Table:
        """A table as kernels read it."""
        strides = [tensor.stride(dim) if tensor.shape[dim] > 1 else 0 for dim in (0, 1)]
        return cls(tensor, (strides[0], strides[1]), BLOCK)


def block_ranges(
    spec: AttentionSpec, captures: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int], device: torch.device
) -> Tensor:
    """The table of a spec's mask for B, H, M, N. Raises UnsupportedError where the kernels cannot run."""
    if device.type != "cuda" and not interpreting():
        raise UnsupportedError(f"the range table is for {device.type}, kernels run on cuda")
    B, H, M, N = shape

    def run(recording: Recording | None) -> list[Tensor]:
        launches = Launches(spec, captures, sizes, device, recording)
        with launches.device():
            return [write_table(launches, (B, H, M, N))]

    return repeated((spec.key, "block_ranges", tuple(shape), tuple(sizes)), captures, device, run)[0]


def write_table(launches: Launches, shape: tuple[int, int, int, int]) -> Tensor:
    """Launch what fills a new table. The spec has a mask that interval evaluation can say something about."""
    spec, (_B, _H, M, N) = launches.spec, shape
    assert spec.split.keep is not None
    table = launches.empty(table_shape(spec.split.keep, shape), torch.int32)
    TB, TH = table.shape[:2]
    if table.numel() == 0:
        launches.cannot_repeat()
        return table
    planes = [TB * TH * blocks(length) for length in (M, N)]
    vectors = [len(bounded_vectors(spec.certainty, letter)) for letter in "mn"]
    ends = [2 * count * plane for count, plane in zip(vectors, planes, strict=True)]
    bounds = launches.empty((max(sum(ends), 1),), torch.int64)
    sides = (planes[0], planes[1], ends[0], TH, M, N)
    if sum(ends):
        launches.start("flashfuse_block_bounds", sum(planes), bounds, launches.inputs, *sides, BLOCK=BLOCK, num_warps=1)
    constants = {"BLOCK": BLOCK, "CHUNK": _INTERPRETED_CHUNK if interpreting() else _CHUNK, "num_warps": 4}
    launches.start("flashfuse_block_table", sum(planes), bounds, table, launches.inputs, *sides, **constants)
    return table
