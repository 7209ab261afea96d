"""Attention as people write it: one function a spelling, and twins that look alike and must not be fused.

What stands here is about scales, products, layouts and masks; `zoo_softmax` and `zoo_scores` hold the rest.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import zoo_joined
import zoo_layouts
import zoo_scores
import zoo_sinks
import zoo_softmax
import zoo_sums
import zoo_weights
from zoo_entries import NEAR_MISSES, NEG, SPELLINGS, B, D, H, NearMiss, S, Spelling, near_miss, qkv, spelling

__all__ = [
    "NEAR_MISSES", "SPELLINGS", "NearMiss", "Spelling", "qkv",
    "zoo_joined", "zoo_layouts", "zoo_scores", "zoo_sinks", "zoo_softmax", "zoo_sums", "zoo_weights",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ scale in every place


@spelling()
def matmul_div_sqrt(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D), dim=-1), v)


@spelling()
def operators_mul(q, k, v):
    return ((q @ k.mT) * D**-0.5).softmax(-1) @ v


@spelling(score="s")
def no_scale(q, k, v):
    return F.softmax(q @ k.transpose(2, 3), dim=3) @ v


@spelling()
def scaled_query(q, k, v):
    return torch.softmax((q * 0.25) @ k.transpose(-1, -2), -1) @ v


@spelling()
def scaled_query_div(q, k, v):
    return torch.softmax((q / 4.0) @ k.transpose(-1, -2), -1) @ v


@spelling()
def scaled_key(q, k, v):
    return torch.softmax(q @ (0.25 * k).transpose(-1, -2), -1) @ v


@spelling()
def scale_split_over_both(q, k, v):
    return torch.softmax((q * 0.5) @ (k * 0.5).transpose(-1, -2), -1) @ v


@spelling(inputs=lambda: (*qkv(), torch.tensor(4.0)), score="s / c0", rows="exact", gradients=(0, 1, 2, 3))
def tensor_scale_0d(q, k, v, c):
    return torch.softmax(q @ k.mT / c, -1) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(S, S)), score="s * c0[m, n]", rows="exact", gradients=(0, 1, 2, 3))
def tensor_scale_full(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.ones(S, S).tril()),
    score="((s * 0.25) * c0[m, n]) + ((1 - c0[m, n]) * -10000)",
    rows="exact",
)
def scores_times_a_triangle_and_ten_thousand_less(q, k, v, triangle):
    return (q @ k.mT * 0.25 * triangle + -1e4 * (1 - triangle)).softmax(-1) @ v


@spelling(score="-(s * -0.25)")
def negative_then_positive(q, k, v):
    return torch.softmax(-((q @ k.mT) * -0.25), -1) @ v


# ------------------------------------------------------------------------------------------------ products and layouts


def _three_d() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B * H, S, D) for _ in range(3))


@spelling(inputs=_three_d)
def bmm_three_d(q, k, v):
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.25).softmax(-1), v)


@spelling(inputs=_three_d)
def baddbmm_beta_zero(q, k, v):
    scores = torch.baddbmm(torch.empty(B * H, S, S), q, k.transpose(-1, -2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(dim=-1), v)


@spelling(
    inputs=lambda: (*_three_d(), torch.randn(B * H, S, S)),
    score="(s * 0.25) + c0[h, m, n]",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def baddbmm_bias(q, k, v, bias):
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(-1, -2), alpha=0.25).softmax(dim=-1), v)


@spelling(inputs=lambda: tuple(torch.randn(S, D) for _ in range(3)))
def batchless_two_d(q, k, v):
    return torch.mm(torch.softmax(torch.mm(q, k.t()) * 0.25, -1), v)


@spelling(inputs=lambda: tuple(torch.randn(2, 3, B, S, D) for _ in range(3)))
def five_d(q, k, v):
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


@spelling()
def einsum_bhqd(q, k, v):
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.25).softmax(-1), v)


def _bshd() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, S, H, D) for _ in range(3))


@spelling(inputs=_bshd)
def einsum_bshd(q, k, v):
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25).softmax(-1), v)


@spelling(inputs=_bshd)
def einsum_ellipsis(q, k, v):
    return torch.einsum("...hqk,...khd->...qhd", (torch.einsum("...qhd,...khd->...hqk", q, k) * 0.25).softmax(-1), v)


@spelling(inputs=_bshd)
def bshd_key_permuted_at_once(q, k, v):
    scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * 0.25
    return (scores.softmax(-1) @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).contiguous()


@spelling(inputs=lambda: (torch.randn(B, S, 3 * H * D),), gradients=(0,))
def packed_qkv(x):
    q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).reshape(B, S, H * D)


@spelling()
def transposed_scores(q, k, v):
    return torch.softmax(k @ q.mT * 0.25, dim=-2).mT @ v


@spelling(inputs=lambda: qkv(m=S, n=S + 9))
def cross_attention(q, k, v):
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


@spelling(inputs=lambda: qkv(e=40))
def wider_value(q, k, v):
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


@spelling()
def flattened_heads_around_the_softmax(q, k, v):
    scores = (q @ k.mT * 0.25).view(B * H, S, S)
    return torch.bmm(scores.softmax(-1), v.reshape(B * H, S, D)).view(B, H, S, D)


# ------------------------------------------------------------------------------------------------ grouped heads


def _repeat_kv(x: torch.Tensor, repeats: int) -> torch.Tensor:
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, repeats, s, d).reshape(b, g * repeats, s, d)


@spelling(inputs=lambda: qkv(kv_heads=2))
def gqa_repeat_kv(q, k, v):
    k, v = _repeat_kv(k, 2), _repeat_kv(v, 2)
    return (torch.matmul(q, k.transpose(2, 3)) * 0.25).softmax(-1) @ v


@spelling(inputs=lambda: qkv(kv_heads=2))
def gqa_repeat_interleave(q, k, v):
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1)
    return (q @ k.mT * 0.25).softmax(-1) @ v


@spelling(inputs=lambda: qkv(kv_heads=2))
def gqa_five_d(q, k, v):
    q = q.view(B, 2, 2, S, D)
    out = (q @ k[:, :, None].mT * 0.25).softmax(-1) @ v[:, :, None]
    return out.reshape(B, H, S, D)


@spelling(inputs=lambda: qkv(kv_heads=1))
def mqa_broadcast(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ float32 islands, idle dropout


@spelling()
def softmax_in_float32_and_dropout(q, k, v):
    p = F.softmax(q @ k.mT * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(p, p=0.0, training=True) @ v


@spelling()
def dropout_in_eval(q, k, v):
    return F.dropout((q @ k.mT * 0.25).softmax(-1), 0.3, training=False) @ v


@spelling()
def upcast_operands(q, k, v):
    return (q.float() @ k.float().mT * 0.25).softmax(-1).to(v.dtype) @ v


# ------------------------------------------------------------------------------------------------ masks computed in the graph


@spelling(keeps="(n - m) <= 0")
def causal_tril_masked_fill(q, k, v):
    mask = torch.tril(torch.ones(S, S, dtype=torch.bool))
    return (q @ k.mT * 0.25).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@spelling(keeps="(n - m) <= 0")
def causal_tril_equals_zero(q, k, v):
    mask = torch.tril(torch.ones(S, S)).view(1, 1, S, S)
    return (q @ k.mT * 0.25).masked_fill(mask[:, :, :S, :S] == 0, float("-inf")).softmax(-1) @ v


@spelling(keeps="not ((n - m) >= 1)")
def causal_triu_additive(q, k, v):
    mask = torch.triu(torch.full((S, S), float("-inf")), diagonal=1)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


@spelling(keeps="m >= n")
def causal_where_arange(q, k, v):
    i = torch.arange(S)
    return torch.where(i[:, None] >= i[None, :], q @ k.mT * 0.25, -float("inf")).softmax(-1) @ v


@spelling(keeps="n <= m")
def causal_additive_finfo_min(q, k, v):
    i = torch.arange(S)
    mask = torch.where(i[None, :] <= i[:, None], 0.0, NEG)[None, None].expand(B, 1, S, S)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


@spelling(keeps="n <= m")
def causal_additive_dynamic(q, k, v):
    i, j = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    mask = torch.where(j[None, :] <= i[:, None], 0.0, torch.finfo(q.dtype).min)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


@spelling(keeps="(n - m) <= 0")
def causal_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.25
    scores.masked_fill_(torch.tril(torch.ones(S, S, dtype=torch.bool)).logical_not(), float("-inf"))
    return scores.softmax(-1) @ v


@spelling(inputs=lambda: qkv(m=S, n=S + 5), keeps="n <= (m + 5)", rows="impossible")
def causal_aligned_to_the_end(q, k, v):
    rows, columns = torch.arange(S) + 5, torch.arange(S + 5)
    return torch.where(columns[None] <= rows[:, None], q @ k.mT * 0.25, float("-inf")).softmax(-1) @ v


@spelling(keeps="((m - n) >= 0) and ((m - n) < 7)")
def sliding_window(q, k, v):
    i = torch.arange(S)
    distance = i[:, None] - i[None, :]
    keep = (distance >= 0) & (distance < 7)
    return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling(keeps="(n <= m) or (n < 5)")
def prefix_lm(q, k, v):
    i = torch.arange(S)
    keep = (i[None, :] <= i[:, None]) | (i[None, :] < 5)
    return torch.where(keep, q @ k.mT * 0.25, float("-inf")).softmax(-1) @ v


def _padding() -> torch.Tensor:
    return torch.arange(S)[None, :] < torch.tensor([S, S - 7])[:, None]


@spelling(inputs=lambda: (*qkv(), _padding()), keeps="c0[b, n]", rows="exact")
def padding_masked_fill(q, k, v, keep):
    return (q @ k.mT * 0.25).masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), _padding().flip(1)), keeps="(n <= m) and c0[b, n]", rows="exact")
def left_padding_and_causal_finite(q, k, v, keep):
    i = torch.arange(S)
    keep = (i[None, :] <= i[:, None])[None, None] & keep[:, None, None, :]
    return (q @ k.mT * 0.25 + torch.where(keep, 0.0, NEG)).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.tensor([S, S - 7])), keeps="n < c0[b]", rows="exact")
def padding_by_length(q, k, v, lengths):
    keep = torch.arange(S)[None, :] < lengths[:, None]
    return torch.where(keep[:, None, None, :], q @ k.mT * 0.25, float("-inf")).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 9 + [2] * 12])),
    keeps="(c0[b, m] == c0[b, n]) and (n <= m)",
)
def packed_documents(q, k, v, ids):
    i = torch.arange(S)
    keep = (ids[:, None, :, None] == ids[:, None, None, :]) & (i[None, :] <= i[:, None])
    return (q @ k.mT * 0.25).masked_fill(keep.logical_not(), float("-inf")).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ masks and biases handed in


@spelling(
    inputs=lambda: (*qkv(), torch.randn(1, 1, S, S)),
    score="(s * 0.25) + c0[0, 0, m, n]",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def additive_bias(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(H, S, S)),
    score="c0[h, m, n] + (s * 0.25)",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def additive_bias_commuted(q, k, v, bias):
    return (bias + q @ k.mT * 0.25).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(B, 1, S, S) > 0.3), keeps="c0[b, 0, m, n]", rows="exact")
def boolean_mask_handed_in(q, k, v, mask):
    return torch.where(mask, q @ k.mT * 0.25, -1e9).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(B, 1, 1, S) * -20), score="(s * 0.25) + c0[b, 0, 0, n]", rows="exact")
def key_bias_handed_in(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


@spelling(score="(s * 0.25) + (-10000 if (n > 11) else 0)", rows="exact")
def ten_thousand_is_an_ordinary_number(q, k, v):
    return (q @ k.mT * 0.25 + torch.where(torch.arange(S) > 11, -10000.0, 0.0)).softmax(-1) @ v


@spelling(keeps="(not (n > m)) and (n < 20)")
def two_masks(q, k, v):
    i = torch.arange(S)
    scores = (q @ k.mT * 0.25).masked_fill(i[None] > i[:, None], float("-inf"))
    return (scores + torch.where(i < 20, 0.0, float("-inf"))).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ modules and calls


@spelling(inputs=lambda: (*qkv(), _padding()), keeps="c0[b, n]", rows="zero")
def sdpa_padding(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])


@spelling(keeps="|m - n| < 6", rows="zero")
def sdpa_band(q, k, v):
    i = torch.arange(S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] - i[None]).abs() < 6)


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF202", "matmul_div_sqrt")
def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, dim=-2) @ v


@near_miss("FF202", "matmul_div_sqrt", inputs=lambda: tuple(torch.randn(S, S, S, S) for _ in range(3)))
def softmax_over_heads(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, dim=1) @ v


@near_miss("FF203", "bshd_key_permuted_at_once", inputs=lambda: tuple(torch.randn(1, S, S, D) for _ in range(3)))
def key_with_heads_and_keys_swapped(q, k, v):
    return (q @ k.permute(0, 2, 3, 1) * 0.25).softmax(-1) @ v


@near_miss("FF203", "bmm_three_d", inputs=lambda: tuple(torch.randn(S, S, D) for _ in range(3)))
def key_with_batch_and_keys_swapped(q, k, v):
    return torch.bmm(torch.bmm(q, k.permute(1, 2, 0)).softmax(-1), v)


@near_miss("FF303", "operators_mul")
def key_written_in_between(q, k, v):
    k = k.tanh()
    p = (q @ k.mT * 0.25).softmax(-1)
    k.mul_(2.0)
    return p @ v + k.sum()


@near_miss("FF303", "operators_mul")
def query_input_written_in_between(q, k, v):
    p = (q @ k.mT * 0.25).softmax(-1)
    q.add_(1.0)
    return p @ v


@near_miss("FF303", "tensor_scale_full", inputs=lambda: (*qkv(), torch.rand(S, S)))
def scale_written_in_between(q, k, v, scale):
    p = (q @ k.mT * scale).softmax(-1)
    scale.zero_()
    return p @ v


@near_miss("FF206", "upcast_operands", inputs=lambda: (qkv()[0].bfloat16(), *qkv()[1:]))
def operands_of_mixed_dtype(q, k, v):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return (torch.einsum("bhmd,bhnd->bhmn", q.to(k.dtype) * 0.25, k)).softmax(-1).to(torch.float64) @ v.double()


@near_miss("FF206", "operators_mul", inputs=lambda: tuple(t.double() for t in qkv()))
def double_precision(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


@near_miss("FF206", "operators_mul", inputs=lambda: tuple(torch.randint(-2, 3, (B, H, S, D)) for _ in range(3)))
def integer_inputs(q, k, v):
    return (q @ k.mT).softmax(-1, dtype=torch.float32) @ v.float()


@near_miss("FF401", "causal_where_arange")
def cumulative_sum_of_scores(q, k, v):
    return (q @ k.mT * 0.25).cumsum(-1).softmax(-1) @ v


@near_miss("FF401", "operators_mul")
def probabilities_squared(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1).square() @ v


@near_miss("FF401", "sliding_window")
def probabilities_accumulated(q, k, v):
    position = torch.arange(0.5, S + 0.5)
    return torch.where(position[None] <= position[:, None], q @ k.mT, -1e9).softmax(-1).cumprod(-1) @ v


@near_miss("FF102", "sdpa_padding")
def sdpa_plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
