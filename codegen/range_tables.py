"""Range tables for masks over captured vectors: made by two small kernels, once for each tile shape of a call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashfuse.codegen.plan import Tile
from flashfuse.codegen.score_functions import bounded_vectors
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.derivative import index_letters

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

_CHUNK = 128


@dataclass(frozen=True)
class Table:
    """`tensor` is `[TB, TH, blocks, 4]` int32, `rows` how many rows of the own side a block has (0: no table)."""

    tensor: Tensor
    strides: tuple[int, int]
    rows: int


def tells_something(spec: AttentionSpec) -> bool:
    """Whether interval evaluation can prove anything about the spec's predicate."""
    certainty = spec.certainty
    if certainty is None:
        return False
    results = [certainty.program.statements[result] for result in certainty.program.results]
    return not all(result.op == "const" for result in results)


class RangeTables:
    """The tables of one call."""

    def __init__(self, call: Call) -> None:
        self.call: Call = weakref.proxy(call)  # the call owns its tables; a cycle would keep its tensors alive
        self.none = Table(call.query, (0, 0), 0)
        self._bounds: dict[tuple[bool, int], Tensor] = {}
        keep = call.spec.split.keep
        self.useful = keep is not None and tells_something(call.spec)
        letters = index_letters(keep, keep.result) if keep is not None else ""
        self.TB = call.B if "b" in letters else 1
        self.TH = call.H if "h" in letters else 1

    def of_queries(self, tile: Tile) -> Table:
        """Key ranges of blocks of queries."""
        return self._table(tile, keys=False) if self.useful else self.none

    def of_keys(self, tile: Tile) -> Table:
        """Query ranges of blocks of keys."""
        return self._table(tile, keys=True) if self.useful else self.none

    def _table(self, tile: Tile, *, keys: bool) -> Table:
        call = self.call
        blocks_m, blocks_n = -(-call.M // tile.block_m), -(-call.N // tile.block_n)
        own = blocks_n if keys else blocks_m
        queries, query_bounds = self._block_bounds(tile.block_m, blocks_m, keys=False)
        key_side, key_bounds = self._block_bounds(tile.block_n, blocks_n, keys=True)
        table = call.empty((self.TB, self.TH, own, 4), torch.int32)
        call.start(
            "flashfuse_block_table", self.TB * self.TH * own,
            queries, key_side, table, call.inputs, query_bounds, key_bounds, self.TH, call.M, call.N,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, KEYS=keys, CHUNK=_CHUNK, num_warps=4,
        )  # fmt: skip
        strides = (table.stride(0) if self.TB > 1 else 0, table.stride(1) if self.TH > 1 else 0)
        return Table(table, strides, tile.block_n if keys else tile.block_m)

    def _block_bounds(self, block: int, blocks: int, *, keys: bool) -> tuple[Tensor, int]:
        call = self.call
        plane = self.TB * self.TH * blocks
        known = self._bounds.get((keys, block))
        if known is None:
            vectors = len(bounded_vectors(call.spec.certainty, "n" if keys else "m"))
            known = call.empty((max(vectors, 1), 2, plane), torch.int64)
            if vectors:
                call.start(
                    "flashfuse_block_bounds", plane,
                    known, call.inputs, plane, self.TH, call.M, call.N, BLOCK=block, KEYS=keys, num_warps=4
                )
            self._bounds[(keys, block)] = known
        return known, plane
