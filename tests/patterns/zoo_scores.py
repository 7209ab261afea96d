"""What people do to scores: functions of them, biases of every kind, several products in one sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from zoo_entries import B, D, H, S, near_miss, qkv, spelling


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * 0.25


# ------------------------------------------------------------------------------------------------ functions of the score


@spelling(score="tanh(s * 0.00833333) * 30")
def softcap(q, k, v):
    return (torch.tanh(_scores(q, k) / 30.0) * 30.0).softmax(-1) @ v


@spelling(score="((s * 0.25) if ((s * 0.25) > 0) else 0)")
def relu_of_scores(q, k, v):
    return F.relu(_scores(q, k)).softmax(-1) @ v


@spelling(score="(s * 0.125) * (erf(s * 0.176777) + 1)")
def gelu_of_scores(q, k, v):
    return F.gelu(_scores(q, k)).softmax(-1) @ v


@spelling(score="(s * 0.125) * (tanh(((s * 0.25) + ((((s * 0.25) * (s * 0.25)) * (s * 0.25)) * 0.044715)) * 0.797885) + 1)")
def gelu_by_tanh_of_scores(q, k, v):
    return F.gelu(_scores(q, k), approximate="tanh").softmax(-1) @ v


@spelling(score="(s * 0.25) * sigmoid(s * 0.25)")
def silu_of_scores(q, k, v):
    return F.silu(_scores(q, k)).softmax(-1) @ v


@spelling(score="max(s * 0.25, 0) + log(exp(-|s * 0.25|) + 1)", rows="exact")
def softplus_of_scores(q, k, v):
    return F.softplus(_scores(q, k)).softmax(-1) @ v


@spelling(score="-(max(-(s * 0.25), 0) + log(exp(-|-(s * 0.25)|) + 1))", rows="exact")
def log_sigmoid_of_scores(q, k, v):
    return F.logsigmoid(_scores(q, k)).softmax(-1) @ v


@spelling(score="((s * 0.25) if ((s * 0.25) > 0) else (s * 0.05))")
def leaky_relu_of_scores(q, k, v):
    return F.leaky_relu(_scores(q, k), 0.2).softmax(-1) @ v


@spelling(score="((s * 0.25) if ((s * 0.25) > 0) else (exp((0 if ((s * 0.25) > 0) else (s * 0.25))) - 1))", rows="exact")
def elu_of_scores(q, k, v):
    return F.elu(_scores(q, k)).softmax(-1) @ v


@spelling(score="(-1 if ((s * 0.25) <= -1) else (1 if ((s * 0.25) >= 1) else (s * 0.25)))")
def hardtanh_of_scores(q, k, v):
    return F.hardtanh(_scores(q, k)).softmax(-1) @ v


@spelling(score="(s * 0.25) * (s * 0.25)", rows="exact")
def squared_scores(q, k, v):
    return (_scores(q, k) ** 2).softmax(-1) @ v


@spelling(score="sqrt(|s * 0.25| + 1)")
def root_of_scores(q, k, v):
    return (_scores(q, k).abs() + 1.0).pow(0.5).softmax(-1) @ v


@spelling(score="sin(s * 0.25) + cos(s * 0.25)")
def sine_and_cosine_of_scores(q, k, v):
    x = _scores(q, k)
    return (torch.sin(x) + torch.cos(x)).softmax(-1) @ v


@spelling(score="(1 if ((s * 0.25) > 0) else (-1 if ((s * 0.25) < 0) else 0)) * log(|s * 0.25| + 1)", rows="exact")
def signed_logarithm_of_scores(q, k, v):
    x = _scores(q, k)
    return (x.sign() * x.abs().log1p()).softmax(-1) @ v


@spelling(score="exp(s * 0.173287) - (exp(s * 0.25) - 1)", rows="exact")
def powers_of_two_of_scores(q, k, v):
    x = _scores(q, k)
    return (x.exp2() - x.expm1()).softmax(-1) @ v


@spelling(score="min(max(s * 0.25, -1), 1)")
def clipped_scores(q, k, v):
    return torch.clip(_scores(q, k), -1.0, 1.0).softmax(-1) @ v


@spelling(score="max(s * 0.25, -0.5)")
def maximum_with_a_tensor(q, k, v):
    return torch.maximum(_scores(q, k), torch.tensor(-0.5)).softmax(-1) @ v


@spelling(score="((s * 0.25) if ((s * 0.25) > 0) else (s * 0.025))")
def choice_by_the_score(q, k, v):
    x = _scores(q, k)
    return torch.where(x > 0, x, 0.1 * x).softmax(-1) @ v


@spelling()
def operations_by_other_names(q, k, v):
    return torch.special.softmax(torch.true_divide(torch.multiply(q @ k.mT, 2.0), 8.0), -1) @ v


# ------------------------------------------------------------------------------------------------ biases


def _distance() -> torch.Tensor:
    return torch.arange(S)[None, :] - torch.arange(S)[:, None]


@spelling(score="(s * 0.25) + (c0[h] * (n - m))", rows="exact")
def alibi_with_slopes_written_down(q, k, v):
    slopes = torch.tensor([2 ** (-8 * (head + 1) / H) for head in range(H)])
    return (_scores(q, k) + slopes[:, None, None] * _distance()).softmax(-1) @ v


@spelling(score="(s * 0.25) - (c0[h] * |n - m|)", rows="exact")
def alibi_with_slopes_computed(q, k, v):
    slopes = torch.pow(2, -torch.arange(1, H + 1) * 8 / H)
    return (_scores(q, k) - slopes.view(1, H, 1, 1) * _distance().abs()).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(H)), score="(s * 0.25) + c0[0, h, 0, n]", rows="exact", gradients=(0, 1, 2, 3))
def alibi_by_key_position(q, k, v, slopes):
    return (_scores(q, k) + slopes[None, :, None, None] * torch.arange(S)[None, None, None]).softmax(-1) @ v


def _t5_bucket() -> torch.Tensor:
    n = -torch.min(_distance(), torch.zeros_like(_distance()))
    large = 8 + (torch.log(n.float() / 8) / math.log(16) * 8).to(torch.long)
    return torch.where(n < 8, n, torch.min(large, torch.full_like(large, 15)))


@spelling(
    inputs=lambda: (*qkv(), torch.randn(16, H)), score="s + c0[h, (n - m) + (M - 1)]", rows="exact", gradients=(0, 1, 2, 3)
)
def t5_bias(q, k, v, table):
    bias = F.embedding(_t5_bucket(), table).permute([2, 0, 1]).unsqueeze(0)
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.randn(16, H)), score="s + c0[m, n, h]", rows="exact", gradients=(0, 1, 2, 3))
def t5_bias_with_a_bucket_that_learns_nothing(q, k, v, table):
    bias = F.embedding(_t5_bucket(), table, padding_idx=3).permute([2, 0, 1]).unsqueeze(0)
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(2 * S - 1)), score="(s * 0.25) + (c0[(n - m) + (M - 1)] * 2)", rows="exact",
    gradients=(0, 1, 2, 3),
)  # fmt: skip
def bias_by_distance(q, k, v, table):
    return (_scores(q, k) + 2.0 * table[_distance() + S - 1]).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.randn(2 * S)), score="(s * 0.25) + c0[m + n]", rows="exact", gradients=(0, 1, 2, 3))
def bias_by_the_sum_of_positions(q, k, v, table):
    position = torch.arange(S)
    return (_scores(q, k) + table[position[:, None] + position]).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(50, H), torch.randint(0, 50, (S, S))),
    score="(s * 0.25) + c1[((c0[m, n] + 50) if (c0[m, n] < 0) else c0[m, n]), h]", rows="exact", gradients=(0, 1, 2, 3),
)  # fmt: skip
def swin_bias(q, k, v, table, index):
    bias = table[index.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous()
    return ((q * 0.25) @ k.mT + bias.unsqueeze(0)).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.where(torch.rand(B, S, S) > 0.5, -100.0, 0.0)), score="(s * 0.25) + c0[b, m, n]", rows="exact"
)
def swin_mask_of_windows(q, k, v, mask):
    x = ((q * 0.25) @ k.mT).view(1, B, H, S, S) + mask.unsqueeze(1).unsqueeze(0)
    return x.view(-1, H, S, S).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(H, 1, 1), torch.randn(H, S, S)),
    score="(s * c0[h, 0, 0]) + (sigmoid(c1[h, m, n]) * 16)",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def swin_v2_cosine_attention(q, k, v, logit_scale, bias):
    x = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    x = x * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    return (x + 16 * torch.sigmoid(bias)).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(B, H, S, S)),
    score="(s * 0.25) + c0[b, h, m, n]",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def bias_scaled_in_place(q, k, v, bias):
    """As in Funnel. The tensor before the write is gone, so the one after it is captured."""
    bias = bias.cumsum(-2)
    bias *= torch.linspace(0.5, 1.5, bias.shape[-1], dtype=bias.dtype)
    return (_scores(q, k) + bias).softmax(-1) @ v


@near_miss("FF303", "bias_scaled_in_place", inputs=lambda: (*qkv(), torch.randn(B, H, S, S)))
def bias_scaled_in_place_too_late(q, k, v, bias):
    p = (_scores(q, k) + bias).softmax(-1)
    bias *= 2.0
    return p @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(2, D), torch.randn(S)),
    score="(s * 0.25) + (c0[b, h, m, 0] * c1[n])",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def bias_of_two_parts_where_one_is_chosen(q, k, v, table, slopes):
    """The other part is read by nobody in the end, so it is no input of the attention."""
    differs, equals = torch.einsum("bhmd,sd->bhms", q, table).split(1, dim=-1)
    same = torch.ones(S, S, dtype=torch.bool)
    bias = torch.where(same, equals.expand(B, H, S, S), differs.expand(B, H, S, S)) * slopes
    return (_scores(q, k) + bias).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(2, D), torch.rand(S, S) > 0.5),
    score="(s * 0.25) + (c1[b, h, m, 0] if c0[m, n] else c2[b, h, m, 0])",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def bias_of_two_parts(q, k, v, table, same):
    """As Funnel's token types: the parts of one product are chosen by the query's and the key's kind."""
    differs, equals = torch.einsum("bhmd,sd->bhms", q, table).split(1, dim=-1)
    return (_scores(q, k) + torch.where(same, equals.expand(B, H, S, S), differs.expand(B, H, S, S))).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(H, S, S), torch.randn(B, 1, 1, S)),
    score="((s * 0.25) + c0[h, m, n]) + c1[b, 0, 0, n]",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def two_biases(q, k, v, one, other):
    return (_scores(q, k) + one + other).softmax(-1) @ v


def _evoformer() -> tuple[torch.Tensor, ...]:
    return (*(torch.randn(2, 3, H, S, D) for _ in range(3)), torch.randn(2, 1, H, S, S), torch.randn(2, 3, 1, 1, S))


@spelling(
    inputs=_evoformer,
    score="((s * 0.25) + c0[b // 3, b % 3, 0, 0, n]) + c1[b // 3, 0, h, m, n]",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def evoformer_row_attention(q, k, v, pair, mask):
    return (torch.einsum("brhqd,brhkd->brhqk", q * 0.25, k) + mask + pair).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(S, S), torch.randn(H, 1, 1)),
    score="(s * 0.25) + ((c0[m, n] * c1[h, 0, 0]) * 0.5)",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def product_of_biases_added(q, k, v, one, other):
    return torch.addcmul(_scores(q, k), one, other, value=0.5).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ several products


@spelling(
    inputs=lambda: (*qkv(), torch.randn(B, H, S, 8), torch.randn(B, 1, S, 8)),
    score="s * 0.2", gradients=(0, 1, 3, 4),
)  # fmt: skip
def two_products_of_query_and_key(q, k, v, q_rotated, k_rotated):
    return ((q @ k.mT + q_rotated @ k_rotated.mT) * 0.2).softmax(-1) @ v


@spelling(inputs=qkv, score="s")
def product_with_query_and_key_swapped(q, k, v):
    return (q @ k.mT + k @ q.mT).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(2 * S - 1, D)),
    score="(s + (c0[b, h, m, n] + c1[b, h, m, n])) * 0.25",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def relative_key_query(q, k, v, table):
    positions = F.embedding(_distance() + S - 1, table)
    relative = torch.einsum("bhld,lrd->bhlr", q, positions) + torch.einsum("bhrd,lrd->bhlr", k, positions)
    return ((q @ k.mT + relative) / math.sqrt(D)).softmax(-1) @ v


_SHIFTED = "((((((m * 47) + n) // 24) + 1) * 24) + (((m * 47) + n) % 24))"


def _transformer_xl() -> tuple[torch.Tensor, ...]:
    return (*qkv(), torch.randn(H, 2 * S - 1, D), torch.randn(H, 1, D), torch.randn(H, 1, D))


@spelling(
    inputs=_transformer_xl,
    score=f"(s + c0[b, h, {_SHIFTED} // 48, {_SHIFTED} % 48]) * 0.25",
    rows="exact",
    gradients=(0, 1, 2, 3),
)
def transformer_xl_shift(q, k, v, positions, u, w):
    content, place = (q + u) @ k.mT, (q + w) @ positions.mT
    place = F.pad(place, (1, 0)).view(B, H, -1, S)[:, :, 1:].view(B, H, S, 2 * S - 1)[..., :S]
    return ((content + place) * 0.25).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randn(H, 20, D), torch.randint(0, 20, (1, 1, S, S))),
    score="(s + c0[b, h, m, n]) * 0.144338", rows="exact", gradients=(0, 1, 2, 3),
)  # fmt: skip
def deberta_content_to_position(q, k, v, positions, index):
    place = torch.gather(q @ positions.mT, -1, index.expand(B, H, S, S))
    return ((q @ k.mT + place) / math.sqrt(3 * D)).softmax(-1) @ v


def _sam() -> tuple[torch.Tensor, ...]:
    return (*(torch.randn(B * H, S, D) for _ in range(3)), torch.randn(4, 4, D), torch.randn(6, 6, D))


def _decomposed(q: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = q.reshape(-1, 4, 6, D)
    by_row, by_column = torch.einsum("bhwc,hkc->bhwk", q, rows), torch.einsum("bhwc,wkc->bhwk", q, columns)
    return by_row[:, :, :, :, None], by_column[:, :, :, None, :]


@spelling(
    inputs=_sam,
    score="((s * 0.25) + c0[h, m // 6, m % 6, n // 6]) + c1[h, m // 6, m % 6, n % 6]",
    rows="exact",
    gradients=(0, 1, 2, 3, 4),
)
def sam_decomposed_positions(q, k, v, rows, columns):
    by_row, by_column = _decomposed(q, rows, columns)
    x = (((q * 0.25) @ k.mT).view(-1, 4, 6, 4, 6) + by_row + by_column).view(-1, S, S)
    return x.softmax(-1) @ v


@spelling(
    inputs=_sam,
    score="(s * 0.25) + (c0[h, m // 6, m % 6, n // 6] + c1[h, m // 6, m % 6, n % 6])",
    rows="exact",
    gradients=(0, 1, 2, 3, 4),
)
def sam_decomposed_positions_in_one_tensor(q, k, v, rows, columns):
    by_row, by_column = _decomposed(q, rows, columns)
    x = (q * 0.25) @ k.mT
    return (x + (by_row + by_column).reshape_as(x)).softmax(-1) @ v


@spelling(
    inputs=_sam,
    score="((s * 0.25) + c0[h, m // 6, m % 6, n // 6]) + c1[h, m // 6, m % 6, n % 6]",
    rows="exact",
    gradients=(0, 1, 2, 3, 4),
)
def decomposed_positions_written_over_the_scores(q, k, v, rows, columns):
    """timm's MViTv2 without a class token."""
    by_row, by_column = _decomposed(q, rows, columns)
    x = (q * 0.25) @ k.mT
    x[:, 0:, 0:] = (x[:, 0:, 0:].view(-1, 4, 6, 4, 6) + by_row + by_column).view(-1, S, S)
    return x.softmax(-1) @ v


@spelling(score="tanh(s * 0.25)")
def scores_copied_over_themselves(q, k, v):
    x = q @ k.mT * 0.25
    x.copy_(x.tanh())
    return x.softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF204", "decomposed_positions_written_over_the_scores", inputs=_sam)
def positions_written_over_a_part_of_the_scores(q, k, v, rows, columns):
    """MViTv2 with a class token."""
    by_row, by_column = _decomposed(q[:, 1:7].repeat(1, 4, 1), rows, columns)
    bias = (by_row + by_column).reshape(-1, S, S)[:, 1:, 1:]
    x = (q * 0.25) @ k.mT
    x[:, 1:, 1:] = x[:, 1:, 1:] + bias
    return x.softmax(-1) @ v


@near_miss("FF204", "decomposed_positions_written_over_the_scores", inputs=_sam)
def positions_written_over_every_other_key(q, k, v, rows, columns):
    x = (q * 0.25) @ k.mT
    x[..., ::2] = x[..., ::2] * 2.0
    return x.softmax(-1) @ v


@near_miss("FF401", "scores_copied_over_themselves")
def scores_copied_over_themselves_backwards(q, k, v):
    x = q @ k.mT * 0.25
    x.copy_(x.tanh().flip(-1))
    return x.softmax(-1) @ v


@near_miss("FF204", "scores_copied_over_themselves")
def scores_copied_over_their_transpose(q, k, v):
    x = q @ k.mT * 0.25
    x.copy_(x.tanh() + x.mT)
    return x.softmax(-1) @ v


@near_miss("FF402", "squared_scores")
def power_that_is_no_known_one(q, k, v):
    return (_scores(q, k).abs() ** 1.7).softmax(-1) @ v


@near_miss("FF401", "relu_of_scores")
def sorted_scores(q, k, v):
    return _scores(q, k).sort(-1).values.softmax(-1) @ v


@near_miss("FF401", "clipped_scores")
def scores_rolled(q, k, v):
    return _scores(q, k).roll(1, -1).softmax(-1) @ v


@near_miss("FF402", "softplus_of_scores")
def softplus_with_a_low_threshold(q, k, v):
    return F.softplus(_scores(q, k), threshold=0.5).softmax(-1) @ v


@near_miss("FF204", "two_biases")
def scores_and_their_transpose(q, k, v):
    x = q @ k.mT * 0.25
    return (x + x.mT).softmax(-1) @ v


@near_miss("FF403", "two_products_of_query_and_key", inputs=lambda: (*qkv(), torch.randn(H, H)))
def talking_heads(q, k, v, mix):
    return torch.einsum("bhij,hk->bkij", _scores(q, k), mix).softmax(-1) @ v


@near_miss("FF201", "softcap", inputs=lambda: qkv(n=1))
def a_single_key(q, k, v):
    return (q @ k.mT).softmax(-1) @ v
