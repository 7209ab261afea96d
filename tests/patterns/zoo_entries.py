"""What the zoo's entries are: a spelling that must be fused, a near miss that must not; and their usual inputs.

Every function takes what `inputs()` of its entry makes and returns the attention's output. A `Spelling` says what the
matcher must make of it, in the words of `AttentionSpec.describe`; a `NearMiss` says which refusal it must give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

B, H, S, D = 2, 4, 24, 16
NEG = torch.finfo(torch.float32).min


def qkv(m: int = S, n: int = S, heads: int = H, kv_heads: int | None = None, e: int = D) -> tuple[torch.Tensor, ...]:
    """Query [B, H, m, D], key [B, G, n, D], value [B, G, n, e]."""
    kv_heads = kv_heads or heads
    return torch.randn(B, heads, m, D), torch.randn(B, kv_heads, n, D), torch.randn(B, kv_heads, n, e)


@dataclass(frozen=True)
class Spelling:
    """`score`, `keeps`, `weight`, `sink`: the expected formulas (None: there is none).

    `gradients`: which inputs are differentiated. `exact`: the same attention without narrow dtypes written into the code, for a
    float64 reference. `sites`: how many attentions it holds, all of which read as this says.
    """

    name: str
    function: Callable[..., torch.Tensor]
    inputs: Callable[[], tuple[Any, ...]] = qkv
    score: str = "s * 0.25"
    keeps: str | None = None
    rows: str = "impossible"
    gradients: tuple[int, ...] = (0, 1, 2)
    exact: Callable[..., torch.Tensor] | None = None
    weight: str | None = None
    sink: str | None = None
    sites: int = 1


@dataclass(frozen=True)
class NearMiss:
    """`code`: the refusal that it must give. `twin`: the spelling that it looks like."""

    name: str
    function: Callable[..., Any]
    code: str
    twin: str
    inputs: Callable[[], tuple[Any, ...]] = qkv
    sites: int = 1


SPELLINGS: list[Spelling] = []
NEAR_MISSES: list[NearMiss] = []


def spelling(**facts: Any) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a function as a spelling that must be fused."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        SPELLINGS.append(Spelling(function.__name__, function, **facts))
        return function

    return register


def near_miss(code: str, twin: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as one that must be left alone."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES.append(NearMiss(function.__name__, function, code, twin, **facts))
        return function

    return register
