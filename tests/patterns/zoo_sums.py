"""Several softmaxes summed before one product with the value: differential attention and its relatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zoo_entries import B, D, H, S, near_miss, spelling


def _pairs(*factor: int) -> tuple[torch.Tensor, ...]:
    """Two query and key heads a value head of twice the width, and lambda."""
    return torch.randn(B, 2 * H, S, D), torch.randn(B, 2 * H, S, D), torch.randn(B, H, S, 2 * D), torch.rand(factor)


def _causal() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def _halves(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax of the first heads, one of the others."""
    first, second = (a @ b.mT * 0.25 for a, b in zip(q.split(H, dim=1), k.split(H, dim=1), strict=True))
    return first.softmax(-1), second.softmax(-1)


# ------------------------------------------------------------------------------------------------ differential attention


@spelling(inputs=_pairs, gradients=(0, 1, 2, 3), sites=2)
def difference_of_two_softmaxes(q, k, v, factor):
    first, second = _halves(q, k)
    return (first - factor * second) @ v


@spelling(inputs=_pairs, gradients=(0, 1, 2, 3), sites=2, keeps="(n - m) <= 0")
def difference_of_neighbouring_heads(q, k, v, factor):
    scores = (q @ k.mT * 0.25).masked_fill(~_causal(), float("-inf"))
    w = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(q).view(-1, H, 2, S, S)
    return (w[:, :, 0] - (factor.exp() + 0.2) * w[:, :, 1]) @ v


@spelling(inputs=_pairs, gradients=(0, 1, 2, 3), sites=2, keeps="not ((n - m) >= 1)")
def difference_under_a_mask_in_the_dtype_of_the_scores(q, k, v, factor):
    scores = q @ k.mT * 0.25
    later = torch.zeros(S, S, dtype=torch.float64).fill_(float("-inf")).type_as(scores).triu(1)
    w = (scores + later).softmax(-1).view(-1, H, 2, S, S)
    return (w[:, :, 0] - factor * w[:, :, 1]) @ v


@spelling(inputs=lambda: _pairs(H, 1, 1), gradients=(0, 1, 2, 3), sites=2)
def difference_of_parts_with_a_number_a_head(q, k, v, factor):
    first, second = (q @ k.mT * 0.25).view(-1, H, 2, S, S).unbind(2)
    return (first.softmax(-1) - second.softmax(-1) / factor.add(0.5)) @ v


@spelling(inputs=lambda: _pairs(S, 1), gradients=(0, 1, 2, 3), sites=3)
def sum_of_three_softmaxes(q, k, v, factor):
    first, second = _halves(q, k)
    third = (q[:, :H] @ k[:, :H].mT * 0.25).softmax(-1)
    return torch.add(third, second * factor - first, alpha=-0.5) @ v


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF204", "difference_under_a_mask_in_the_dtype_of_the_scores", inputs=_pairs, sites=2)
def difference_under_a_mask_of_the_first_scores(q, k, v, factor):
    scores = q @ k.mT * 0.25
    later = torch.zeros(S, S, dtype=torch.float64).fill_(float("-inf")).triu(1).type_as(scores) + scores[0, 0]
    w = (scores + later).softmax(-1).view(-1, H, 2, S, S)
    return (w[:, :, 0] - factor * w[:, :, 1]) @ v


@near_miss("FF401", "difference_of_two_softmaxes", inputs=_pairs, sites=2)
def size_of_a_difference(q, k, v, factor):
    first, second = _halves(q, k)
    return (first - factor * second).abs() @ v


@near_miss("FF401", "difference_of_two_softmaxes", inputs=_pairs, sites=2)
def difference_chosen_where_it_is_positive(q, k, v, factor):
    first, second = _halves(q, k)
    return torch.where(first > second, first - factor * second, 0.0) @ v


@near_miss("FF401", "difference_of_two_softmaxes", inputs=_pairs, sites=3)
def difference_times_a_term(q, k, v, factor):
    first, second = _halves(q, k)
    return ((first - factor * second) * first) @ v


@near_miss("FF401", "difference_of_two_softmaxes", inputs=_pairs, sites=2)
def difference_with_rows_of_the_other_as_columns(q, k, v, factor):
    first, second = _halves(q, k)
    return (first - factor * second.mT) @ v


@near_miss("FF401", "difference_of_two_softmaxes", inputs=lambda: _pairs(S, S))
def difference_from_a_tensor(q, k, v, factor):
    return (_halves(q, k)[0] - factor) @ v


@near_miss("FF204", "difference_of_neighbouring_heads", inputs=_pairs, sites=2)
def difference_of_overlapping_heads(q, k, v, factor):
    w = (q @ k.mT * 0.25).softmax(-1)
    return (w[:, :-1] - factor * w[:, 1:]) @ v[:, :1]
