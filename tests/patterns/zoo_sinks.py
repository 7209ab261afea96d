"""Sinks: a column joined to the scores and cut off again, and a number in the sum of exponentials."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zoo_entries import B, H, S, near_miss, qkv, spelling

NEVER = float("-inf")


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * 0.25


def _with_sinks() -> tuple[torch.Tensor, ...]:
    return (*qkv(), torch.randn(H))


def _with_padding() -> tuple[torch.Tensor, ...]:
    """Padding, whole of one batch."""
    return (*qkv(), torch.arange(S)[None, :] < torch.tensor([0, S - 7])[:, None])


def _column(sinks: torch.Tensor) -> torch.Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)


@spelling(inputs=_with_sinks, gradients=(0, 1, 2, 3), sink="c0[h]")
def column_of_sinks(q, k, v, sinks):
    joined = torch.cat([_scores(q, k), _column(sinks)], dim=-1)
    return joined.softmax(-1)[..., :-1] @ v


@spelling(inputs=_with_sinks, gradients=(0, 1, 2, 3), sink="c0[h]", keeps="(n - m) <= 0")
def column_of_sinks_with_the_maximum_taken_off(q, k, v, sinks):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    joined = torch.cat([_scores(q, k).masked_fill(~causal, NEVER), _column(sinks)], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    p = F.softmax(joined, dim=-1, dtype=joined.dtype)
    return F.dropout(p[..., :-1], 0.0, training=True).to(v.dtype) @ v


@spelling(inputs=_with_sinks, gradients=(0, 1, 2, 3), sink="c0[h]")
def column_of_sinks_in_front(q, k, v, sinks):
    joined = torch.cat([_column(sinks), _scores(q, k)], dim=3)
    return F.softmax(joined, dim=-1).narrow(-1, 1, S) @ v


@spelling(inputs=lambda: (*qkv(), torch.randn(B, H, S)), gradients=(0, 1, 2, 3), sink="c0[b, h, m]", weight="p * 0.5")
def sink_of_every_query_and_a_weight(q, k, v, sinks):
    joined = torch.cat([_scores(q, k), (sinks * 2.0)[..., None]], dim=-1)
    return (joined.softmax(-1) * 0.5)[..., :-1] @ v


@spelling(
    inputs=lambda: (*_with_sinks(), torch.rand(S + 1)), gradients=(0, 1, 2, 3, 4), sink="c0[h]", weight="p * c1[n]",
)  # fmt: skip
def weighted_before_the_column_is_cut_off(q, k, v, sinks, weight):
    joined = torch.cat([_scores(q, k), _column(sinks)], dim=-1)
    return (joined.softmax(-1) * weight)[..., :-1] @ v


@spelling(sink="0")
def zero_column(q, k, v):
    return F.pad(_scores(q, k), (0, 1)).softmax(-1)[..., :S] @ v


@spelling(sink="-0.5")
def column_of_one_number(q, k, v):
    return F.pad(_scores(q, k), (1, 0), value=-0.5).softmax(-1)[..., 1:] @ v


@spelling(sink="0")
def softmax_plus_one(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@spelling(sink="0", inputs=_with_padding, keeps="c0[b, n]")
def softmax_plus_one_of_padded_rows(q, k, v, keep):
    e = torch.exp(_scores(q, k).masked_fill(~keep[:, None, None, :], NEVER))
    return (e / (e.sum(-1, keepdim=True) + 1.0)) @ v


@spelling(sink="0")
def softmax_plus_one_with_the_maximum_taken_off(q, k, v):
    x = _scores(q, k)
    top = x.amax(-1, keepdim=True)
    e = torch.exp(x - top)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-top))) @ v


@spelling()
def a_tiny_number_in_the_sum_beside_one(q, k, v):
    x = _scores(q, k)
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return (e / (e.sum(-1, keepdim=True) + 1e-9)) @ v


@spelling(sink="0.693147")
def softmax_plus_two(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e / (e.sum(-1, keepdim=True) + 2)) @ v


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF401", "softmax_plus_one_with_the_maximum_taken_off")
def one_in_the_sum_after_the_maximum_is_taken_off(q, k, v):
    x = _scores(q, k)
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return (e / (e.sum(-1, keepdim=True) + 1)) @ v


@near_miss("FF401", "column_of_sinks", inputs=lambda: (*qkv(n=S + 1)[:2], qkv()[2]))
def a_real_key_is_cut_off(q, k, v):
    return _scores(q, k).softmax(-1)[..., :-1] @ v


@near_miss("FF401", "column_of_sinks_in_front", inputs=_with_sinks)
def a_real_key_is_cut_off_and_the_sink_stays(q, k, v, sinks):
    joined = torch.cat([_column(sinks), _scores(q, k)], dim=-1)
    return joined.softmax(-1)[..., :-1] @ v


@near_miss("FF401", "column_of_sinks", inputs=lambda: (*qkv(), torch.randn(H, 2)))
def two_columns_of_sinks(q, k, v, sinks):
    joined = torch.cat([_scores(q, k), sinks[None, :, None].expand(B, -1, S, -1)], dim=-1)
    return joined.softmax(-1)[..., :-2] @ v


@near_miss("FF204", "column_of_sinks", inputs=lambda: (*qkv(m=S - 1), torch.randn(H)))
def a_row_of_sinks(q, k, v, sinks):
    joined = torch.cat([_scores(q, k), sinks.view(1, -1, 1, 1).expand(B, -1, 1, S)], dim=-2)
    return joined.softmax(-2)[..., :-1, :] @ v


@near_miss("FF401", "zero_column")
def columns_of_zeros_on_both_sides(q, k, v):
    return F.pad(_scores(q, k), (1, 1)).softmax(-1)[..., 1 : S + 1] @ v


@near_miss("FF401", "softmax_plus_one_with_the_maximum_taken_off")
def one_beside_exponentials_of_another_shift(q, k, v):
    x = _scores(q, k)
    shift = q.mean(-1, keepdim=True)
    e = torch.exp(x - shift)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-shift))) @ v


@near_miss("FF401", "column_of_sinks_in_front", inputs=lambda: (*_with_sinks(), torch.rand(S + 1)))
def weighted_before_the_column_in_front_is_cut_off(q, k, v, sinks, weight):
    joined = torch.cat([_column(sinks), _scores(q, k)], dim=-1)
    return (joined.softmax(-1) * weight)[..., 1:] @ v
