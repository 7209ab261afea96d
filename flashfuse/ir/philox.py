"""Random bits of an element of the probabilities: Philox 4x32-10 (Salmon et al. 2011), counted by position.

The key is a 64-bit seed, the counter is made of the element's global position, so that an element has the same bits in
every tile of every kernel, in the forward, in the backward, and here. One counter serves four elements, the two by two
`(m, n)`, `(m, n + 8)`, `(m + 8, n)`, `(m + 8, n + 8)` for m and n without their bit 3: in a tensor core's tile those lie in
one thread, whether the tile is `[queries, keys]` or its transpose.

    counter = (without_bit_3(n), without_bit_3(m), b, h),   word = 2 * bit_3(m) + bit_3(n)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 30  # a word's upper bits, so that a threshold for them is an ordinary int32

_MASK = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_ROUNDS = 10
_AT_ONCE = 1 << 16  # counters: more would not stay in the cache


def random_bits(seed: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """BITS uniform random bits for each element, as int32; the int64 arguments broadcast against each other."""
    rows, columns = _span(m, -2), _span(n, -1)
    if rows is None or columns is None:
        words = torch.stack(torch.broadcast_tensors(*_philox(seed, _without_bit_3(n), _without_bit_3(m), b, h)))
        word = (2 * _bit_3(m) + _bit_3(n)).expand(words.shape[1:])
        return (words.gather(0, word.unsqueeze(0))[0] >> (32 - BITS) & (2**BITS - 1)).to(torch.int32)
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
    """All bits of a range of queries and one of keys, with one counter for each four of them."""
    (row_lo, row_blocks), (column_lo, column_blocks) = _blocks(rows), _blocks(columns)
    column = torch.arange(8 * column_blocks, device=b.device) + column_lo // 2
    row = (torch.arange(8 * row_blocks, device=b.device) + row_lo // 2).unsqueeze(-1)
    leading = torch.broadcast_shapes(seed.shape[:-2], b.shape[:-2], h.shape[:-2])
    tile = torch.empty((*leading, row_blocks, 2, 8, column_blocks, 2, 8), dtype=torch.int32, device=b.device)
    step = max(1, _AT_ONCE // max(1, 64 * column_blocks * math.prod(leading)))
    for first in range(0, row_blocks, step):
        part = tile.narrow(len(leading), first, min(step, row_blocks - first))
        words = torch.broadcast_tensors(*_philox(seed, column, row[8 * first : 8 * (first + step)], b, h))
        for place, word in enumerate(words):
            part[..., :, place // 2, :, :, place % 2, :] = word.view(*leading, -1, 8, column_blocks, 8)
    tile.bitwise_right_shift_(32 - BITS).bitwise_and_(2**BITS - 1)
    whole = tile.view(*leading, 16 * row_blocks, 16 * column_blocks)
    whole = whole.narrow(-2, rows[0] - row_lo, rows[1] - rows[0] + 1)
    return whole.narrow(-1, columns[0] - column_lo, columns[1] - columns[0] + 1)


def _blocks(span: tuple[int, int]) -> tuple[int, int]:
    """The multiple of 16 at or before a span, and how many blocks of 16 cover it from there."""
    low = span[0] // 16 * 16
    return low, (span[1] - low) // 16 + 1


def _without_bit_3(position: Tensor) -> Tensor:
    return (position >> 4 << 3) | (position & 7)


def _bit_3(position: Tensor) -> Tensor:
    return (position >> 3) & 1


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
