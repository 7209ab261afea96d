"""Every form of softmax: written out by hand, normalised late, in the logarithm, in other dtypes, also wanted elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zoo_entries import B, D, H, S, near_miss, qkv, spelling


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * 0.25


def _causal() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


# ------------------------------------------------------------------------------------------------ written out


@spelling()
def exp_over_sum_with_amax(q, k, v):
    x = _scores(q, k)
    e = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@spelling()
def exp_over_sum_with_max_values(q, k, v):
    x = _scores(q, k)
    e = (x - x.max(-1, keepdim=True).values.detach()).exp()
    return torch.matmul(e / torch.sum(e, -1, True), v)


@spelling()
def exp_over_sum_with_max_unsqueezed(q, k, v):
    x = _scores(q, k)
    e = (x - torch.max(x, dim=3)[0][..., None]).exp()
    return (e / e.sum(-1)[:, :, :, None]) @ v


@spelling()
def exp_over_sum_without_max(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling()
def exp_times_reciprocal_of_sum(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e.sum(-1, keepdim=True).reciprocal() * e) @ v


@spelling()
def exp_times_one_over_sum(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e * (1.0 / e.sum(-1, keepdim=True))) @ v


@spelling()
def exp_in_place(q, k, v):
    x = _scores(q, k)
    x = x - x.amax(-1, keepdim=True)
    e = x.exp_()
    return e.div(e.sum(-1, keepdim=True)) @ v


@spelling(keeps="(n - m) <= 0")
def exp_over_sum_causal(q, k, v):
    x = _scores(q, k).masked_fill(~_causal(), float("-inf"))
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(keeps="(n - m) <= 0")
def exponentials_masked_to_zero(q, k, v):
    e = torch.exp(_scores(q, k)).masked_fill(~_causal(), 0.0)
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(keeps="(n - m) <= 0")
def exponentials_times_mask(q, k, v):
    e = torch.exp(_scores(q, k)) * _causal()
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(keeps="(n - m) <= 0")
def exponentials_chosen(q, k, v):
    x = _scores(q, k)
    e = torch.where(_causal(), (x - x.amax(-1, keepdim=True)).exp(), 0.0)
    return (e / e.sum(-1, keepdim=True)) @ v


# ------------------------------------------------------------------------------------------------ normalised late


@spelling()
def late_normalisation(q, k, v):
    x = _scores(q, k)
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@spelling(keeps="(n - m) <= 0")
def late_normalisation_causal_einsum(q, k, v):
    e = torch.exp(_scores(q, k).masked_fill(_causal().logical_not(), float("-inf")))
    return torch.einsum("bhqk,bhkd->bhqd", e, v) / e.sum(-1).unsqueeze(-1)


@spelling(inputs=lambda: tuple(torch.randn(B, S, H, D) for _ in range(3)))
def late_normalisation_transposed(q, k, v):
    e = torch.exp(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25)
    return torch.einsum("bhqk,bkhd->bqhd", e, v) / e.sum(-1).transpose(1, 2)[..., None]


# ------------------------------------------------------------------------------------------------ in the logarithm


@spelling()
def log_softmax_exp(q, k, v):
    return F.log_softmax(_scores(q, k), dim=-1).exp() @ v


@spelling()
def exp_of_difference_with_logsumexp(q, k, v):
    x = _scores(q, k)
    return torch.exp(x - torch.logsumexp(x, dim=-1, keepdim=True)) @ v


# ------------------------------------------------------------------------------------------------ around a softmax


@spelling()
def maximum_subtracted_before_softmax(q, k, v):
    x = _scores(q, k)
    return torch.softmax(x - x.max(dim=-1, keepdim=True)[0], dim=-1) @ v


@spelling()
def maximum_detached_before_softmax(q, k, v):
    x = _scores(q, k)
    return torch.softmax(x - x.detach().amax(-1, keepdim=True), dim=-1) @ v


@spelling()
def global_maximum_before_softmax(q, k, v):
    x = _scores(q, k)
    return torch.softmax(x - x.max(), dim=-1) @ v


@spelling(score="s * 0.25")
def cogview_scaling(q, k, v):
    scaled = (q / 4.0) @ k.mT / 32.0
    return torch.softmax((scaled - scaled.amax(-1).unsqueeze(-1)) * 32.0, dim=-1) @ v


@spelling()
def special_softmax(q, k, v):
    return torch.special.softmax(_scores(q, k), -1) @ v


@spelling()
def softmax_module(q, k, v):
    return torch.nn.Softmax(dim=3)(_scores(q, k)) @ v


@spelling(exact=softmax_module)
def half_island(q, k, v):
    return _scores(q, k).half().softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(B, 1, S, S) > 0.5), keeps="c0[b, 0, m, n]", rows="zero")
def nan_to_num_after_softmax(q, k, v, keep):
    p = _scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1)
    return torch.nan_to_num(p, nan=0.0) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(B, 1, S, S) > 0.5), keeps="c0[b, 0, m, n]", rows="zero")
def nan_filled_after_softmax(q, k, v, keep):
    p = torch.where(keep, _scores(q, k), float("-inf")).softmax(-1)
    return p.masked_fill(p.isnan(), 0.0) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(B, 1, S, S) > 0.5), keeps="c0[b, 0, m, n]", rows="exact")
def nan_to_num_where_nothing_is_nan(q, k, v, keep):
    return _scores(q, k).masked_fill(~keep, -1e30).softmax(-1).nan_to_num() @ v


# ------------------------------------------------------------------------------------------------ also wanted elsewhere


@spelling()
def probabilities_used_elsewhere(q, k, v):
    p = _scores(q, k).softmax(-1)
    return p @ v + p.square().sum()


@spelling()
def scores_used_elsewhere(q, k, v):
    x = _scores(q, k)
    return x.softmax(-1) @ v + x.sigmoid().mean()


@spelling(score="(s * 0.25) - c0[b, h, 0, n]", rows="exact")
def maximum_over_queries_does_not_cancel(q, k, v):
    x = _scores(q, k)
    return torch.softmax(x - x.amax(dim=-2, keepdim=True), dim=-1) @ v


@spelling(score="(s * 0.25) - c0[b, h, m, 0]", rows="exact")
def maximum_of_something_else_is_no_maximum(q, k, v):
    x = _scores(q, k)
    return torch.softmax(x - x.tanh().amax(-1, keepdim=True), dim=-1) @ v


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF202", "exp_over_sum_with_amax")
def normalised_over_queries_by_hand(q, k, v):
    x = _scores(q, k)
    e = torch.exp(x - x.amax(dim=-1, keepdim=True))
    return (e / e.sum(dim=-2, keepdim=True)) @ v


@near_miss("FF202", "exp_over_sum_with_max_unsqueezed")
def sums_of_other_rows(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e / e.sum(-1)[:, :, None, :]) @ v


@near_miss("FF402", "exponentials_masked_to_zero")
def exponentials_masked_to_one(q, k, v):
    e = torch.exp(_scores(q, k)).masked_fill(~_causal(), 1.0)
    return (e / e.sum(-1, keepdim=True)) @ v


@near_miss("FF402", "exponentials_times_mask", inputs=lambda: (*qkv(), torch.rand(S, S)))
def exponentials_times_weights(q, k, v, weights):
    e = torch.exp(_scores(q, k)) * weights
    return (e / e.sum(-1, keepdim=True)) @ v


@near_miss("FF202", "late_normalisation")
def late_normalisation_by_columns(q, k, v):
    e = torch.exp(_scores(q, k))
    return (e @ v) / e.sum(-2).unsqueeze(-1)


@near_miss("FF202", "log_softmax_exp")
def log_softmax_over_queries(q, k, v):
    return F.log_softmax(_scores(q, k), dim=-2).exp() @ v


@near_miss("FF402", "nan_to_num_after_softmax", inputs=lambda: (*qkv(), torch.randn(S, S)))
def nan_to_num_with_a_bias_handed_in(q, k, v, bias):
    return (_scores(q, k) + bias).softmax(-1).nan_to_num(0.0) @ v


@near_miss("FF401", "nan_to_num_after_softmax")
def nan_to_one(q, k, v):
    return _scores(q, k).softmax(-1).nan_to_num(1.0) @ v
