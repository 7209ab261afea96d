"""Which blocks of the score matrix a mask leaves empty, partial or full, for one attention's actual lengths.

The closed-form ranges that kernels use are evaluated for every block of queries. Where a predicate reads tensors, its
blocks depend on values that a graph does not hold, and there is no map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashfuse.chunk_ranges import Shape, chunk_ranges
from flashfuse.ir.attention_spec import AttentionSpec

EMPTY, PARTIAL, FULL = 0, 1, 2
_MOST_CELLS = 96  # along one side of a picture


@dataclass(frozen=True)
class BlockMap:
    """`rows[i][j]` is EMPTY, PARTIAL or FULL for queries `[i * block_m, ...)` and keys `[j * block_n, ...)`."""

    block_m: int
    block_n: int
    rows: tuple[tuple[int, ...], ...]

    @property
    def skipped(self) -> float:
        """The share of key blocks that no kernel looks at, from 0 to 1."""
        cells = [cell for row in self.rows for cell in row]
        return cells.count(EMPTY) / len(cells) if cells else 0.0


def block_map(spec: AttentionSpec, queries: int, keys: int, block_m: int = 64, block_n: int = 64) -> BlockMap | None:
    """The map of a spec at M = `queries` and N = `keys`, in larger blocks where there would be too many to see.

    None if there is no mask, if it reads tensors or numbers given at call time, or if a length is zero.
    """
    keep = spec.split.keep
    if keep is None or keep.loads() or keep.uses("size") or queries == 0 or keys == 0 or spec.key_ranges is None:
        return None
    block_m, block_n = _at_least(block_m, queries), _at_least(block_n, keys)
    ranges = chunk_ranges(spec, Shape(1, 1, 1, queries, keys), block_m, (), (), torch.float32)  # of batch 0, head 0
    rows = []
    for chunk in range(-(-queries // block_m)):
        found = ranges.of(chunk, slice(0, 1), slice(0, 1))
        rows.append(tuple(_cell(found.lo, found.hi, found.full_lo, found.full_hi, start, min(start + block_n, keys))
                          for start in range(0, keys, block_n)))  # fmt: skip
    return BlockMap(block_m, block_n, tuple(rows))


def _at_least(block: int, length: int) -> int:
    while length > block * _MOST_CELLS:
        block *= 2
    return block


def _cell(lo: int, hi: int, full_lo: int, full_hi: int, start: int, stop: int) -> int:
    if stop <= lo or start >= hi:
        return EMPTY
    return FULL if full_lo <= start and stop <= full_hi else PARTIAL
