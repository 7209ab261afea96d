"""Attention of a spec with torch operators, in chunks of queries: the CPU path, and what the kernels are tested against.

Exact (each row's whole range of keys is in a chunk, so nothing is rescaled), linear memory, forward and backward, any
device. Scores are float32, or float64 for float64 inputs. The backward recomputes the probabilities from the row
statistics, as in FlashAttention-2 (Dao 2023, section 3.1 and algorithm 2).

A chunk covers some batches, some key heads with all their query heads, and some queries; its scores are one tensor
`[batches, key heads, query heads of a key head, queries, keys]` small enough to stay in a core's cache. Keys that the mask
empties for the chunk are left out (`flashfuse.chunk_ranges`), and the mask is looked at only where it is not full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashfuse.chunk_ranges import ChunkRanges, KeyRange, Shape, chunk_ranges, element
from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows, plain_load_letters
from flashfuse.ir.mask import LOW_SCORE
from flashfuse.ir.score_program import INDICES, LEAVES, Builder, ScoreProgram, Statement, Value, evaluate

_ROWS = 64  # query rows of a chunk for one key head
_CHUNK_CPU = 1 << 19  # scores of a chunk, all heads together
_CHUNK_OTHER = 1 << 24


@torch.no_grad()
def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    out: Tensor,
) -> Tensor:
    """Fill `out` `[B, H, M, E]` (any strides, value's dtype) and return the row statistics `[planes, B, H, M]`.

    Statistics are float32 (float64 for float64 inputs): the logarithm of the sum of exponentials, and, if the spec has
    two planes, the shift that was subtracted from the scores before (0 for ordinary rows).
    """
    dtype, shape = score_dtype(query, value), _shape(query, key)
    stats = torch.zeros((spec.planes, *query.shape[:3]), dtype=dtype, device=query.device)
    if out.numel() == 0 or shape.N == 0:
        out.zero_()
        stats[0] = float("inf")
        return stats
    call = _Call(spec, query, key, value, captures, sizes)
    scratch = _Scratch(call)
    result = _Rows(_grouped(out, shape), [_grouped(plane, shape) for plane in stats])
    for chunk in call.chunks():
        low = _forward_chunk(call, chunk, scratch, result)
        if low is not None:
            for part, rows in call.whole_rows(chunk):
                _forward_low_rows(call, part, scratch, result, low[..., rows, :])
    return stats


@torch.no_grad()
def backward(
    spec: AttentionSpec,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and of each capture that `needs` names, in order, contiguous, in their dtypes.

    `out` and `stats` are what `forward` gave. Sums are kept in the precision of scores.
    """
    dtype, shape = score_dtype(query, value), _shape(query, key)
    wanted = tuple(number for number, needed in enumerate(needs) if needed)
    tensors = [query, key, value, *(captures[number] for number in wanted)]
    sums = [torch.zeros(tensor.shape, dtype=dtype, device=query.device) for tensor in tensors]
    if out.numel() and shape.N:
        call = _Call(spec, query, key, value, captures, sizes)
        scratch = _Scratch(call)
        gradients = _Gradients(call, grad_out, out, stats, sums, wanted)
        for chunk in call.chunks():
            low = gradients.low(chunk)
            _backward_chunk(gradients, chunk, scratch, hidden=low)
            if low is not None:
                for part, rows in call.whole_rows(chunk):
                    _backward_chunk(gradients, part, scratch, hidden=~low[..., rows, :])
    return [total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)]


def score_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """The dtype of scores, sums and statistics: float32, or float64 if anything is."""
    return torch.float64 if torch.float64 in (query.dtype, value.dtype) else torch.float32


# ------------------------------------------------------------------------------------------------ a call and its chunks


def _shape(query: Tensor, key: Tensor) -> Shape:
    return Shape(B=query.shape[0], H=query.shape[1], G=key.shape[1], M=query.shape[2], N=key.shape[2])


def _grouped(tensor: Tensor, shape: Shape) -> Tensor:
    """`[B, H, M, ...]` seen as `[B, G, H // G, M, ...]`."""
    return tensor.unflatten(1, (shape.G, -1))


@dataclass(frozen=True)
class _Chunk:
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


@dataclass(frozen=True)
class _Rows:
    """Results of the forward with heads grouped: out `[B, G, R, M, E]`, each plane of stats `[B, G, R, M]`."""

    out: Tensor
    stats: list[Tensor]


class _Call:
    """One call's tensors in the form that chunks are cut from, and how large chunks are."""

    def __init__(
        self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, captures: Sequence[Tensor], sizes: Sequence[int]
    ) -> None:
        self.spec, self.captures, self.sizes = spec, captures, sizes
        self.shape, self.dtype, self.device = _shape(query, key), score_dtype(query, value), query.device
        self.query = _grouped(query, self.shape)
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
        rows = min(shape.M, max(16, _ROWS // shape.group))
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

    def chunks(self) -> Iterator[_Chunk]:
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
                    yield _Chunk(batches, groups, rows, pairs, self.ranges.of(number, batches, heads))

    def whole_rows(self, chunk: _Chunk) -> Iterator[tuple[_Chunk, slice]]:
        """The chunk over all keys, in parts of the usual size, each with its place in the chunk's rows."""
        heads = (chunk.pairs.stop - chunk.pairs.start) * self.shape.group
        step = max(1, self.budget // (heads * self.shape.N))
        everything = KeyRange(0, self.shape.N, 0, self.shape.N)
        for m in range(chunk.rows.start, chunk.rows.stop, step):
            rows = slice(m, min(m + step, chunk.rows.stop))
            part = _Chunk(chunk.batches, chunk.groups, rows, chunk.pairs, everything, whole=True)
            yield part, slice(rows.start - chunk.rows.start, rows.stop - chunk.rows.start)

    def folded(self, grouped: Tensor, chunk: _Chunk) -> Tensor:
        """A chunk's part of `[B, G, R, M, D]` as `[pairs, R * rows, D]` in the precision of scores."""
        return grouped[chunk.place].to(self.dtype).flatten(2, 3).flatten(0, 1)

    def unfolded(self, flat: Tensor, chunk: _Chunk) -> Tensor:
        """`[pairs, R * rows, keys]` as `[batches, key heads, R, rows, keys]`."""
        rows = chunk.rows.stop - chunk.rows.start
        groups = chunk.groups.stop - chunk.groups.start
        return flat.view(-1, groups, self.shape.group, rows, flat.shape[-1])


class _Scratch:
    """Buffers for scores, used again by each chunk."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._buffers: dict[str, Tensor] = {}

    def scores(self, name: str, chunk: _Chunk) -> Tensor:
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


class _Window:
    """Values of a score program's leaves for the queries of a chunk and the keys `[start, stop)`."""

    def __init__(self, call: _Call, chunk: _Chunk, start: int, stop: int) -> None:
        group = call.shape.group
        self.call = call
        self.spans = {
            "b": (chunk.batches.start, chunk.batches.stop), "h": (chunk.groups.start * group, chunk.groups.stop * group),
            "m": (chunk.rows.start, chunk.rows.stop), "n": (start, stop),
        }  # fmt: skip
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

    def values(self, program: ScoreProgram, score: Tensor | None = None, grad: Tensor | None = None) -> tuple[Any, ...]:
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
            return score if statement.op == "score" else grad

        return evaluate(program, leaf, self.call.dtype)

    def _load(self, statement: Statement, operands: list[Any]) -> Tensor:
        capture = self.call.captures[int(statement.attribute)]  # type: ignore[arg-type]
        places = [o if isinstance(o, int) else self._letter(o) for o in operands]
        plain = [place for place in places if place is not None]
        if len(plain) == len(places) and len({p for p in plain if isinstance(p, str)}) == sum(isinstance(p, str) for p in plain):
            return element(self.view(capture, plain), statement.kind, (), self.call.dtype)
        return element(capture, statement.kind, operands, self.call.dtype)

    def _letter(self, operand: Tensor) -> str | None:
        return next((letter for letter, index in self.indices.items() if index is operand), None)


# ------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class _LinearScore:
    """A score that is `factor * s` plus results of `addends`, which do not need s."""

    factor: float
    addends: ScoreProgram | None


@lru_cache(maxsize=1024)
def _linear(program: ScoreProgram) -> _LinearScore | None:
    """The linear form of a score program, or None."""
    builder = Builder()
    value = builder.include(program)[program.result]
    addends: list[Value] = []
    while value.statement.op in ("add", "sub"):
        left, right = value.operands
        if _needs_score(right) and not _needs_score(left) and value.statement.op == "add":
            left, right = right, left
        if _needs_score(right):
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
    return _LinearScore(factor, builder.program(*reversed(addends)) if addends else None)


def _needs_score(value: Value) -> bool:
    return value.statement.op == "score" or any(_needs_score(operand) for operand in value.operands)


def _scores(call: _Call, chunk: _Chunk, query: Tensor, program: ScoreProgram, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Final scores `[pairs, R * rows, keys]` that may be overwritten, and raw ones (the same tensor if linear)."""
    raw = scratch.scores("score", chunk)
    keys = call.key[chunk.pairs, chunk.keys.lo : chunk.keys.hi].mT
    window = _Window(call, chunk, chunk.keys.lo, chunk.keys.hi)
    linear = _linear(program)
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


def _dropped(call: _Call, chunk: _Chunk) -> list[tuple[slice, Tensor]]:
    """For each stretch of the chunk's keys where the mask counts: its place, and which elements it drops."""
    keep = call.spec.split.keep
    if keep is None or chunk.whole:
        return []
    found = []
    for start, stop in chunk.keys.partial:
        kept = _Window(call, chunk, start, stop).values(keep)[0]
        place = slice(start - chunk.keys.lo, stop - chunk.keys.lo)
        found.append((place, torch.as_tensor(kept, device=call.device).logical_not()))
    return found


def _fill(scores: Tensor, dropped: list[tuple[slice, Tensor]], hidden: Tensor | None, value: float) -> None:
    """Overwrite `[batches, key heads, R, rows, keys]` where the mask drops, and in hidden rows."""
    for place, drop in dropped:
        scores[..., place].masked_fill_(drop, value)
    if hidden is not None:
        scores.masked_fill_(hidden, value)


# ------------------------------------------------------------------------------------------------ forward


def _forward_chunk(call: _Call, chunk: _Chunk, scratch: _Scratch, result: _Rows) -> Tensor | None:
    """Fill the chunk's results; which of its rows must be computed from the whole program, `[..., rows, 1]`, if any."""
    rows = call.spec.empty_rows
    if chunk.keys.lo >= chunk.keys.hi:
        result.out[chunk.place] = 0
        result.stats[0][chunk.place] = float("inf")
        low = torch.ones_like(result.stats[0][chunk.place], dtype=torch.bool).unsqueeze(-1)
        return low if rows is EmptyRows.EXACT else None
    scores, _ = _scores(call, chunk, call.folded(call.query, chunk), call.spec.split.kept, scratch)
    _fill(call.unfolded(scores, chunk), _dropped(call, chunk), None, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    empty = top == float("-inf") if rows is EmptyRows.ZERO else None
    ordinary = top > LOW_SCORE if rows is EmptyRows.EXACT else None
    if empty is not None:
        top.masked_fill_(empty, 0.0)
    scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)
    out = torch.bmm(scores, call.value[chunk.pairs, chunk.keys.lo : chunk.keys.hi])
    out.div_(total if empty is None else total.masked_fill(empty, 1.0))
    logsumexp = total.log_().add_(top)
    if empty is not None:
        logsumexp.masked_fill_(empty, float("inf"))
    result.out[chunk.place] = call.unfolded(out, chunk)
    result.stats[0][chunk.place] = call.unfolded(logsumexp, chunk).squeeze(-1)
    if ordinary is None or bool(ordinary.all()):
        return None
    return ~call.unfolded(ordinary, chunk)


def _forward_low_rows(call: _Call, part: _Chunk, scratch: _Scratch, result: _Rows, low: Tensor) -> None:
    scores, _ = _scores(call, part, call.folded(call.query, part), call.spec.score, scratch)
    top = scores.amax(-1, keepdim=True)
    scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)
    out = torch.bmm(scores, call.value[part.pairs]).div_(total)
    values = (out, total.log_(), top)
    targets = (result.out, *(plane.unsqueeze(-1) for plane in result.stats))
    for target, value in zip(targets, values, strict=True):
        target[part.place] = torch.where(low, call.unfolded(value, part).to(target.dtype), target[part.place])


# ------------------------------------------------------------------------------------------------ backward


class _Gradients:
    """What the backward reads, in grouped form, and the sums that it adds to."""

    def __init__(
        self, call: _Call, grad_out: Tensor, out: Tensor, stats: Tensor, sums: list[Tensor], wanted: tuple[int, ...]
    ) -> None:
        self.call = call
        self.grad_out, self.out = _grouped(grad_out, call.shape), _grouped(out, call.shape)
        self.stats = [_grouped(plane, call.shape).unsqueeze(-1) for plane in stats]
        self.query = _grouped(sums[0], call.shape)
        self.key, self.value = sums[1].flatten(0, 1), sums[2].flatten(0, 1)
        self.captures = dict(zip(wanted, sums[3:], strict=True))
        self.places: dict[int, tuple[str | int, ...]] = {}
        for number in wanted:
            letters = plain_load_letters(call.spec, number)
            if letters is None:
                raise InternalError(f"no gradient for {call.spec.captures[number].name}: it is not indexed plainly")
            self.places[number] = tuple(letter or 0 for letter in letters)

    def low(self, chunk: _Chunk) -> Tensor | None:
        """The chunk's rows that were computed from the whole program, `[..., rows, 1]`, if any."""
        if len(self.stats) == 1:
            return None
        low = self.stats[1][chunk.place] != 0
        return low if bool(low.any()) else None

    def add_to_capture(self, number: int, window: _Window, gradient: Tensor) -> None:
        """Sum the gradient of each element over the axes that the capture lacks."""
        target = window.view(self.captures[number], self.places[number])
        target.add_(gradient.sum_to_size(target.shape))


def _backward_chunk(gradients: _Gradients, chunk: _Chunk, scratch: _Scratch, hidden: Tensor | None) -> None:
    """Add the chunk's part to all gradients; rows in `hidden` contribute nothing."""
    call, keys = gradients.call, slice(chunk.keys.lo, chunk.keys.hi)
    if keys.start >= keys.stop:
        return
    program = call.spec.score if chunk.whole else call.spec.split.kept
    query, grad_out = call.folded(call.query, chunk), call.folded(gradients.grad_out, chunk)
    final, raw = _scores(call, chunk, query, program, scratch)
    dropped = _dropped(call, chunk)
    probabilities = call.unfolded(final, chunk)
    _fill(probabilities, dropped, None, float("-inf"))
    if chunk.whole:
        probabilities.sub_(gradients.stats[1][chunk.place])
    probabilities.sub_(gradients.stats[0][chunk.place]).exp_()
    _fill(probabilities, [], hidden, 0.0)
    gradients.value[chunk.pairs, keys].baddbmm_(final.mT, grad_out)
    delta = (grad_out * call.folded(gradients.out, chunk)).sum(-1, keepdim=True)
    grad = torch.bmm(grad_out, call.value[chunk.pairs, keys].mT, out=scratch.scores("grad", chunk))
    grad.sub_(delta).mul_(final)
    _fill(call.unfolded(grad, chunk), dropped, hidden, 0.0)
    grad_score, factor = _through_program(gradients, chunk, program, raw, grad, dropped, hidden)
    grad_query = call.unfolded(torch.bmm(grad_score, call.key[chunk.pairs, keys]), chunk)
    gradients.query[chunk.place].add_(grad_query, alpha=factor)
    gradients.key[chunk.pairs, keys].baddbmm_(grad_score.mT, query, alpha=factor)


def _through_program(
    gradients: _Gradients, chunk: _Chunk, program: ScoreProgram, raw: Tensor, grad: Tensor,
    dropped: list[tuple[slice, Tensor]], hidden: Tensor | None,
) -> tuple[Tensor, float]:  # fmt: skip
    """From the gradient of final scores to that of raw ones (times the factor), adding up those of captures."""
    call = gradients.call
    derivative = call.spec.derivative(tuple(gradients.captures), kept=not chunk.whole)
    linear = _linear(program)
    window = _Window(call, chunk, chunk.keys.lo, chunk.keys.hi)
    final = call.unfolded(grad, chunk)

    def full(value: Any) -> Tensor:
        if value is final:
            return final
        whole = torch.as_tensor(value, dtype=call.dtype, device=call.device).expand_as(final)
        if not dropped and hidden is None:
            return whole
        whole = whole.clone(memory_format=torch.contiguous_format)
        _fill(whole, dropped, hidden, 0.0)  # the mask-free derivative need not be finite where the mask drops
        return whole

    if linear is None:
        score, *loads = window.values(derivative.program, score=call.unfolded(raw, chunk), grad=final)
    else:
        score, loads = final, list(window.values(_loads_only(derivative.program), grad=final)) if derivative.loads else []
    for (number, _), value in zip(derivative.loads, loads, strict=True):
        gradients.add_to_capture(number, window, full(value))
    return full(score).contiguous().view_as(grad), 1.0 if linear is None else linear.factor


@lru_cache(maxsize=1024)
def _loads_only(derivative: ScoreProgram) -> ScoreProgram:
    """A derivative program without the gradient of the raw score."""
    builder = Builder()
    values = builder.include(derivative)
    return builder.program(*(values[result] for result in derivative.results[1:]))
