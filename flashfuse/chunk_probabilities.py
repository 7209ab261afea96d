"""Probabilities of one chunk: the sink that shares in a row's sum, the weight after the softmax, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flashfuse.chunk_scores import Window
from flashfuse.chunks import Call, Chunk
from flashfuse.ir.derivative import differentiate
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_program import ScoreProgram

AddToCapture = Callable[[int, Window, Tensor], None]  # number, window, gradient of its elements


def sink_of(call: Call, chunk: Chunk) -> Tensor | None:
    """The sink of each row as `[pairs, R * rows, 1]`; None without one."""
    if call.spec.sink is None:
        return None
    value = Window(call, chunk, 0, 1).values(call.spec.sink)[0]
    value = torch.as_tensor(value, dtype=call.dtype, device=call.device)
    leading = (chunk.batches, chunk.groups, slice(0, call.shape.group), chunk.rows)
    rows = value.expand([part.stop - part.start for part in leading] + [1])
    return rows.reshape(chunk.pairs.stop - chunk.pairs.start, -1, 1)


def weighted(call: Call, chunk: Chunk, probabilities: Tensor) -> Tensor:
    """`[pairs, R * rows, keys]` after the weight; need not be divided by the row's sum before. Without a weight the same."""
    if call.spec.weight is None:
        return probabilities
    window = Window(call, chunk, chunk.keys.lo, chunk.keys.hi)
    own = call.unfolded(probabilities, chunk)
    return window.values(call.spec.weight, probability=own)[0].expand_as(own).contiguous().view_as(probabilities)


@dataclass(frozen=True)
class WeightBackward:
    """`program` has the results: the weighted probability, the gradient of the probability, and that of each of `loads`."""

    program: ScoreProgram
    loads: tuple[tuple[int, str], ...]


@lru_cache(maxsize=256)
def weight_backward(weight: ScoreProgram, wanted: tuple[int, ...]) -> WeightBackward:
    """A weight and its derivative as one program, so that random bits are drawn once for both."""
    derivative = differentiate(weight, wanted)
    builder = Builder()
    weighted_value = builder.include(weight)[weight.result]
    values = builder.include(derivative.program)
    results = [values[result] for result in derivative.program.results]
    return WeightBackward(builder.program(weighted_value, *results), derivative.loads)


def through_weight(
    call: Call, chunk: Chunk, probabilities: Tensor, grad: Tensor, wanted: tuple[int, ...], add: AddToCapture
) -> tuple[Tensor, Tensor]:
    """The weighted probabilities, and the gradient of the probabilities from theirs, adding up those of captures."""
    if call.spec.weight is None:
        return probabilities, grad
    window = Window(call, chunk, chunk.keys.lo, chunk.keys.hi)
    backward = weight_backward(call.spec.weight, wanted)
    own = call.unfolded(grad, chunk)
    values = window.values(backward.program, probability=call.unfolded(probabilities, chunk), grad=own)
    weighted_values, found, *loads = (
        torch.as_tensor(value, dtype=call.dtype, device=call.device).expand_as(own) for value in values
    )
    for (number, _), value in zip(backward.loads, loads, strict=True):
        add(number, window, value)
    return weighted_values.contiguous().view_as(grad), found.contiguous().view_as(grad)


def through_sink(call: Call, chunk: Chunk, grad: Tensor, wanted: tuple[int, ...], add: AddToCapture) -> None:
    """Add up the gradients of captures from that of the rows' sinks, `[pairs, R * rows, 1]`."""
    if call.spec.sink is None:
        return
    window = Window(call, chunk, 0, 1)
    derivative = differentiate(call.spec.sink, wanted)
    own = call.unfolded(grad, chunk)
    for (number, _), value in zip(derivative.loads, window.values(derivative.program, grad=own)[1:], strict=True):
        add(number, window, torch.as_tensor(value, dtype=call.dtype, device=call.device).expand_as(own))
