"""Where heads, groups, batches and windows lie, and predicates that read data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from zoo_entries import NEG, B, D, H, S, near_miss, qkv, spelling


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-2, -1) * 0.25


# ------------------------------------------------------------------------------------------------ groups and axes


@spelling(inputs=lambda: qkv(kv_heads=2))
def grouped_einsum(q, k, v):
    q = q.view(B, 2, 2, S, D)
    p = (torch.einsum("bgrqd,bgkd->bgrqk", q, k) * 0.25).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", p, v).reshape(B, H, S, D)


@spelling(inputs=lambda: qkv(kv_heads=1))
def multi_query_repeated(q, k, v):
    k, v = k.repeat(1, H, 1, 1), v.tile(1, H, 1, 1)
    return _scores(q, k).softmax(-1) @ v


@spelling(inputs=lambda: qkv(kv_heads=2))
def grouped_by_remainder(q, k, v):
    return _scores(q, k.repeat(1, 2, 1, 1)).softmax(-1) @ v.repeat(1, 2, 1, 1)


@spelling(inputs=lambda: qkv(kv_heads=2))
def grouped_by_repeat_and_flatten(q, k, v):
    k, v = (x[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1, 2) for x in (k, v))
    return _scores(q, k).softmax(-1) @ v


def _sequence_first() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(S, B, H, D) for _ in range(3))


@spelling(inputs=_sequence_first)
def sequence_first(q, k, v):
    p = torch.einsum("ibnd,jbnd->bnij", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bnij,jbnd->ibnd", p, v)


@spelling(inputs=_sequence_first)
def sequence_first_scores_too(q, k, v):
    p = torch.einsum("ibnd,jbnd->ijbn", q, k).mul(0.25).softmax(1)
    return torch.einsum("ijbn,jbnd->ibnd", p, v)


@spelling(inputs=lambda: tuple(torch.randn(2, 2, 2, 2, S, D) for _ in range(3)))
def six_dimensions(q, k, v):
    return _scores(q, k).softmax(-1) @ v


@spelling(inputs=lambda: (torch.randn(2, 8, 8, D),), gradients=(0,))
def windows_of_an_image(x):
    x = x.view(2, 2, 4, 2, 4, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, D)
    out = _scores(x, x).softmax(-1) @ x
    return out.view(2, 2, 2, 4, 4, D).permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, D)


@spelling()
def blocks_of_a_sequence(q, k, v):
    q, k, v = (x.unflatten(2, (4, 6)) for x in (q, k, v))
    return (_scores(q, k).softmax(-1) @ v).flatten(2, 3)


def _latent() -> tuple[torch.Tensor, ...]:
    return (torch.randn(B, H, S, 16), torch.randn(B, H, S, 16), torch.randn(B, H, S, 12),
            torch.randn(B, H, S, 8), torch.randn(B, 1, S, 8))  # fmt: skip


@spelling(inputs=_latent, gradients=(0, 1, 2, 3))
def multi_head_latent(q, k, v, q_rotated, k_rotated):
    q = torch.cat([q, q_rotated], -1)
    k = torch.cat([k, k_rotated.expand(-1, H, -1, -1)], -1)
    return _scores(q, k).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ predicates on data


def _positions() -> torch.Tensor:
    return torch.cat([torch.arange(10), torch.arange(14)]).repeat(B, 1)


@spelling(inputs=lambda: (*qkv(), _positions()), keeps="(c0[b, m] == c0[b, n]) and (n <= m)")
def documents_by_position_ids(q, k, v, positions):
    first = positions[:, :1] - 1
    ids = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)
    i = torch.arange(S)
    keep = (ids[:, None, :, None] == ids[:, None, None, :]) & (i[None, :] <= i[:, None])
    return _scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling(keeps="not ((m // 6) != (n // 6))")
def block_diagonal_by_division(q, k, v):
    block = torch.arange(S) // 6
    return _scores(q, k).masked_fill(block[:, None] != block[None, :], float("-inf")).softmax(-1) @ v


@spelling(keeps="(n <= m) and ((n // 8) == (m // 8))")
def chunked_attention(q, k, v):
    i = torch.arange(S)
    keep = (i[None, :] <= i[:, None]) & (i[None, :] // 8 == i[:, None] // 8)
    return torch.where(keep, _scores(q, k), NEG).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.tensor([3, 7])), keeps="(n <= m) or (n < c0[b])")
def prefix_by_length(q, k, v, prefix):
    i = torch.arange(S)
    keep = (i[None, :] <= i[:, None])[None] | (i[None, None, :] < prefix[:, None, None])
    return torch.where(keep[:, None], _scores(q, k), float("-inf")).softmax(-1) @ v


@spelling(
    inputs=lambda: (*qkv(), torch.randint(5, 9, (B, S)), torch.randint(0, 6, (B, S))),
    keeps="not (c0[b, n] > c1[b, m])",
    rows="exact",
)
def times_of_events(q, k, v, now, then):
    return _scores(q, k).masked_fill(then[:, None, None, :] > now[:, None, :, None], NEG).softmax(-1) @ v


def _kept() -> torch.Tensor:
    return (torch.arange(S)[None, :] < torch.tensor([S, S - 7])[:, None]).long()


@spelling(inputs=lambda: (*qkv(), _kept()), keeps="not ((c0[b, m] * c0[b, n]) == 0)", rows="exact")
def outer_product_of_padding(q, k, v, kept):
    mask = kept[:, None, :, None] * kept[:, None, None, :]
    return _scores(q, k).masked_fill(mask == 0, -1e9).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), _kept()), score="(s * 0.25) + c0[b, 0, 0, n]", rows="exact")
def one_minus_padding_times_minimum(q, k, v, kept):
    mask = (1.0 - kept[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return (_scores(q, k) + mask).softmax(-1) @ v


@spelling(keeps="not ((((m - n) % 2) != 0) or ((m - n) < 0))", rows="exact")
def dilated_window(q, k, v):
    distance = torch.arange(S)[:, None] - torch.arange(S)[None, :]
    drop = (distance % 2 != 0) | (distance < 0)
    return _scores(q, k).masked_fill(drop, float("-inf")).softmax(-1) @ v


@spelling(inputs=lambda: (*qkv(), torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()), keeps="c0[0, 0, m, n]", rows="exact")
def mask_cut_from_a_larger_one(q, k, v, whole):
    x = _scores(q, k)
    queries, keys = x.size(-2), x.size(-1)
    return torch.where(whole[:, :, keys - queries : keys, :keys], x, torch.full([], NEG)).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ near misses


@near_miss("FF202", "sequence_first_scores_too", inputs=_sequence_first)
def softmax_over_queries_first(q, k, v):
    p = torch.einsum("ibnd,jbnd->ijbn", q, k).mul(0.25).softmax(0)
    return torch.einsum("ijbn,jbnd->ibnd", p, v)


@near_miss("FF202", "grouped_einsum", inputs=lambda: qkv(kv_heads=2))
def softmax_over_the_group(q, k, v):
    p = torch.einsum("bgrqd,bgkd->bgrqk", q.view(B, 2, 2, S, D), k).softmax(2)
    return torch.einsum("bgrqk,bgkd->bgrqd", p, v)


@near_miss("FF202", "blocks_of_a_sequence")
def probabilities_reshaped_across_blocks(q, k, v):
    p = _scores(q, k).unflatten(3, (4, 6)).softmax(-1).flatten(3)
    return p @ v


# ------------------------------------------------------------------------------------------------ masks made by vmap


def _mapped(rule: Callable[..., torch.Tensor]) -> torch.Tensor:
    """`rule(b, h, m, n)` over all positions, as Hugging Face's mask functions are mapped: [B, H, S, S]."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        rule = torch.vmap(rule, in_dims=dims)
    return rule(*(torch.arange(size) for size in (B, H, S, S)))


@spelling(inputs=lambda: (*qkv(), _kept()), keeps="(n <= m) and c0[b, n]", rows="exact")
def mask_of_functions_mapped(q, k, v, kept):
    def rule(b, h, m, n):
        return m.new_ones((), dtype=torch.bool) & (n <= m) & (kept[b, n] != 0)

    return _scores(q, k).masked_fill(~_mapped(rule), float("-inf")).softmax(-1) @ v


@spelling(keeps="m <= n")
def mask_of_a_function_mapped_over_keys_first(q, k, v):
    """The same function as a causal mask's: which argument a vmap maps decides what it is."""
    rows = torch.vmap(lambda n, m: n <= m, in_dims=(None, 0))
    kept = torch.vmap(rows, in_dims=(0, None))(torch.arange(S), torch.arange(S))
    return torch.where(kept, _scores(q, k), float("-inf")).softmax(-1) @ v
