"""What people do to scores: functions of them, biases of every kind, several products in one sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from zoo_entries import H, S, qkv, spelling


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * 0.25


# ------------------------------------------------------------------------------------------------ biases


def _t5_bucket() -> torch.Tensor:
    distance = torch.arange(S)[None, :] - torch.arange(S)[:, None]
    n = -torch.min(distance, torch.zeros_like(distance))
    large = 8 + (torch.log(n.float() / 8) / math.log(16) * 8).to(torch.long)
    return torch.where(n < 8, n, torch.min(large, torch.full_like(large, 15)))


@spelling(inputs=lambda: (*qkv(), torch.randn(16, H)), score="s + c0[m, n, h]", rows="exact", gradients=(0, 1, 2, 3))
def t5_bias(q, k, v, table):
    bias = F.embedding(_t5_bucket(), table).permute([2, 0, 1]).unsqueeze(0)
    return (q @ k.mT + bias).softmax(-1) @ v
