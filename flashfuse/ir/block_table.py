"""The range table of a mask over captured tensors: what its rows say, and its shape.

A table is int32 `[TB, TH, blocks of queries + blocks of keys, COLUMNS]`, where TB is B if the predicate depends on the batch,
else 1, and TH the same for heads. Blocks have `BLOCK` rows, whatever tiles a kernel has. The row of a block of queries says
of the keys, and that of a block of keys of the queries:

    lo, hi             none outside [lo, hi) is kept
    full_lo, full_hi   all in [full_lo, full_hi) are kept
    gap_lo, gap_hi     none in [gap_lo, gap_hi) is kept

All six are multiples of `BLOCK` or the length.
"""

from __future__ import annotations

from typing import Any

from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_program import ScoreProgram

BLOCK = 32
COLUMNS = 6


def table_shape(keep: ScoreProgram, shape: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, int]:
    """The shape of a predicate's table for B, H, M, N, which may be symbolic."""
    B, H, M, N = shape
    letters = index_letters(keep, keep.result)
    return B if "b" in letters else 1, H if "h" in letters else 1, blocks(M) + blocks(N), COLUMNS


def blocks(length: Any) -> Any:
    """How many blocks an axis has."""
    return (length + BLOCK - 1) // BLOCK
