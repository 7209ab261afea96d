"""Scores of one chunk: leaves of the score program as views of the call's tensors, raw and final scores, the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashfuse.chunk_ranges import element
from flashfuse.chunks import Call, Chunk, Scratch
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_program import INDICES, LEAVES, ScoreProgram, Statement, evaluate


class Window:
    """Values of a score program's leaves for the queries of a chunk and the keys `[start, stop)`."""

    def __init__(self, call: Call, chunk: Chunk, start: int, stop: int) -> None:
        group = call.shape.group
        self.call = call
        self.spans = {
            "b": (chunk.batches.start, chunk.batches.stop),
            "h": (chunk.groups.start * group, chunk.groups.stop * group),
            "m": (chunk.rows.start, chunk.rows.stop),
            "n": (start, stop),
        }
        self.indices: dict[str, Tensor] = {}

    def index(self, letter: str) -> Tensor:
        """The positions along one axis, in the axes of scores."""
        if letter not in self.indices:
            count = torch.arange(*self.spans[letter], device=self.call.device)
            self.indices[letter] = self._spread(count, (letter,))
        return self.indices[letter]

    def view(self, tensor: Tensor, places: Sequence[str | int]) -> Tensor:
        """A tensor indexed by index letters and numbers, as a view that broadcasts against scores."""
        taken = tensor[tuple(slice(*self.spans[p]) if isinstance(p, str) else p for p in places)]
        return self._spread(taken, tuple(p for p in places if isinstance(p, str)))

    def _spread(self, tensor: Tensor, letters: tuple[str, ...]) -> Tensor:
        tensor = tensor.permute([letters.index(letter) for letter in INDICES if letter in letters])
        for axis, letter in enumerate(INDICES):
            if letter not in letters:
                tensor = tensor.unsqueeze(axis)
        return tensor.unflatten(1, (-1, self.call.shape.group) if "h" in letters else (1, 1))

    def values(
        self,
        program: ScoreProgram,
        score: Tensor | None = None,
        grad: Tensor | None = None,
        probability: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Results of a program, each a number or a tensor that broadcasts against scores."""

        def leaf(statement: Statement, operands: list[Any]) -> Any:
            if statement.op == "load":
                return self._load(statement, operands)
            if statement.op == "index":
                return self.index(str(statement.attribute))
            if statement.op == "size":
                return self.call.sizes[int(statement.attribute)]  # type: ignore[arg-type]
            if statement.op == "length":
                return self.call.shape.M if statement.attribute == "M" else self.call.shape.N
            return {"score": score, "probability": probability, "grad": grad}[statement.op]

        return evaluate(program, leaf, self.call.dtype)

    def _load(self, statement: Statement, operands: list[Any]) -> Tensor:
        capture = self.call.captures[int(statement.attribute)]  # type: ignore[arg-type]
        places = [o if isinstance(o, int) else self._letter(o) for o in operands]
        plain = [place for place in places if place is not None]
        letters = [place for place in plain if isinstance(place, str)]
        if len(plain) < len(places) or len(set(letters)) < len(letters):
            return element(capture, statement.kind, operands, self.call.dtype)
        return element(self.view(capture, plain), statement.kind, (), self.call.dtype)

    def _letter(self, operand: Tensor) -> str | None:
        return next((letter for letter, index in self.indices.items() if index is operand), None)


# ------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class LinearScore:
    """A score that is `factor * s` plus results of `addends`, which do not need s."""

    factor: float
    addends: ScoreProgram | None


@lru_cache(maxsize=1024)
def linear_score(program: ScoreProgram) -> LinearScore | None:
    """The linear form of a score program, or None."""
    builder = Builder()
    value = builder.include(program)[program.result]
    with_score: set[int] = set()
    for number, statement in enumerate(builder.statements):
        if statement.op == "score" or not with_score.isdisjoint(statement.operands):
            with_score.add(number)
    addends: list[Value] = []
    while value.statement.op in ("add", "sub"):
        left, right = value.operands
        if value.statement.op == "add" and left.number not in with_score:
            left, right = right, left
        if right.number in with_score:
            return None
        addends.append(right if value.statement.op == "add" else -right)
        value = left
    factor = 1.0
    if value.statement.op in ("mul", "div"):
        left, right = value.operands
        if value.statement.op == "mul" and left.constant is not None:
            left, right = right, left
        if right.constant is None or right.constant == 0:
            return None
        factor = float(right.constant) if value.statement.op == "mul" else 1.0 / float(right.constant)
        value = left
    if value.statement.op != "score":
        return None
    return LinearScore(factor, builder.program(*reversed(addends)) if addends else None)


def scores_of(
    call: Call, chunk: Chunk, query: Tensor, program: ScoreProgram, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Final scores `[pairs, R * rows, keys]` that may be overwritten, and raw ones (the same tensor if linear)."""
    raw = scratch.scores("score", chunk)
    keys = call.key[chunk.pairs, chunk.keys.lo : chunk.keys.hi].mT
    window = Window(call, chunk, chunk.keys.lo, chunk.keys.hi)
    linear = linear_score(program)
    if linear is None:
        torch.bmm(query, keys, out=raw)
        like = call.unfolded(raw, chunk)
        final = window.values(program, score=like)[0]
        if program.statements[program.result].op in LEAVES:
            final = torch.as_tensor(final, dtype=call.dtype, device=call.device).expand_as(like).clone()
        return final.expand_as(like).contiguous().view_as(raw), raw
    raw.baddbmm_(query, keys, beta=0, alpha=linear.factor)
    for addend in () if linear.addends is None else window.values(linear.addends):
        call.unfolded(raw, chunk).add_(addend)
    return raw, raw


def dropped_by_mask(call: Call, chunk: Chunk) -> list[tuple[slice, Tensor]]:
    """For each stretch of the chunk's keys where the mask counts: its place, and which elements it drops."""
    keep = call.spec.split.keep
    if keep is None or chunk.whole:
        return []
    found = []
    for start, stop in chunk.keys.partial:
        kept = Window(call, chunk, start, stop).values(keep)[0]
        place = slice(start - chunk.keys.lo, stop - chunk.keys.lo)
        found.append((place, torch.as_tensor(kept, device=call.device).logical_not()))
    return found


def overwrite(scores: Tensor, dropped: list[tuple[slice, Tensor]], hidden: Tensor | None, value: float) -> None:
    """Overwrite `[batches, key heads, R, rows, keys]` where the mask drops, and in hidden rows."""
    for place, drop in dropped:
        scores[..., place].masked_fill_(drop, value)
    if hidden is not None:
        scores.masked_fill_(hidden, value)
