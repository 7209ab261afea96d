"""Buffers for the gradients of captures and their way from kernel partials to the captures' own shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashfuse.codegen.score_functions import CaptureGradients
from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.diagonals import diagonal_sums

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

_sorted: dict[str, CaptureGradients] = {}


def gradient_classes(spec: AttentionSpec) -> CaptureGradients:
    """`CaptureGradients.of`, remembered."""
    if spec.key not in _sorted:
        _sorted[spec.key] = CaptureGradients.of(spec)
    return _sorted[spec.key]


def elements_read(spec: AttentionSpec) -> set[int]:
    """Captures that are read for every query and key; others are read by the rows' sinks alone."""
    programs = [program for name, program in spec.programs.items() if name != "sink"]
    return {capture for program in programs for capture in program.loads()}


class CaptureBuffers:
    """`row_partial` `[captures, B, H, M]` and `column_partial` `[captures, B, H, N]`, float32, None where unneeded."""

    def __init__(self, call: Call, wanted: Sequence[int]) -> None:
        self.call = call
        self.wanted = wanted
        self.classes = gradient_classes(call.spec) if wanted else CaptureGradients({}, (), (), (), ())
        for capture in wanted:
            if capture not in self.classes.letters:
                raise InternalError(f"capture {call.spec.captures[capture].name} can have no gradient")
        self.row_partial = self._partial(self.classes.row, call.M)
        self.column_partial = self._partial(self.classes.column, call.N)
        self._tiles = {c: self._tile_gradient(c) for c in self.classes.tile if c in wanted}
        self._strips: dict[int, Tensor] = {}

    @property
    def summed(self) -> bool:
        """Whether some gradient is a sum over keys or queries of elements' gradients."""
        classes = self.classes
        return bool({*classes.row, *classes.column, *classes.diagonal} & {*self.wanted} & elements_read(self.call.spec))

    def _partial(self, captures: tuple[int, ...], length: int) -> Tensor | None:
        if not set(captures) & set(self.wanted):
            return None
        shape = (len(captures), self.call.B, self.call.H, length)
        return torch.empty(shape, dtype=torch.float32, device=self.call.query.device)

    def _extent(self, letter: str) -> int:
        if letter == "d":
            return self.call.M + self.call.N - 1
        return {"b": self.call.B, "h": self.call.H, "m": self.call.M, "n": self.call.N, "": 1}[letter]

    def _empty(self, capture: int) -> tuple[Tensor, Tensor]:
        """The gradient in the capture's own shape, and the view of the elements that are read."""
        like = self.call.captures[capture]
        extents = [self._extent(letter) for letter in self.classes.letters[capture]]
        whole = list(like.shape) == extents
        make = torch.empty if whole else torch.zeros
        full = make(like.shape, dtype=like.dtype, device=like.device)
        part = full
        for dimension, extent in enumerate(extents):
            part = part.narrow(dimension, 0, extent)
        return full, part

    def _tile_gradient(self, capture: int) -> tuple[Tensor, Tensor]:
        """The gradient, and its elements as `[B or 1, H or 1, M, N]`."""
        full, part = self._empty(capture)
        return full, _ordered(part, self.classes.letters[capture])

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Captures that have a kernel launch of their own, with the tensor that it fills."""
        for capture, (_, view) in self._tiles.items():
            yield capture, view

    def diagonals(self) -> list[int]:
        """Captures with an element for each distance, which have a kernel launch of their own."""
        return [capture for capture in self.classes.diagonal if capture in self.wanted]

    def strips(self, capture: int, block: int) -> Tensor:
        """What that launch fills: `[B or 1, H or 1, strips, block, block]`, tiles whose diagonals are to be summed."""
        letters = self.classes.letters[capture]
        kept = [self._extent(letter) if letter in letters else 1 for letter in "bh"]
        count = -(-self.call.M // block) + -(-self.call.N // block) - 1
        shape = (*kept, count, block, block)
        self._strips[capture] = torch.empty(shape, dtype=torch.float32, device=self.call.query.device)
        return self._strips[capture]

    def _along_diagonals(self, capture: int) -> Tensor:
        """`[B or 1, H or 1, M + N - 1]` from the strips: each one's last diagonals are the first ones of the next but one."""
        sums = diagonal_sums(self._strips[capture])
        block = (sums.shape[-1] + 1) // 2
        early, late = (part.flatten(-2) for part in pad(sums, (0, 1)).split(block, -1))
        whole = pad(early, (0, block)) + pad(late, (block, 0))  # from the distance -(blocks of queries * block - 1) on
        first = -(-self.call.M // block) * block - self.call.M
        return whole[..., first : first + self.call.M + self.call.N - 1]

    def finished(self) -> list[Tensor]:
        """The gradients of the wanted captures, in order, once the kernels have run."""
        return [self._finished(capture) for capture in self.wanted]

    def _finished(self, capture: int) -> Tensor:
        if capture in self._tiles:
            return self._tiles[capture][0]
        if capture in self.classes.diagonal:
            full, part = self._empty(capture)
            _ordered(part, self.classes.letters[capture], "bhd").copy_(self._along_diagonals(capture))
            return full
        row = capture in self.classes.row
        partials = self.row_partial if row else self.column_partial
        if partials is None:
            raise InternalError("a capture's partial sums were not made")
        partial = partials[(self.classes.row if row else self.classes.column).index(capture)]
        letters = self.classes.letters[capture]
        full, part = self._empty(capture)
        target = _ordered(part, letters)  # [B or 1, H or 1, M or 1, N or 1]
        own = partial.unsqueeze(3 if row else 2)
        summed = tuple(d for d, letter in enumerate("bhmn") if letter not in letters and own.shape[d] != 1)
        target.copy_(own.sum(summed, keepdim=True) if summed else own)
        return full


def _ordered(tensor: Tensor, letters: Sequence[str], axes: str = "bhmn") -> Tensor:
    """A view with the dimensions `axes`, of size 1 where the tensor lacks one."""
    named = [dimension for dimension, letter in enumerate(letters) if letter]
    for dimension in reversed([d for d, letter in enumerate(letters) if not letter]):
        tensor = tensor.select(dimension, 0)
    names = [letters[dimension] for dimension in named]
    order = [letter for letter in axes if letter in names]
    tensor = tensor.permute([names.index(letter) for letter in order])
    for place, letter in enumerate(axes):
        if letter not in order:
            tensor = tensor.unsqueeze(place)
    return tensor


def capture_gradients(call: Call, wanted: Sequence[int]) -> CaptureBuffers:
    """Buffers for the gradients of the wanted captures."""
    return CaptureBuffers(call, wanted)
