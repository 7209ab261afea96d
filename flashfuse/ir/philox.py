"""Random bits of an element of the probabilities: Philox 4x32-7 (Salmon et al. 2011), counted by position.

The key is a 64-bit seed, the counter is made of the element's global position, so that an element has the same bits in
every tile of every kernel, in the forward, in the backward, and here. Seven rounds are the fewest that pass BigCrush (table 2
there); positions stand in the words that the first round multiplies, so that all seven work on them.

One counter serves eight elements with 16 bits each, those that differ in bit 3 of m and in bits 0 and 3 of n: in a tensor
core's tile of queries and keys they lie in one thread, in its transpose in two.

    counter = (n without bits 0 and 3, b, m without bit 3, h),   word = 2 * bit_0(n) + bit_3(n),   half = bit_3(m)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 16

_MASK = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_ROUNDS = 7
_AT_ONCE = 1 << 16  # counters: more would not stay in the cache


def dropping(rate: float) -> tuple[int, float]:
    """What dropout at `rate`, 0 to 1, is: elements whose bits lie below the first number are dropped, others times the second.

    The rate is rounded to a multiple of 2^-16 below one, and the factor is that of the rounded rate: the expectation is kept.
    """
    threshold = min(round(rate * 2**BITS), 2**BITS - 1)
    return threshold, 2**BITS / (2**BITS - threshold)


def random_bits(seed: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """BITS uniform random bits for each element, as int32; the int64 arguments broadcast against each other."""
    rows, columns = _span(m, -2), _span(n, -1)
    if rows is None or columns is None:
        words = torch.stack(torch.broadcast_tensors(*_philox(seed, n >> 4 << 2 | n >> 1 & 3, b, m >> 4 << 3 | m & 7, h)))
        word = ((n & 1) << 1 | n >> 3 & 1).expand(words.shape[1:])
        return (words.gather(0, word.unsqueeze(0))[0] >> BITS * (m >> 3 & 1) & 2**BITS - 1).to(torch.int32)
    return _tile(seed, b, h, rows, columns)


def _span(index: Tensor, dim: int) -> tuple[int, int] | None:
    """(first, last) of consecutive positions along one dimension, else None."""
    if index.dim() < 2 or index.numel() != index.shape[dim] or index.numel() == 0:
        return None
    flat = index.flatten()
    first, last = int(flat[0]), int(flat[-1])
    consecutive = last - first == len(flat) - 1 and bool((flat.diff() == 1).all())
    return (first, last) if consecutive else None


def _tile(seed: Tensor, b: Tensor, h: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """All bits of a range of queries and one of keys, with one counter for each eight of them."""
    (row_lo, row_blocks), (column_lo, column_blocks) = _blocks(rows), _blocks(columns)
    column = torch.arange(4 * column_blocks, device=b.device) + column_lo // 4
    row = (torch.arange(8 * row_blocks, device=b.device) + row_lo // 2).unsqueeze(-1)
    leading = torch.broadcast_shapes(seed.shape[:-2], b.shape[:-2], h.shape[:-2])
    tile = torch.empty((*leading, row_blocks, 2, 8, column_blocks, 2, 4, 2), dtype=torch.int32, device=b.device)
    step = max(1, _AT_ONCE // max(1, 32 * column_blocks * math.prod(leading)))
    for first in range(0, row_blocks, step):
        part = tile.narrow(len(leading), first, min(step, row_blocks - first))
        words = torch.broadcast_tensors(*_philox(seed, column, b, row[8 * first : 8 * (first + step)], h))
        for place, word in enumerate(words):
            shown = word.view(*leading, -1, 8, column_blocks, 4)
            for half in range(2):
                part[..., :, half, :, :, place % 2, :, place // 2] = shown >> BITS * half
    tile.bitwise_and_(2**BITS - 1)
    whole = tile.view(*leading, 16 * row_blocks, 16 * column_blocks)
    whole = whole.narrow(-2, rows[0] - row_lo, rows[1] - rows[0] + 1)
    return whole.narrow(-1, columns[0] - column_lo, columns[1] - columns[0] + 1)


def _blocks(span: tuple[int, int]) -> tuple[int, int]:
    """The multiple of 16 at or before a span, and how many blocks of 16 cover it from there."""
    low = span[0] // 16 * 16
    return low, (span[1] - low) // 16 + 1


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter, in the lower 32 bits of int64; the upper ones hold anything."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c2 = c0 & _MASK, c2 & _MASK  # only what is multiplied must be without upper bits
    for _ in range(_ROUNDS):
        low, high = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c2 = (high >> 32) ^ (c1 ^ k0), (low >> 32) ^ (c3 ^ k1)
        c0.bitwise_and_(_MASK)
        c2.bitwise_and_(_MASK)
        c1, c3 = high, low
        k0, k1 = (k0 + _KEYS[0]) & _MASK, (k1 + _KEYS[1]) & _MASK
    return c0, c1, c2, c3
