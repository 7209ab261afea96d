"""Scores that are a sum of several products: one product of a longer head dim where nothing was done to one of them alone."""

from __future__ import annotations

import torch
from zoo_entries import B, D, H, S, qkv, spelling

R = 8


def _rotated() -> tuple[torch.Tensor, ...]:
    """Query, key, value, and the rotated parts of query and key, the latter shared by all heads."""
    return (*qkv(e=24), torch.randn(B, H, S, R), torch.randn(B, 1, S, R))


def _causal() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


@spelling(inputs=_rotated, score="s * 0.2", gradients=(0, 1, 3, 4))
def rotated_parts_scaled_like_the_others(q, k, v, rotated_q, rotated_k):
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) / 5.0
    scores = scores + torch.einsum("bhmr,bnr->bhmn", rotated_q, rotated_k[:, 0]) / 5.0
    return scores.softmax(-1) @ v


@spelling(inputs=_rotated, score="s", gradients=(0, 1, 3, 4))
def rotated_parts_added_by_baddbmm(q, k, v, rotated_q, rotated_k):
    rotated_k = rotated_k.expand(B, H, S, R).reshape(B * H, S, R)
    scores = torch.bmm((q * 0.25).reshape(B * H, S, D), k.reshape(B * H, S, D).mT)
    scores = torch.baddbmm(scores, rotated_q.reshape(B * H, S, R), rotated_k.mT)
    return torch.bmm(scores.softmax(-1), v.reshape(B * H, S, 24)).view(B, H, S, 24)


# ------------------------------------------------------------------------------------------------ near misses: captured


@spelling(inputs=_rotated, score="(c0[b, h, m, n] * 0.2) + (s * 0.3)", rows="exact", gradients=(0, 1, 3, 4))
def rotated_parts_with_a_scale_of_their_own(q, k, v, rotated_q, rotated_k):
    return (q @ k.mT * 0.2 + rotated_q @ rotated_k.mT * 0.3).softmax(-1) @ v


@spelling(
    inputs=_rotated, score="c0[b, h, m, n] + (0 if (not ((n - m) <= 0)) else s)", rows="exact", gradients=(0, 1, 3, 4)
)  # fmt: skip
def rotated_parts_masked_alone(q, k, v, rotated_q, rotated_k):
    return (q @ k.mT + (rotated_q @ rotated_k.mT).masked_fill(~_causal(), 0.0)).softmax(-1) @ v
