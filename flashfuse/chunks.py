"""How the chunked path cuts a call into chunks: what a chunk covers, how large it is, and which keys it sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashfuse.chunk_ranges import ChunkRanges, KeyRange, Shape, all_keys, chunk_ranges
from flashfuse.ir.attention_spec import AttentionSpec

_ROWS = 64  # query rows of a chunk for one key head
_CHUNK_CPU = 1 << 19  # scores of a chunk, all heads together
_CHUNK_OTHER = 1 << 24
_SMALL = 1 << 15  # with no more scores than that, leaving keys out costs more than it saves


def score_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """The dtype of scores, sums and statistics: float32, or float64 if anything is."""
    return torch.float64 if torch.float64 in (query.dtype, value.dtype) else torch.float32


def shape_of(query: Tensor, key: Tensor) -> Shape:
    return Shape(B=query.shape[0], H=query.shape[1], G=key.shape[1], M=query.shape[2], N=key.shape[2])


def grouped(tensor: Tensor, shape: Shape) -> Tensor:
    """`[B, H, M, ...]` seen as `[B, G, H // G, M, ...]`."""
    return tensor.unflatten(1, (shape.G, -1))


@dataclass(frozen=True)
class Chunk:
    """Some batches, key heads and queries, and the keys they see. `whole`: computed from the whole program."""

    batches: slice
    groups: slice
    rows: slice
    pairs: slice  # of the axis [B * G]
    keys: KeyRange
    whole: bool = False

    @property
    def place(self) -> tuple[slice, ...]:
        """Index into `[B, G, H // G, M, ...]`."""
        return self.batches, self.groups, slice(None), self.rows


class Call:
    """One call's tensors in the form that chunks are cut from, and how large chunks are."""

    def __init__(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> None:
        self.spec, self.captures, self.sizes = spec, captures, sizes
        self.shape, self.dtype, self.device = shape_of(query, key), score_dtype(query, value), query.device
        self.query = grouped(query, self.shape)
        self.key, self.value = self.pairs(key), self.pairs(value)
        self.budget = _CHUNK_CPU if query.device.type == "cpu" else _CHUNK_OTHER
        self.rows, self.ranges = self._choose_rows()
        self.batch_step, self.group_step = self._choose_heads()

    def pairs(self, tensor: Tensor) -> Tensor:
        """`[B, G, N, D]` as `[B * G, N, D]` in the precision of scores, fit for a matrix product without a copy."""
        flat = tensor.to(self.dtype).flatten(0, 1)
        return flat if flat.stride(2) == 1 and flat.stride(1) >= flat.shape[2] else flat.contiguous()

    def _choose_rows(self) -> tuple[int, ChunkRanges]:
        shape = self.shape
        scores = shape.B * shape.H * shape.M * shape.N
        if scores <= min(_SMALL, self.budget):
            return shape.M, all_keys(shape.N, masked=self.spec.split.keep is not None)
        wished = 2 * _ROWS if self.spec.split.keep is None else _ROWS  # small ones follow a mask's border closely
        rows = min(shape.M, max(16, wished // shape.group))
        ranges = chunk_ranges(self.spec, shape, rows, self.captures, self.sizes, self.dtype)
        fitting = max(1, self.budget // (shape.group * ranges.widest))
        if fitting < rows:
            rows = fitting
            ranges = chunk_ranges(self.spec, shape, rows, self.captures, self.sizes, self.dtype)
        return rows, ranges

    def _choose_heads(self) -> tuple[int, int]:
        shape = self.shape
        pairs = max(1, self.budget // (shape.group * self.rows * self.ranges.widest))
        if pairs < shape.G or self.ranges.by_batch:
            return 1, min(pairs, shape.G)
        return min(pairs // shape.G, shape.B), shape.G

    def chunks(self) -> Iterator[Chunk]:
        """All chunks; together they cover every query once."""
        shape = self.shape
        for b in range(0, shape.B, self.batch_step):
            batches = slice(b, min(b + self.batch_step, shape.B))
            for g in range(0, shape.G, self.group_step):
                groups = slice(g, min(g + self.group_step, shape.G))
                pairs = slice(b * shape.G + g, (batches.stop - 1) * shape.G + groups.stop)
                heads = slice(groups.start * shape.group, groups.stop * shape.group)
                for number, m in enumerate(range(0, shape.M, self.rows)):
                    rows = slice(m, min(m + self.rows, shape.M))
                    yield Chunk(batches, groups, rows, pairs, self.ranges.of(number, batches, heads))

    def whole_rows(self, chunk: Chunk) -> Iterator[tuple[Chunk, slice]]:
        """The chunk over all keys, in parts of the usual size, each with its place in the chunk's rows."""
        heads = (chunk.pairs.stop - chunk.pairs.start) * self.shape.group
        step = max(1, self.budget // (heads * self.shape.N))
        everything = KeyRange(0, self.shape.N, 0, self.shape.N)
        for m in range(chunk.rows.start, chunk.rows.stop, step):
            rows = slice(m, min(m + step, chunk.rows.stop))
            part = Chunk(chunk.batches, chunk.groups, rows, chunk.pairs, everything, whole=True)
            yield part, slice(rows.start - chunk.rows.start, rows.stop - chunk.rows.start)

    def folded(self, grouped: Tensor, chunk: Chunk) -> Tensor:
        """A chunk's part of `[B, G, R, M, D]` as `[pairs, R * rows, D]` in the precision of scores."""
        return grouped[chunk.place].to(self.dtype).flatten(2, 3).flatten(0, 1)

    def unfolded(self, flat: Tensor, chunk: Chunk) -> Tensor:
        """`[pairs, R * rows, keys]` as `[batches, key heads, R, rows, keys]`."""
        rows = chunk.rows.stop - chunk.rows.start
        groups = chunk.groups.stop - chunk.groups.start
        return flat.view(-1, groups, self.shape.group, rows, flat.shape[-1])


class Scratch:
    """Buffers for scores, used again by each chunk."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._buffers: dict[str, Tensor] = {}

    def scores(self, name: str, chunk: Chunk) -> Tensor:
        """An uninitialised contiguous `[pairs, R * rows, keys]`."""
        shape = (
            chunk.pairs.stop - chunk.pairs.start,
            self._call.shape.group * (chunk.rows.stop - chunk.rows.start),
            chunk.keys.hi - chunk.keys.lo,
        )
        count = shape[0] * shape[1] * shape[2]
        if name not in self._buffers or self._buffers[name].numel() < count:
            self._buffers[name] = torch.empty(count, dtype=self._call.dtype, device=self._call.device)
        return self._buffers[name][:count].view(shape)
