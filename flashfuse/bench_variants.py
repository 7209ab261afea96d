"""Attention as people write it, one function a variant, with the hand-made rivals of each.

A variant's function takes query [B, H, S, D], key and value [B, G, S, D] (G = H except in gqa) and at most
one tensor of per-row facts (lengths [B] or document ids [B, S]), and returns [B, H, S, D]. No mask is
handed in: each function makes its own, as model code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 256
PREFIX = 256
DOCUMENTS = 12


def vanilla(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    return torch.softmax(scores, dim=-1) @ value


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.size(-2)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=query.device))
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


def causal_f32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    position = torch.arange(query.size(-2), device=query.device)
    scores = torch.matmul(query, key.transpose(2, 3)) * query.size(-1) ** -0.5
    scores = scores.float().masked_fill(position[None, :] > position[:, None], float("-inf"))
    return torch.matmul(F.softmax(scores, dim=-1).to(query.dtype), value)


def repeat_kv(hidden: Tensor, times: int) -> Tensor:
    batch, groups, length, head_dim = hidden.shape
    hidden = hidden[:, :, None, :, :].expand(batch, groups, times, length, head_dim)
    return hidden.reshape(batch, groups * times, length, head_dim)


def gqa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    times, length = query.size(1) // key.size(1), query.size(2)
    key, value = repeat_kv(key, times), repeat_kv(value, times)
    lowest = torch.finfo(query.dtype).min
    mask = torch.full((length, length), lowest, dtype=query.dtype, device=query.device).triu(1)
    scores = torch.matmul(query, key.transpose(2, 3)) * query.size(-1) ** -0.5 + mask[None, None]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def padding(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    keep = torch.arange(key.size(-2), device=key.device)[None, :] < lengths[:, None]
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


def sliding(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    position = torch.arange(query.size(-2), device=query.device)
    distance = position[:, None] - position[None, :]
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = scores.masked_fill((distance < 0) | (distance >= WINDOW), float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


def prefix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    position = torch.arange(query.size(-2), device=query.device)
    keep = (position[None, :] <= position[:, None]) | (position[None, :] < PREFIX)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    return torch.softmax(scores.masked_fill(~keep, float("-inf")), dim=-1) @ value


def document(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
    position = torch.arange(query.size(-2), device=query.device)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    keep = same & (position[:, None] >= position[None, :])
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = torch.where(keep, scores, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


Keep = Callable[..., Tensor]


def _causal_keep(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return m >= n


def _sliding_keep(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return (m >= n) & (m - n < WINDOW)


def _prefix_keep(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return (m >= n) | (n < PREFIX)


def _padding_keep(lengths: Tensor) -> Keep:
    return lambda b, h, m, n: n < lengths[b]


def _document_keep(documents: Tensor) -> Keep:
    return lambda b, h, m, n: (documents[b, m] == documents[b, n]) & (m >= n)


def ragged_lengths(batch: int, length: int, device: str) -> Tensor:
    """[batch] int64: the first row is full, the others hold a quarter to nine tenths of the length."""
    shares = torch.empty(batch, device=device).uniform_(0.25, 0.9)
    shares[0] = 1.0
    return (shares * length).long().clamp(min=1)


def document_ids(batch: int, length: int, device: str) -> Tensor:
    """[batch, length] int64: every row packs `DOCUMENTS` documents of random lengths one behind another."""
    cuts = torch.rand(batch, length - 1, device=device).argsort(1)[:, : DOCUMENTS - 1] + 1
    starts = torch.zeros(batch, length, dtype=torch.int64, device=device).scatter_(1, cuts, 1)
    return starts.cumsum(1)


@dataclass(frozen=True)
class Variant:
    """`keep` makes FlexAttention's mask of the facts (None: no mask); `facts` takes batch, length, device."""

    name: str
    code: Callable[..., Tensor]
    keep: Callable[..., Keep] | None
    facts: Callable[[int, int, str], Tensor] | None = None
    group: int = 1  # query heads a key/value head
    is_causal: bool = False  # SDPA's own flag says the whole mask


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("vanilla", vanilla, keep=None),
        Variant("causal", causal, keep=lambda: _causal_keep, is_causal=True),
        Variant("causal_f32", causal_f32, keep=lambda: _causal_keep, is_causal=True),
        Variant("gqa", gqa, keep=lambda: _causal_keep, group=4, is_causal=True),
        Variant("sliding", sliding, keep=lambda: _sliding_keep),
        Variant("prefix", prefix, keep=lambda: _prefix_keep),
        Variant("padding", padding, keep=_padding_keep, facts=ragged_lengths),
        Variant("document", document, keep=_document_keep, facts=document_ids),
    )
}
