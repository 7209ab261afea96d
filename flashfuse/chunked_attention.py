"""Attention of a spec with torch operators, in chunks of queries: the CPU path, and what kernels are tested against.

Exact (each row's whole range of keys is in a chunk, so nothing is rescaled), linear memory, forward and backward, any
device. Scores are float32, or float64 for float64 inputs. The backward recomputes the probabilities from the row
statistics, as in FlashAttention-2 (Dao 2023, section 3.1 and algorithm 2).

A chunk covers some batches, some key heads with all their query heads, and some queries; its scores are one tensor
`[batches, key heads, query heads of a key head, queries, keys]` small enough to stay in the cache. Keys that the mask
empties for the chunk are left out (`flashfuse.chunk_ranges`), and the mask is looked at only where it is not full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashfuse.chunk_probabilities import sink_of, through_sink, through_weight, weighted
from flashfuse.chunk_scores import Window, dropped_by_mask, linear_score, overwrite, scores_of
from flashfuse.chunks import Call, Chunk, Scratch, grouped, score_dtype, shape_of
from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows, plain_load_letters
from flashfuse.ir.diagonals import diagonal_sums
from flashfuse.ir.mask import LOW_SCORE
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_program import ScoreProgram


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    out: Tensor,
) -> Tensor:
    """Fill `out` `[B, H, M, E]` (any strides, the spec's dtype) and return the row statistics `[planes, B, H, M]`.

    Statistics are float32 (float64 for float64 inputs): the logarithm of the sum of exponentials, and, if the spec has
    two planes, the shift that was subtracted from the scores before (0 for ordinary rows).
    """
    dtype, shape = score_dtype(query, value), shape_of(query, key)
    stats = torch.zeros((spec.planes, *query.shape[:3]), dtype=dtype, device=query.device)
    if out.numel() == 0 or shape.N == 0:
        out.zero_()
        stats[0] = float("inf")
        return stats
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        call = Call(spec, query, key, value, captures, sizes)
        scratch = Scratch(call)
        result = _Rows(grouped(out, shape), [grouped(plane, shape) for plane in stats])
        for chunk in call.chunks():
            low = _forward_chunk(call, chunk, scratch, result)
            if low is not None:
                for part, rows in call.whole_rows(chunk):
                    _forward_low_rows(call, part, scratch, result, low[..., rows, :])
    return stats


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
    grad_stats: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of query, key, value and of each capture that `needs` names, in order, contiguous, in their dtypes.

    `out` and `stats` are what `forward` gave; `grad_stats` `[B, H, M]` is the gradient of the rows' logsumexp, if any.
    Sums are kept in the precision of scores.
    """
    dtype, shape = score_dtype(query, value), shape_of(query, key)
    wanted = tuple(number for number, needed in enumerate(needs) if needed)
    tensors = [query, key, value, *(captures[number] for number in wanted)]
    sums = [torch.zeros(tensor.shape, dtype=dtype, device=query.device) for tensor in tensors]
    if out.numel() and shape.N:
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            call = Call(spec, query, key, value, captures, sizes)
            scratch = Scratch(call)
            gradients = _Gradients(call, grad_out, stats, sums, wanted, grad_stats)
            for chunk in call.chunks():
                low = gradients.low(chunk)
                _backward_chunk(gradients, chunk, scratch, hidden=low)
                if low is not None:
                    for part, rows in call.whole_rows(chunk):
                        _backward_chunk(gradients, part, scratch, hidden=~low[..., rows, :])
    return [total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)]


@dataclass(frozen=True)
class _Rows:
    """Results of the forward with heads grouped: out `[B, G, R, M, E]`, each plane of stats `[B, G, R, M]`."""

    out: Tensor
    stats: list[Tensor]


# ------------------------------------------------------------------------------------------------ forward


def _forward_chunk(call: Call, chunk: Chunk, scratch: Scratch, result: _Rows) -> Tensor | None:
    """Fill the chunk's results; which of its rows must be computed from the whole program, `[..., rows, 1]`, if any."""
    rows = call.spec.empty_rows
    sink = sink_of(call, chunk)
    if chunk.keys.lo >= chunk.keys.hi:
        return _no_keys(call, chunk, sink, result)
    scores, _ = scores_of(call, chunk, call.folded(call.query, chunk), call.spec.split.kept, scratch)
    overwrite(call.unfolded(scores, chunk), dropped_by_mask(call, chunk), None, float("-inf"))
    top = _top(scores, sink)
    empty = top == float("-inf") if rows is EmptyRows.ZERO else None
    ordinary = top.abs() < -LOW_SCORE if rows is EmptyRows.EXACT else None
    if empty is not None:
        top.masked_fill_(empty, 0.0)
    total = _exponentials(scores, top, sink)
    out = torch.bmm(weighted(call, chunk, scores), call.value[chunk.pairs, chunk.keys.lo : chunk.keys.hi])
    out.div_(total if empty is None else total.masked_fill(empty, 1.0))
    logsumexp = total.log_().add_(top)
    if empty is not None:
        logsumexp.masked_fill_(empty, float("inf"))
    result.out[chunk.place] = call.unfolded(out, chunk)
    result.stats[0][chunk.place] = call.unfolded(logsumexp, chunk).squeeze(-1)
    if ordinary is None or bool(ordinary.all()):
        return None
    return ~call.unfolded(ordinary, chunk)


def _no_keys(call: Call, chunk: Chunk, sink: Tensor | None, result: _Rows) -> Tensor | None:
    """`_forward_chunk` where the mask drops every key of every row."""
    result.out[chunk.place] = 0
    logsumexp = result.stats[0][chunk.place]
    logsumexp.copy_(call.unfolded(sink, chunk).squeeze(-1)) if sink is not None else logsumexp.fill_(float("inf"))
    low = torch.ones_like(logsumexp, dtype=torch.bool) if sink is None else ~(logsumexp.abs() < -LOW_SCORE)
    return low.unsqueeze(-1) if call.spec.empty_rows is EmptyRows.EXACT and bool(low.any()) else None


def _top(scores: Tensor, sink: Tensor | None) -> Tensor:
    """The largest score of each row, `[..., 1]`."""
    top = scores.amax(-1, keepdim=True)
    return top if sink is None else torch.maximum(top, sink)


def _exponentials(scores: Tensor, top: Tensor, sink: Tensor | None) -> Tensor:
    """Replace scores by their exponentials, divided by that of `top`; the sum of each row, `[..., 1]`."""
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    return total if sink is None else total.add_((sink - top).exp_())


def _forward_low_rows(call: Call, part: Chunk, scratch: Scratch, result: _Rows, low: Tensor) -> None:
    scores, _ = scores_of(call, part, call.folded(call.query, part), call.spec.score, scratch)
    sink = sink_of(call, part)
    top = _top(scores, sink)
    total = _exponentials(scores, top, sink)
    lost = total.isnan()  # where a weight puts zeros in the place of all probabilities the row is zero all the same
    scores.masked_fill_(lost, float("nan"))
    out = torch.bmm(weighted(call, part, scores), call.value[part.pairs]).div_(total.masked_fill(lost, 1.0))
    values = (out, total.log_(), top)
    targets = (result.out, *(plane.unsqueeze(-1) for plane in result.stats))
    for target, value in zip(targets, values, strict=True):
        target[part.place] = torch.where(low, call.unfolded(value, part).to(target.dtype), target[part.place])


# ------------------------------------------------------------------------------------------------ backward


class _Gradients:
    """What the backward reads, in grouped form, and the sums that it adds to."""

    def __init__(
        self, call: Call, grad_out: Tensor, stats: Tensor, sums: list[Tensor], wanted: tuple[int, ...],
        grad_stats: Tensor | None,
    ) -> None:  # fmt: skip
        self.call = call
        self.grad_out = grouped(grad_out, call.shape)
        self.stats = [grouped(plane, call.shape).unsqueeze(-1) for plane in stats]
        self.grad_stats = None if grad_stats is None else grouped(grad_stats, call.shape).unsqueeze(-1)
        self.query = grouped(sums[0], call.shape)
        self.key, self.value = sums[1].flatten(0, 1), sums[2].flatten(0, 1)
        self.captures = dict(zip(wanted, sums[3:], strict=True))
        self.places: dict[int, tuple[str | int, ...]] = {}
        for number in wanted:
            letters = plain_load_letters(call.spec, number)
            if letters is None:
                raise InternalError(f"no gradient for {call.spec.captures[number].name}: it is not indexed plainly")
            self.places[number] = tuple(letter or 0 for letter in letters)

    def low(self, chunk: Chunk) -> Tensor | None:
        """The chunk's rows that were computed from the whole program, `[..., rows, 1]`, if any."""
        if len(self.stats) == 1:
            return None
        low = self.stats[1][chunk.place] != 0
        return low if bool(low.any()) else None

    def add_to_capture(self, number: int, window: Window, gradient: Tensor) -> None:
        """Sum the gradient of each element over the axes that the capture lacks, or along the diagonals that it has."""
        places = self.places[number]
        if "d" not in places:
            target = window.view(self.captures[number], places)
            target.add_(gradient.sum_to_size(target.shape))
            return
        summed = [axis for axis, letter in enumerate("bh") if letter not in places]
        gradient = gradient.flatten(1, 2)  # [b, h, rows, keys]
        sums = diagonal_sums(gradient.sum(summed) if summed else gradient)
        first = window.spans["n"][0] - (window.spans["m"][1] - 1) + self.call.shape.M - 1
        spans = {**window.spans, "d": (first, first + sums.shape[-1])}
        target = self.captures[number][tuple(slice(*spans[p]) if isinstance(p, str) else p for p in places)]
        named = [letter for letter in places if isinstance(letter, str)]
        target = target.permute([named.index(letter) for letter in "bhd" if letter in named])
        target.add_(sums)


def _backward_chunk(gradients: _Gradients, chunk: Chunk, scratch: Scratch, hidden: Tensor | None) -> None:
    """Add the chunk's part to all gradients; rows in `hidden` contribute nothing."""
    call, keys = gradients.call, slice(chunk.keys.lo, chunk.keys.hi)
    if keys.start >= keys.stop:
        return
    program = call.spec.score if chunk.whole else call.spec.split.kept
    query, grad_out = call.folded(call.query, chunk), call.folded(gradients.grad_out, chunk)
    final, raw = scores_of(call, chunk, query, program, scratch)
    dropped = dropped_by_mask(call, chunk)
    probabilities = call.unfolded(final, chunk)
    overwrite(probabilities, dropped, None, float("-inf"))
    if chunk.whole:
        probabilities.sub_(gradients.stats[1][chunk.place])
    probabilities.sub_(gradients.stats[0][chunk.place]).exp_()
    overwrite(probabilities, [], hidden, 0.0)
    sink = _sink_probability(gradients, chunk, hidden)
    _normalise(final, sink)
    grad = torch.bmm(grad_out, call.value[chunk.pairs, keys].mT, out=scratch.scores("grad", chunk))
    wanted = tuple(gradients.captures)
    weighted_values, grad = through_weight(call, chunk, final, grad, wanted, gradients.add_to_capture)
    gradients.value[chunk.pairs, keys].baddbmm_(weighted_values.mT, grad_out)
    delta = torch.mul(final, grad, out=scratch.scores("product", chunk)).sum(-1, keepdim=True)
    if sink is not None:
        through_sink(call, chunk, -(sink * delta), wanted, gradients.add_to_capture)
    if gradients.grad_stats is not None:
        delta = delta - call.folded(gradients.grad_stats, chunk)
    grad.sub_(delta).mul_(final)
    overwrite(call.unfolded(grad, chunk), dropped, hidden, 0.0)
    grad_score, factor = _through_program(gradients, chunk, program, raw, grad, dropped, hidden)
    grad_query = call.unfolded(torch.bmm(grad_score, call.key[chunk.pairs, keys]), chunk)
    gradients.query[chunk.place].add_(grad_query, alpha=factor)
    gradients.key[chunk.pairs, keys].baddbmm_(grad_score.mT, query, alpha=factor)


def _normalise(probabilities: Tensor, sink: Tensor | None) -> None:
    """Divide rows by their sums, which the rounding of their logarithm left beside one.

    With delta taken from these probabilities, and not from the rounded output, every row of gradients sums up to zero: else
    the rest would stay where gradients differ little, and add up in sums of many elements' gradients.
    """
    total = probabilities.sum(-1, keepdim=True)
    if sink is not None:
        total.add_(sink)
    total.masked_fill_(total == 0, 1.0)
    probabilities.div_(total)
    if sink is not None:
        sink.div_(total)


def _sink_probability(gradients: _Gradients, chunk: Chunk, hidden: Tensor | None) -> Tensor | None:
    """What the sink takes of each row, `[pairs, R * rows, 1]`; zero in hidden rows."""
    call = gradients.call
    sink = sink_of(call, chunk)
    if sink is None:
        return None
    own = call.unfolded(sink, chunk)
    if chunk.whole:
        own = own - gradients.stats[1][chunk.place]
    own = (own - gradients.stats[0][chunk.place]).exp_()
    overwrite(own, [], hidden, 0.0)
    return own.reshape_as(sink)


def _through_program(
    gradients: _Gradients, chunk: Chunk, program: ScoreProgram, raw: Tensor, grad: Tensor,
    dropped: list[tuple[slice, Tensor]], hidden: Tensor | None,
) -> tuple[Tensor, float]:  # fmt: skip
    """From the gradient of final scores to that of raw ones (times the factor), adding up those of captures."""
    call = gradients.call
    derivative = call.spec.derivative(tuple(gradients.captures), kept=not chunk.whole)
    linear = linear_score(program)
    window = Window(call, chunk, chunk.keys.lo, chunk.keys.hi)
    final = call.unfolded(grad, chunk)

    def full(value: Any) -> Tensor:
        if value is final:
            return final
        whole = torch.as_tensor(value, dtype=call.dtype, device=call.device).expand_as(final)
        if not dropped and hidden is None:
            return whole
        whole = whole.clone(memory_format=torch.contiguous_format)
        overwrite(whole, dropped, hidden, 0.0)  # the mask-free derivative need not be finite where the mask drops
        return whole

    if linear is None:
        score, *loads = window.values(derivative.program, score=call.unfolded(raw, chunk), grad=final)
    else:
        score, loads = final, []
        if derivative.loads:
            loads = list(window.values(_loads_only(derivative.program), grad=final))
    for (number, _), value in zip(derivative.loads, loads, strict=True):
        gradients.add_to_capture(number, window, full(value))
    return full(score).contiguous().view_as(grad), 1.0 if linear is None else linear.factor


@lru_cache(maxsize=1024)
def _loads_only(derivative: ScoreProgram) -> ScoreProgram:
    """A derivative program without the gradient of the raw score."""
    builder = Builder()
    values = builder.include(derivative)
    return builder.program(*(values[result] for result in derivative.results[1:]))
