"""Tensor descriptors: how TMA, from compute capability 9.0 on, finds the blocks of rows that the portable kernels' loops load.

They live on the host and travel with a launch. The hardware computes the addresses and fills what lies beyond the tensor with
zeros, which saves the registers and the instructions for both. Pointers serve wherever a tensor cannot be described.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call
    from flashfuse.codegen.plan import Tile


def describable(tensor: Tensor) -> bool:
    """Whether TMA can read it: 16-byte aligned address and strides, and no dimension repeated."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides)
    return aligned and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


def strides_of(tensor: Tensor) -> list[int]:
    """The strides of a `describable` tensor with a unit last one, where a dimension of one element has a stride that is valid."""
    unused = -(-tensor.shape[-1] // 8) * 8
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [*(stride if size > 1 else unused for size, stride in strides), 1]


def in_blocks(call: Call, tile: Tile, rows: int, tensors: Sequence[Tensor], padded: Sequence[int]) -> tuple[Sequence[Any], bool]:
    """What a kernel gets for the `[B, H, length, dim]` tensors of its loop, and whether these are descriptors.

    Descriptors of `[1, 1, rows, padded dim]` boxes if the tile wants them, the device has TMA and it can read all of the tensors;
    else the tensors themselves.
    """
    if not tile.tma or not _has_tma(call.on) or not all(describable(tensor) for tensor in tensors):
        return tensors, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    boxes = [[1, 1, rows, columns] for columns in padded]
    described = zip(tensors, boxes, strict=True)
    return [TensorDescriptor(tensor, list(tensor.shape), strides_of(tensor), box) for tensor, box in described], True


@cache
def _has_tma(device: torch.device) -> bool:
    """Triton's interpreter does as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
