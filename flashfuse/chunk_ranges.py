"""Which keys each chunk of queries has to look at, for `flashfuse.chunked_attention`.

All chunks are worked out at once, in integers: the closed-form `spec.key_ranges` first, then, for predicates over
captured vectors, the interval evaluation `spec.certainty` over blocks of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.certainty import Bounded
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, Statement, evaluate

KEY_BLOCK = 64  # keys in a block of the interval evaluation; more where that would make more than _KEY_BLOCKS
_KEY_BLOCKS = 256


@dataclass(frozen=True)
class KeyRange:
    """Only keys in `[lo, hi)` can be kept; those in `[full_lo, full_hi)`, a part of it, all are."""

    lo: int
    hi: int
    full_lo: int
    full_hi: int

    @property
    def partial(self) -> tuple[tuple[int, int], ...]:
        """The stretches of `[lo, hi)` in which the mask has to be looked at."""
        if self.full_lo >= self.full_hi:
            return ((self.lo, self.hi),)
        stretches = ((self.lo, self.full_lo), (self.full_hi, self.hi))
        return tuple((start, stop) for start, stop in stretches if start < stop)


@dataclass(frozen=True)
class Shape:
    """Lengths of a call's axes."""

    B: int
    H: int
    G: int
    M: int
    N: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.H // self.G

    def length(self, letter: str) -> int:
        """The length of the axis that an index letter counts along."""
        return {"b": self.B, "h": self.H, "m": self.M, "n": self.N}[letter]


@dataclass(frozen=True)
class ChunkRanges:
    """`table` is `[4, chunks, B or 1, H or 1]` in int64 on the CPU: lo, hi, full_lo, full_hi."""

    table: Tensor
    widest: int

    @property
    def by_batch(self) -> bool:
        """Whether ranges differ from batch to batch."""
        return self.table.shape[2] > 1

    def of(self, chunk: int, batches: slice, heads: slice) -> KeyRange:
        """The hull over some batches and heads."""
        part = self.table[:, chunk]
        if part.shape[1] > 1:
            part = part[:, batches]
        if part.shape[2] > 1:
            part = part[:, :, heads]
        lo, hi, full_lo, full_hi = part.flatten(1).tolist()
        possible = [(a, b) for a, b in zip(lo, hi, strict=True) if a < b]
        if not possible:
            return KeyRange(0, 0, 0, 0)
        low, high = min(a for a, _ in possible), max(b for _, b in possible)
        return KeyRange(low, high, max(low, *full_lo), min(high, *full_hi))


def all_keys(count: int, *, masked: bool) -> ChunkRanges:
    """One chunk that looks at every key, and at the mask everywhere if there is one."""
    return ChunkRanges(torch.tensor([0, count, 0, 0 if masked else count]).view(4, 1, 1, 1), count)


def chunk_ranges(
    spec: AttentionSpec, shape: Shape, rows: int, captures: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype
) -> ChunkRanges:
    """Ranges of the chunks `[0, rows)`, `[rows, 2 * rows)`, ... of queries. `dtype` is that of scores."""
    leaves = _Leaves(shape, captures, sizes, dtype)
    first = torch.arange(0, shape.M, rows, device=leaves.device)
    last = (first + rows - 1).clamp_max(shape.M - 1)
    table = torch.zeros(4, len(first), 1, 1, dtype=torch.int64, device=leaves.device)
    table[1] = shape.N
    if spec.key_ranges is None:
        table[3] = shape.N
    else:
        found = evaluate(spec.key_ranges.program, leaves.at(first[:, None, None], last[:, None, None]), dtype)
        table = _stacked(*found[:4], like=table[0])
    if spec.certainty is not None:
        table = _sharpened(table, _by_certainty(spec, leaves, rows, len(first)))
    lo, hi = table[0], table[1]
    return ChunkRanges(table.cpu(), max(1, int((hi - lo).max())))


def _stacked(*results: Any, like: Tensor) -> Tensor:
    parts = [torch.as_tensor(result, device=like.device) for result in results]
    return torch.stack(torch.broadcast_tensors(*parts, like)[:-1])


def _sharpened(table: Tensor, other: Tensor) -> Tensor:
    """Both hold: the smaller of the possible ranges, the longer of the certain ones."""
    lo, hi, full_lo, full_hi = torch.broadcast_tensors(*table)
    lo2, hi2, full_lo2, full_hi2 = other
    longer = (full_hi2 - full_lo2) > (full_hi - full_lo)
    return _stacked(
        torch.maximum(lo, lo2), torch.minimum(hi, hi2),
        torch.where(longer, full_lo2, full_lo), torch.where(longer, full_hi2, full_hi), like=lo2,
    )  # fmt: skip


class _Leaves:
    """Values of leaves without scores. Index b is `[B, 1, ...]`, h `[1, H, ...]`, with `trailing` more axes."""

    def __init__(self, shape: Shape, captures: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.captures, self.sizes, self.dtype = shape, captures, sizes, dtype
        self.device = captures[0].device if captures else torch.device("cpu")

    def at(self, *inputs: Tensor, index: dict[str, Tensor] | None = None, trailing: int = 0) -> Any:
        """A `leaf` function for `evaluate`."""
        tail = [1] * trailing
        known = {"b": self._count("b").view(-1, 1, *tail), "h": self._count("h").view(1, -1, *tail), **(index or {})}

        def leaf(statement: Statement, operands: list[Any]) -> Any:
            number = statement.attribute
            if statement.op == "input":
                return inputs[number]  # type: ignore[index]
            if statement.op == "index":
                return known[str(number)]
            if statement.op == "length":
                return self.shape.M if number == "M" else self.shape.N
            if statement.op == "size":
                return self.sizes[number]  # type: ignore[index]
            return element(self.captures[number], statement.kind, operands, self.dtype)  # type: ignore[index]

        return leaf

    def vector(self, program: ScoreProgram, letter: str) -> Tensor:
        """A leaf at all positions along m or n: `[B or 1, H or 1, length]`."""
        count = self._count(letter).view(1, 1, -1)
        value = evaluate(program, self.at(index={letter: count}, trailing=1), self.dtype)[0]
        return torch.as_tensor(value).expand(torch.broadcast_shapes(value.shape, count.shape))

    def _count(self, letter: str) -> Tensor:
        return torch.arange(self.shape.length(letter), device=self.device)


def element(capture: Tensor, kind: Kind, operands: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """`capture[operands]`, elementwise, as a value of the given kind."""
    value = capture[tuple(operands)] if operands else capture
    return value.to({Kind.FLOAT: dtype, Kind.INT: torch.int64, Kind.BOOL: torch.bool}[kind])


@lru_cache(maxsize=1024)
def _alone(keep: ScoreProgram, statement: Statement) -> ScoreProgram:
    """The program of one statement of `keep`."""
    builder = Builder()
    return builder.program(builder.include(keep)[keep.statements.index(statement)])


def _by_certainty(spec: AttentionSpec, leaves: _Leaves, rows: int, chunks: int) -> Tensor:
    shape, keep = leaves.shape, spec.split.keep
    if spec.certainty is None or keep is None:
        raise InternalError("interval evaluation needs a predicate")
    width = max(KEY_BLOCK, -(-shape.N // _KEY_BLOCKS))
    vectors: dict[Statement, Tensor] = {}

    def bound(wanted: Bounded) -> Tensor:
        if wanted.statement not in vectors:
            vectors[wanted.statement] = leaves.vector(_alone(keep, wanted.statement), wanted.letter)
        along_m = wanted.letter == "m"
        extreme = _extreme(vectors[wanted.statement], rows if along_m else width, wanted.high)
        return extreme.unsqueeze(3 if along_m else 2)

    bounds = [bound(wanted) for wanted in spec.certainty.inputs]
    results = evaluate(spec.certainty.program, leaves.at(*bounds, trailing=2), leaves.dtype)
    blocks = -(-shape.N // width)
    like = torch.zeros(1, 1, chunks, blocks, dtype=torch.bool, device=leaves.device)
    certain, possible = _stacked(*results, like=like).movedim(3, 1)  # [chunks, B, H, blocks]
    lo, hi = _hull(possible)
    full_lo, full_hi = _longest_run(certain & possible)
    return torch.stack([lo, hi, full_lo, full_hi]).mul_(width).clamp_max_(shape.N)


def _extreme(vector: Tensor, block: int, high: bool) -> Tensor:
    """Smallest or largest value of each block along the last axis. A NaN may be anything."""
    if vector.is_floating_point():
        vector = vector.nan_to_num(nan=float("inf" if high else "-inf"), posinf=float("inf"), neginf=float("-inf"))
    missing = -vector.shape[-1] % block
    padded = torch.cat([vector, vector[..., -1:].expand(*vector.shape[:-1], missing)], -1) if missing else vector
    blocks = padded.unflatten(-1, (-1, block))
    return blocks.amax(-1) if high else blocks.amin(-1)


def _hull(possible: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.arange(possible.shape[-1], device=possible.device)
    first = torch.where(possible, count, possible.shape[-1]).amin(-1)
    return first, torch.where(possible, count + 1, 0).amax(-1)


def _longest_run(certain: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.arange(certain.shape[-1], device=certain.device)
    last_other = torch.where(certain, -1, count).cummax(-1).values
    length, end = (count - last_other).max(-1)
    return end + 1 - length, end + 1
