"""`flashfuse::block_ranges`: the range table of a mask over captured tensors, as a node of its own in a rewritten graph.

Layers whose masks say the same of the same tensors share one, and so does their backward: autograd keeps it, and
activation checkpointing makes it again with whatever it recomputes. `flashfuse/ir/block_table.py` says what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashfuse.attention_op import kernels_run_on, run_kernels
from flashfuse.ir.attention_spec import AttentionSpec, from_text
from flashfuse.ir.block_table import blocks, table_shape

_MOST_DECODED = 16  # so few queries split the keys over programs instead of skipping some

_library = torch.library.Library("flashfuse", "FRAGMENT")
_library.define(
    "block_ranges(Tensor[] captures, SymInt[] sizes, SymInt[] shape, str spec, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def wants_table(spec: AttentionSpec, device: torch.device, queries: object) -> bool:
    """Whether the kernels of a spec on a device read a range table. `queries` is M, an int if it is known."""
    few = isinstance(queries, int) and queries <= _MOST_DECODED
    return spec.certainty is not None and kernels_run_on(device.type) and not few


def run_block_ranges(
    captures: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int], spec: str, device: torch.device
) -> Tensor:
    """The table for `shape` = B, H, M, N, int32 on `device`; without kernels one that allows everything."""
    meaning, device = from_text(spec), torch.device(device)
    found = run_kernels(meaning, "block_ranges", device.type == "cuda", captures, sizes, shape, device)
    return _everything(meaning, shape, device) if found is None else found  # type: ignore[no-any-return]


def _everything(spec: AttentionSpec, shape: Sequence[int], device: torch.device) -> Tensor:
    """A table that rules nothing out: every range is the whole length."""
    table = _empty(spec, shape, device).zero_()
    _B, _H, M, N = shape
    table[:, :, : blocks(M), 1] = N
    table[:, :, blocks(M) :, 1] = M
    return table


def _empty(spec: AttentionSpec, shape: Sequence[int], device: torch.device) -> Tensor:
    assert spec.split.keep is not None
    B, H, M, N = shape
    return torch.empty(table_shape(spec.split.keep, (B, H, M, N)), dtype=torch.int32, device=device)


_library.impl("block_ranges", run_block_ranges, "CompositeExplicitAutograd")


@torch.library.register_fake("flashfuse::block_ranges", lib=_library)
def _block_ranges_fake(captures, sizes, shape, spec, device):  # type: ignore[no-untyped-def]
    return _empty(from_text(spec), shape, device)
