"""Attention with more than a mask, as people write it, one function a form, with FlexAttention by hand where it can say it.

A form's function takes query, key, value and what else it reads; dims are [B, H, S, D] unless its docstring says otherwise.
What it reads is listed as operands: with a gradient or without, and which of their dims counts heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flashfuse.bench_variants import repeat_kv

GROUP = 8  # query heads a key/value head, in sinks
SOFTCAP = 50.0
BUCKETS = 32
FARTHEST = 128
DROPOUT = 0.1


@dataclass(frozen=True)
class Sizes:
    """batch * length tokens of hidden width heads * head_dim."""

    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)


@dataclass
class Operand:
    """One argument of a form's function. `heads` is the dim that counts heads; None: all heads share it."""

    tensor: Tensor
    heads: int | None
    gradient: bool = True


def query_key_value(sizes: Sizes, group: int = 1) -> list[Operand]:
    counts = (sizes.heads, sizes.heads // group, sizes.heads // group)
    return [Operand(sizes.random(sizes.batch, n, sizes.length, sizes.head_dim), 1) for n in counts]


def distances(query: Tensor) -> Tensor:
    """n - m, [S, S]."""
    position = torch.arange(query.size(-2), device=query.device)
    return position[None, :] - position[:, None]


def causal_block_mask(query: Tensor) -> BlockMask:
    length = query.size(-2)
    create = torch.compile(create_block_mask, dynamic=False)
    return create(lambda b, h, m, n: m >= n, None, None, length, length, device=query.device)


# ------------------------------------------------------------------------------------------------ ALiBi


def alibi(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Causal; slopes [H] float32."""
    distance = distances(query)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1)) + slopes[:, None, None] * distance
    scores = scores.masked_fill(distance > 0, float("-inf"))
    return torch.softmax(scores, dim=-1).to(query.dtype) @ value


def alibi_operands(sizes: Sizes) -> list[Operand]:
    slopes = torch.exp2(-8.0 * torch.arange(1, sizes.heads + 1, device=sizes.device) / sizes.heads)
    return [*query_key_value(sizes), Operand(slopes, 0, gradient=False)]


def alibi_flex(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Callable[..., Tensor]:
    mask = causal_block_mask(query)

    def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        return flex_attention(query, key, value, lambda s, b, h, m, n: s + slopes[h] * (n - m), block_mask=mask)

    return attention


# ------------------------------------------------------------------------------------------------ softcap


def softcap(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Gemma 2: causal, scores capped by tanh."""
    length = query.size(-2)
    lowest = torch.finfo(query.dtype).min
    mask = torch.full((length, length), lowest, dtype=query.dtype, device=query.device).triu(1)
    scores = torch.matmul(query, key.transpose(2, 3)) * query.size(-1) ** -0.5
    scores = torch.tanh(scores / SOFTCAP) * SOFTCAP + mask[None, None]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def softcap_flex(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Tensor]:
    mask = causal_block_mask(query)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_attention(query, key, value, lambda s, b, h, m, n: torch.tanh(s / SOFTCAP) * SOFTCAP, block_mask=mask)

    return attention


# ------------------------------------------------------------------------------------------------ T5


def t5_buckets(distance: Tensor) -> Tensor:
    """transformers' T5Attention._relative_position_bucket, bidirectional: buckets of n - m."""
    half = BUCKETS // 2
    bucket = (distance > 0).to(torch.long) * half
    far = torch.abs(distance)
    exact = half // 2
    large = exact + (torch.log(far.float() / exact) / math.log(FARTHEST / exact) * (half - exact)).to(torch.long)
    large = torch.min(large, torch.full_like(large, half - 1))
    return bucket + torch.where(far < exact, far, large)


def t5(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """Not scaled; table [BUCKETS, H] with a gradient."""
    bias = F.embedding(t5_buckets(distances(query)), table).permute([2, 0, 1]).unsqueeze(0)
    scores = torch.matmul(query, key.transpose(3, 2)) + bias
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(weights, value)


def t5_operands(sizes: Sizes) -> list[Operand]:
    """T5's initialisation leaves the scale out of the scores and puts it into the query."""
    query, *rest = query_key_value(sizes)
    query.tensor.mul_(sizes.head_dim**-0.5)
    return [query, *rest, Operand(sizes.random(BUCKETS, sizes.heads), 1)]


def t5_flex(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Callable[..., Tensor]:
    last = query.size(-2) - 1
    buckets = t5_buckets(torch.arange(-last, last + 1, device=query.device))

    def attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        return flex_attention(query, key, value, lambda s, b, h, m, n: s + table[buckets[n - m + last], h], scale=1.0)

    return attention


# ------------------------------------------------------------------------------------------------ Evoformer


def evoformer(query: Tensor, key: Tensor, value: Tensor, pair: Tensor, mask: Tensor) -> Tensor:
    """OpenFold's attention over rows: query [B, R, H, S, D], pair [B, 1, H, S, S] with a gradient, mask [B, R, 1, 1, S]."""
    scores = torch.matmul(query * query.size(-1) ** -0.5, key.transpose(-1, -2))
    scores = scores + 1e9 * (mask - 1)
    scores = scores + pair
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def evoformer_operands(sizes: Sizes) -> list[Operand]:
    """One alignment whose rows are the batch; at S = 4096 the pair bias and its gradient take 1 GiB each at head dim 64."""
    rows, heads, length = sizes.batch, sizes.heads, sizes.length
    operands = [Operand(sizes.random(1, rows, heads, length, sizes.head_dim), 2) for _ in range(3)]
    mask = (torch.rand(1, rows, 1, 1, length, device=sizes.device) < 0.9).to(sizes.dtype)
    return [*operands, Operand(sizes.random(1, 1, heads, length, length), 2), Operand(mask, None, gradient=False)]


def evoformer_flex(query: Tensor, key: Tensor, value: Tensor, pair: Tensor, mask: Tensor) -> Callable[..., Tensor]:
    rows = query.size(1)

    def attention(query: Tensor, key: Tensor, value: Tensor, pair: Tensor, mask: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return s + pair[b // rows, 0, h, m, n] + 1e9 * (mask[b // rows, b % rows, 0, 0, n] - 1)

        return flex_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), score).view(query.shape)

    return attention


# ------------------------------------------------------------------------------------------------ sinks


def sinks(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
    """gpt-oss: causal, grouped heads, a logit a head joined to the scores and cut off again; sink [H] with a gradient."""
    times, length = query.size(1) // key.size(1), query.size(2)
    key, value = repeat_kv(key, times), repeat_kv(value, times)
    lowest = torch.finfo(query.dtype).min
    mask = torch.full((length, length), lowest, dtype=query.dtype, device=query.device).triu(1)
    scores = torch.matmul(query, key.transpose(2, 3)) * query.size(-1) ** -0.5 + mask[None, None]
    column = sink.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(weights, value)


def sinks_operands(sizes: Sizes) -> list[Operand]:
    return [*query_key_value(sizes, GROUP), Operand(sizes.random(sizes.heads), 0)]


def sinks_flex(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Callable[..., Tensor]:
    """The output scaled by the share of the row's sum that the sink leaves, which the logsumexp gives."""
    mask = causal_block_mask(query)

    def attention(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        out, lse = flex_attention(query, key, value, block_mask=mask, enable_gqa=True, return_lse=True)
        return out * torch.sigmoid(lse - sink[None, :, None])[..., None].to(out.dtype)

    return attention


# ------------------------------------------------------------------------------------------------ dropout


def dropout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """nanoGPT in training; FlexAttention has no dropout."""
    length = query.size(-2)
    mask = torch.tril(torch.ones(length, length, device=query.device)).view(1, 1, length, length)
    scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(key.size(-1)))
    scores = scores.masked_fill(mask == 0, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), DROPOUT, training=True) @ value


def dropped(query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
    """The same with a mask [B, H, S, S] of the probabilities that were kept."""
    scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(key.size(-1)))
    scores = scores.masked_fill(distances(query) > 0, float("-inf"))
    return (F.softmax(scores, dim=-1) * kept / (1 - DROPOUT)) @ value


# ------------------------------------------------------------------------------------------------ differential


def differential(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    """Differential Transformer, causal: query and key [B, 2H, S, D], value [B, H, S, 2D], factor (lambda) 0-d float32."""
    batch, length = query.size(0), query.size(2)
    scores = torch.matmul(query * query.size(-1) ** -0.5, key.transpose(-1, -2))
    scores = scores + torch.triu(torch.zeros([length, length], device=query.device).fill_(float("-inf")).type_as(scores), 1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
    weights = weights.view(batch, -1, 2, length, length)
    weights = weights[:, :, 0] - factor * weights[:, :, 1]
    return torch.matmul(weights, value)


def differential_operands(sizes: Sizes) -> list[Operand]:
    query, key, _ = query_key_value(sizes)
    value = sizes.random(sizes.batch, sizes.heads // 2, sizes.length, 2 * sizes.head_dim)
    factor = torch.rand((), device=sizes.device)
    return [query, key, Operand(value, 1), Operand(factor, None)]


def differential_flex(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Callable[..., Tensor]:
    mask = causal_block_mask(query)

    def attention(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        first, second = (flex_attention(query[:, i::2], key[:, i::2], value, block_mask=mask) for i in (0, 1))
        return first - factor * second

    return attention


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Form:
    """`flex` takes the operands and gives the same function by FlexAttention; `replay` takes the mask of dropout as well."""

    name: str
    code: Callable[..., Tensor]
    operands: Callable[[Sizes], list[Operand]] = query_key_value
    flex: Callable[..., Callable[..., Tensor]] | None = None
    replay: Callable[..., Tensor] | None = None


FORMS = {
    form.name: form
    for form in (
        Form("alibi", alibi, alibi_operands, alibi_flex),
        Form("softcap", softcap, flex=softcap_flex),
        Form("sinks", sinks, sinks_operands, sinks_flex),
        Form("dropout", dropout, replay=dropped),
        Form("differential", differential, differential_operands, differential_flex),
        Form("evoformer", evoformer, evoformer_operands, evoformer_flex),
        Form("t5", t5, t5_operands, t5_flex),
    )
}
