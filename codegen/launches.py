"""What every call of a spec's kernels shares: its module, its arguments for captures, new tensors, launches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashfuse.codegen.load import kernel_module
from flashfuse.codegen.replay import Recording
from flashfuse.ir.attention_spec import AttentionSpec


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Launches:
    """Kernels of a spec on the tensors of one call, which a recording may listen to."""

    def __init__(
        self,
        spec: AttentionSpec,
        captures: Sequence[Tensor],
        sizes: Sequence[int],
        device: torch.device,
        recording: Recording | None = None,
        *,
        fast_tanh: bool = False,
    ) -> None:
        self.spec = spec
        self.captures = captures
        self.on = device
        self.recording = recording
        self.module = kernel_module(spec, fast_tanh)
        self.inputs = self._kernel_inputs(sizes)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "") -> Tensor:
        """A new uninitialised tensor on the call's device; `[B, H, M, E]` in memory in the order of `layout`, if given."""
        order = ["bhme".index(letter) for letter in layout] or list(range(len(shape)))
        return self._noted(torch.empty_permuted(shape, order, dtype=dtype, device=self.on))

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A new uninitialised tensor in the layout of another, where that is dense and has a unit last stride."""
        like = torch.empty_like(tensor)
        return self._noted(like if like.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format))

    def _noted(self, tensor: Tensor) -> Tensor:
        if self.recording is not None:
            self.recording.allocated(tensor)
        return tensor

    def start(self, kernel: str, blocks: int, *positional: Any, **named: Any) -> Any:
        """Launch a kernel of the spec's module; returns the compiled kernel."""
        return self.run(getattr(self.module, kernel), blocks, *positional, **named)

    def run(self, function: Any, blocks: int, *positional: Any, **named: Any) -> Any:
        """Launch a kernel; returns it compiled."""
        compiled = function[(blocks,)](*positional, **named)
        if self.recording is not None:
            self.recording.launched(compiled, blocks, function, positional, named)
        return compiled

    def cannot_repeat(self) -> None:
        """Say that this call does more than allocate and launch."""
        if self.recording is not None:
            self.recording.sound = False

    def _kernel_inputs(self, sizes: Sequence[int]) -> tuple[Any, ...]:
        """The `inputs` tuple (see `score_text.InputLayout`): pointer and strides of each capture, then sizes."""
        inputs: list[Any] = []
        for capture in self.captures:
            placed = capture if capture.device == self.on else capture.to(self.on)
            shown = placed.view(torch.int8) if placed.dtype is torch.bool else placed
            if self.recording is not None and shown is not placed:
                self.recording.shown(shown, placed)
            inputs += [shown, *placed.stride()]
        return (*inputs, *sizes)

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the tensors' device the current one."""
        return torch.cuda.device(self.on) if self.on.type == "cuda" else contextlib.nullcontext()
