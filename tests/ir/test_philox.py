"""Random bits: the published test vectors of Philox, tiles and elements alike, uniform and independent of neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashfuse.ir import philox

# "philox4x32 10" of Random123's tests/kat_vectors: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    low, high = key
    seed = torch.tensor(low + ((high << 32) - (1 << 64 if high >> 31 else 0)))
    words = philox._philox(seed, *(torch.tensor(word) for word in counter))
    assert tuple(int(word) & 0xFFFFFFFF for word in words) == expected


def grid(B: int, H: int, m: range, n: range) -> list[Tensor]:
    """Index tensors that broadcast to `[B, H, M, N]`."""
    return [torch.tensor(list(span)).view([-1 if place == axis else 1 for axis in range(4)])
            for place, span in enumerate((range(B), range(H), m, n))]  # fmt: skip


@pytest.mark.parametrize(("m", "n"), [((0, 40), (0, 33)), ((7, 8), (3, 50)), ((9, 25), (16, 17)), ((100, 164), (64, 128))])
def test_tiles_have_the_bits_of_their_elements(m: tuple[int, int], n: tuple[int, int]) -> None:
    seed = torch.tensor(-12345678901234567)
    index = grid(2, 3, range(*m), range(*n))
    tile = philox.random_bits(seed, *index)
    assert tile.shape == (2, 3, m[1] - m[0], n[1] - n[0])
    assert torch.equal(tile, philox.random_bits(seed, *torch.broadcast_tensors(*index)))
    whole = philox.random_bits(seed, *grid(2, 3, range(200), range(200)))
    assert torch.equal(tile, whole[..., m[0] : m[1], n[0] : n[1]])


def test_positions_that_do_not_follow_each_other() -> None:
    seed, (b, h, m, n) = torch.tensor(5), grid(1, 1, range(0, 40, 3), range(50, 10, -1))
    whole = philox.random_bits(seed, *grid(1, 1, range(64), range(64)))
    assert torch.equal(philox.random_bits(seed, b, h, m, n), whole[:, :, m.flatten()][..., n.flatten()])


def test_bits_are_uniform_and_all_different() -> None:
    seed = torch.tensor(2024)
    bits = philox.random_bits(seed, *grid(2, 2, range(512), range(512)))
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**philox.BITS
    share = (bits < 2**philox.BITS // 10).double()
    deviation = (0.1 * 0.9 / share.numel()) ** 0.5
    assert abs(share.mean() - 0.1) < 4 * deviation
    rest = share - share.mean()
    for shift, dim in ((1, -1), (8, -1), (16, -1), (1, -2), (8, -2), (1, 0), (1, 1)):
        pairs = share.numel() / (1 if dim < 0 else 2)
        assert abs((rest * rest.roll(shift, dim)).mean()) < 4 * 0.09 / pairs**0.5
    assert bits.unique().numel() > 0.999 * bits.numel()
    assert not torch.equal(bits, philox.random_bits(seed + 1, *grid(2, 2, range(512), range(512))))
    assert not torch.equal(bits, philox.random_bits(seed + 2**40, *grid(2, 2, range(512), range(512))))
