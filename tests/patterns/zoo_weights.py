"""What people do to the probabilities after the softmax: dropout, masks, factors. Dropout drops nothing here, so that values
can be compared; `tests/flashfuse/test_dropout.py` is about what it drops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zoo_entries import B, H, S, near_miss, qkv, spelling

RATE = 1e-12
DROPPED = "p * (0 if (random_bits(c0) < 0) else 1)"


def _probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1)


def _causal() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def _padding() -> torch.Tensor:
    return torch.arange(S)[None, :] < torch.tensor([S, S - 7])[:, None]


def _empty() -> torch.Tensor:
    """Padding, whole of one batch."""
    return torch.arange(S)[None, :] < torch.tensor([0, S - 7])[:, None]


# ------------------------------------------------------------------------------------------------ dropout


@spelling(weight=DROPPED)
def dropout_in_training(q, k, v):
    return F.dropout(_probabilities(q, k), RATE, training=True) @ v


@spelling(weight=DROPPED)
def dropout_after_a_float32_island(q, k, v):
    p = F.softmax(q @ k.mT * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.dropout(p, RATE, True) @ v


@spelling(weight=DROPPED)
def dropout_before_a_cast(q, k, v):
    return F.dropout(F.softmax((q @ k.mT * 0.25).float(), dim=-1), RATE, True).type_as(q) @ v


@spelling(weight=DROPPED, keeps="(n - m) <= 0")
def dropout_of_causal_attention(q, k, v):
    p = (q @ k.mT * 0.25).masked_fill(~_causal(), float("-inf")).softmax(-1)
    return F.dropout(p, RATE, True) @ v


@spelling(weight=DROPPED, inputs=lambda: tuple(torch.randn(B, S, H, 16) for _ in range(3)))
def dropout_of_permuted_probabilities(q, k, v):
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25).softmax(-1).permute(0, 2, 1, 3)
    return torch.einsum("bqhk,bkhd->bqhd", F.dropout(p, RATE, True), v)


@spelling(weight="p * 0")
def dropout_of_everything(q, k, v):
    return F.dropout(_probabilities(q, k), 1.0, training=True) @ v


@spelling(inputs=lambda: (*qkv(), _padding()), keeps="c0[b, n]", rows="zero", weight="p * (0 if (random_bits(c1) < 0) else 1)")
def sdpa_with_dropout(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], dropout_p=RATE)


# ------------------------------------------------------------------------------------------------ masks


@spelling(weight="p * (1 if ((n - m) <= 0) else 0)")
def causal_mask_multiplied_afterwards(q, k, v):
    return (_probabilities(q, k) * torch.tril(torch.ones(S, S))) @ v


@spelling(weight="(p if ((n - m) <= 0) else 0)")
def lower_triangle_of_probabilities(q, k, v):
    return torch.tril(_probabilities(q, k)) @ v


@spelling(inputs=lambda: (*qkv(), _padding()), weight="p * (1 if c0[b, n] else 0)")
def padding_multiplied_afterwards(q, k, v, keep):
    return (_probabilities(q, k) * keep[:, None, None, :]) @ v


@spelling(inputs=lambda: (*qkv(), _padding()), weight="(0 if (not c0[b, n]) else p)")
def padding_filled_with_zero_afterwards(q, k, v, keep):
    return _probabilities(q, k).masked_fill(~keep[:, None, None, :], 0.0) @ v


@spelling(inputs=lambda: (*qkv(), _padding()), weight="(p if c0[b, m] else 0)")
def padded_queries_chosen_away(q, k, v, keep):
    return torch.where(keep[:, None, :, None], _probabilities(q, k), torch.zeros(())) @ v


@spelling(inputs=lambda: (*qkv(), _empty()), keeps="c0[b, n]", rows="zero", weight="(0 if (not c0[b, n]) else p)")
def the_same_mask_before_and_after(q, k, v, keep):
    drop = ~keep[:, None, None, :]
    return (q @ k.mT * 0.25).masked_fill(drop, float("-inf")).softmax(-1).masked_fill(drop, 0.0) @ v


@spelling(inputs=lambda: (*qkv(), _empty()), keeps="c0[b, n]", rows="exact", weight="(0 if (not c0[b, n]) else p)")
def a_finite_mask_before_and_zero_after(q, k, v, keep):
    drop = ~keep[:, None, None, :]
    p = (q @ k.mT * 0.25).masked_fill(drop, torch.finfo(torch.float32).min).softmax(-1)
    return p.masked_fill(drop, 0.0) @ v


def _bias() -> torch.Tensor:
    return torch.randn(1, H, S, S)


@spelling(
    inputs=lambda: (*qkv(), _bias(), _empty()), score="(s * 0.25) + c1[0, h, m, n]", keeps="c0[b, n]", rows="exact",
    gradients=(0, 1, 2, 3), weight="(0 if (not c0[b, n]) else p)",
)  # fmt: skip
def a_bias_a_finite_mask_and_zero_after(q, k, v, bias, keep):
    """FastSpeech 2's Conformer. A bias of -inf for a whole row changes nothing: the mask gave its dropped keys a number."""
    drop = ~keep[:, None, None, :]
    p = (q @ k.mT * 0.25 + bias).masked_fill(drop, torch.finfo(torch.float32).min).softmax(-1)
    return p.masked_fill(drop, 0.0) @ v


@spelling(
    inputs=lambda: (*qkv(), _bias(), _empty()), score="(s * 0.25) + c1[0, h, m, n]", keeps="c0[b, n]", rows="exact",
    gradients=(0, 1, 2, 3), weight="(0 if (not c0[b, n]) else p)",
)  # fmt: skip
def a_bias_after_a_finite_mask_and_zero_after(q, k, v, bias, keep):
    drop = ~keep[:, None, None, :]
    p = ((q @ k.mT * 0.25).masked_fill(drop, torch.finfo(torch.float32).min) + bias).softmax(-1)
    return p.masked_fill(drop, 0.0) @ v


@spelling(
    inputs=lambda: (*qkv(), _bias(), _empty()), score="(s * 0.25) + c1[0, h, m, n]", keeps="c0[b, n]", rows="exact",
    gradients=(0, 1, 2, 3), weight="(0 if c2[b, 0, 0, n] else p)",
)  # fmt: skip
def a_bias_a_finite_mask_and_another_zero_after(q, k, v, bias, keep):
    drop = ~keep[:, None, None, :]
    p = (q @ k.mT * 0.25 + bias).masked_fill(drop, torch.finfo(torch.float32).min).softmax(-1)
    return p.masked_fill(drop.flip(-1), 0.0) @ v


@spelling(
    inputs=lambda: (*qkv(), _bias(), _empty()), score="(s * 0.25) + c1[0, h, m, n]", keeps="c0[b, n]", rows="exact",
    gradients=(0, 1, 2, 3), weight="(0 if (not c0[b, n]) else p)",
)  # fmt: skip
def a_bias_a_mask_of_infinity_and_zero_after(q, k, v, bias, keep):
    """CPM-Ant: a bias of -inf for a whole row of kept keys would be NaN, and a row without kept keys zero."""
    drop = ~keep[:, None, None, :]
    return (q @ k.mT * 0.25 + bias).masked_fill(drop, float("-inf")).softmax(-1).masked_fill(drop, 0.0) @ v


@near_miss("FF401", "a_bias_a_mask_of_infinity_and_zero_after", inputs=lambda: (*qkv(), _bias(), _empty()))
def a_bias_without_a_mask_and_zero_after(q, k, v, bias, keep):
    """Where the bias itself may be -inf for a whole row there is no mask to say which rows that can be."""
    return (q @ k.mT * 0.25 + bias).softmax(-1).masked_fill(~keep[:, None, None, :], 0.0) @ v


# ------------------------------------------------------------------------------------------------ factors


@spelling(weight="p * 0.5")
def probabilities_scaled(q, k, v):
    return (_probabilities(q, k) / 2) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(1, H, 1, 1)), gradients=(0, 1, 2, 3), weight="p * c0[0, h, 0, 0]")
def head_mask(q, k, v, mask):
    return (_probabilities(q, k) * mask) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(H)), gradients=(0, 1, 2, 3), weight="p / c0[h]")
def divided_by_a_number_a_head(q, k, v, factor):
    return (_probabilities(q, k) / factor[:, None, None]) @ v


@spelling(inputs=lambda: (*qkv(), torch.rand(B, 1, S, S)), gradients=(0, 1, 2, 3), weight="c0[b, 0, m, n] * p")
def gate_of_every_element(q, k, v, gate):
    return (gate * _probabilities(q, k)) @ v


@spelling(weight="((p * 0.5) if ((n - m) <= 0) else (p * 2))")
def two_factors_chosen_by_position(q, k, v):
    p = _probabilities(q, k)
    return torch.where(_causal(), p * 0.5, p * 2.0) @ v


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF407", "dropout_in_training")
def dropped_probabilities_returned(q, k, v):
    p = F.dropout(_probabilities(q, k), RATE, training=True)
    return p @ v, p


@near_miss("FF401", "dropout_in_training")
def dropout_of_the_scores(q, k, v):
    return F.dropout(q @ k.mT * 0.25, RATE, training=True).softmax(-1) @ v


@near_miss("FF401", "padding_filled_with_zero_afterwards")
def causal_filled_with_a_small_number_afterwards(q, k, v):
    return _probabilities(q, k).masked_fill(~_causal(), 1e-9) @ v


@near_miss("FF401", "probabilities_scaled")
def probabilities_times_themselves(q, k, v):
    p = _probabilities(q, k)
    return (p * p) @ v


@near_miss("FF401", "divided_by_a_number_a_head")
def a_number_divided_by_probabilities(q, k, v):
    return (1e-6 / (_probabilities(q, k) * 3.0)) @ v


@near_miss("FF401", "padded_queries_chosen_away")
def small_probabilities_chosen_away(q, k, v):
    p = _probabilities(q, k)
    return torch.where(p > 0.02, p, 0.0) @ v


@near_miss("FF401", "gate_of_every_element")
def gate_by_the_scores(q, k, v):
    scores = q @ k.mT * 0.25
    return (scores.softmax(-1) * (scores > 0)) @ v


@spelling(inputs=lambda: (*qkv(), _empty()), keeps="c0[b, n]", rows="exact", weight="(0 if (not ((n - m) <= 0)) else p)")
def other_masks_before_and_after(q, k, v, keep):
    p = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1)
    return p.masked_fill(~_causal(), 0.0) @ v


@near_miss("FF204", "head_mask", inputs=lambda: (*qkv(heads=1), torch.rand(1, H, 1, 1)))
def probabilities_shared_by_masked_heads(q, k, v, mask):
    return (_probabilities(q, k) * mask) @ v


@near_miss("FF401", "two_factors_chosen_by_position")
def probabilities_of_other_rows_chosen_by_position(q, k, v):
    p = _probabilities(q, k)
    return torch.where(_causal(), p, p.mT) @ v


@near_miss("FF401", "padded_queries_chosen_away", inputs=lambda: (*qkv(), torch.rand(S, S)))
def other_numbers_chosen_by_position(q, k, v, other):
    return torch.where(_causal(), _probabilities(q, k), other) @ v
