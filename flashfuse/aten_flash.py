"""Plain and causal attention on CPU tensors by the flash kernel that torch itself has for them.

That kernel computes softmax(factor * s) or its causal form and nothing else, so it serves only specs that mean exactly
that; all others, and rows outside the ordinary range of scores, are left to `flashfuse.chunked_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flashfuse.chunk_scores import linear_score
from flashfuse.ir.affine import is_causal
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.mask import LOW_SCORE

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HIGHEST = 1.0e30  # scores that may be larger, infinite or NaN are left to the exact path


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    out: Tensor,
) -> Tensor | None:
    """As `chunked_attention.forward`, or None if this attention is not for torch's kernel; `out` may then be filled."""
    form = _form(spec)
    if form is None or not _fits(query, key, value):
        return None
    factor, causal = form
    with torch.no_grad():
        if not _largest(query) * _largest(key) * query.shape[3] * factor < _HIGHEST:
            return None  # torch's kernel takes a row of NaN or of -infinity for a masked one and gives zero
        result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=factor
        )
        if not _ordinary(logsumexp):
            return None
        out.copy_(result)
        stats = torch.zeros((spec.planes, *query.shape[:3]), dtype=torch.float32)
        stats[0] = logsumexp
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
) -> list[Tensor] | None:
    """As `chunked_attention.backward`, or None if this attention is not for torch's kernel."""
    form = _form(spec)
    if form is None or grad_stats is not None or not _fits(query, key, value):
        return None
    if not _ordinary(stats[0]) or bool(stats[1:].any()):
        return None
    factor, causal = form
    with torch.no_grad():
        return list(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out.contiguous(), query, key, value, out, stats[0], 0.0, causal, scale=factor
            )
        )


def computes(spec: AttentionSpec) -> bool:
    """Whether torch's kernel computes a spec, if the tensors suit it too."""
    return _form(spec) is not None


@lru_cache(maxsize=1024)
def _form(spec: AttentionSpec) -> tuple[float, bool] | None:
    """(factor, causal) of a spec that is softmax(factor * s), all keys or those with n <= m; None for others."""
    linear = linear_score(spec.split.kept)
    if linear is None or linear.addends is not None or linear.factor <= 0 or spec.captures or len(spec.programs) > 1 or spec.wide:
        return None
    if spec.split.keep is not None and not is_causal(spec.split.keep):
        return None
    return linear.factor, spec.split.keep is not None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    tensors = (query, key, value)
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and all(tensor.dtype is query.dtype and tensor.stride(3) == 1 for tensor in tensors)
        and query.shape[1] == key.shape[1]
        and query.shape[3] == value.shape[3]
        and query.numel() > 0
        and key.shape[2] > 0
    )


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    least, most = torch.aminmax(tensor)
    return math.nan if least.isnan() else max(-least.item(), most.item())


def _ordinary(logsumexp: Tensor) -> bool:
    least, most = torch.aminmax(logsumexp)
    return least.item() > LOW_SCORE and most.item() < _HIGHEST
