"""Random bits: the published test vectors of Philox, tiles and elements alike, uniform and independent of neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashfuse.ir import philox

# "philox4x32 7" of Random123's tests/kat_vectors: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
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


@pytest.fixture(scope="module")
def million() -> Tensor:
    """Bits of 2 batches, 2 heads, 512 queries and 512 keys."""
    return philox.random_bits(torch.tensor(2024), *grid(2, 2, range(512), range(512)))


def chi_square(counts: Tensor) -> float:
    """How far counts of equally likely cells are from equal, in standard deviations of a chi-square of that many cells."""
    expected = counts.double().mean()
    freedom = counts.numel() - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


NEIGHBOURS = [(1, -1), (2, -1), (8, -1), (9, -1), (16, -1), (1, -2), (8, -2), (16, -2), (1, 0), (1, 1)]  # (shift, dim)


def test_all_values_are_equally_likely(million: Tensor) -> None:
    assert int(million.min()) >= 0
    assert int(million.max()) < 2**philox.BITS
    assert abs(chi_square(million.flatten().bincount(minlength=2**philox.BITS))) < 4
    for residue in range(16):  # each of the places in a counter, by rows and by columns
        for part in (million[..., residue::16, :], million[..., residue::16]):
            assert abs(chi_square(part.flatten().bitwise_right_shift(6).bincount(minlength=2**10))) < 4.5


@pytest.mark.parametrize(("shift", "dim"), NEIGHBOURS)
def test_pairs_of_neighbours_are_equally_likely(million: Tensor, shift: int, dim: int) -> None:
    """The upper five bits of one with those of the other, and likewise the lower five."""
    size = million.shape[dim] - shift
    one, other = million.narrow(dim, 0, size), million.narrow(dim, shift, size)
    for low in (0, philox.BITS - 5):
        pairs = (one >> low & 31) * 32 + (other >> low & 31)
        assert abs(chi_square(pairs.flatten().bincount(minlength=2**10))) < 4.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_is_dropped_is_a_share_of_all_and_independent_of_neighbours(million: Tensor, rate: float) -> None:
    threshold, _factor = philox.dropping(rate)
    share = (million < threshold).double()
    deviation = (rate * (1 - rate) / share.numel()) ** 0.5
    assert abs(share.mean() - rate) < 4 * deviation
    rest = share - share.mean()
    for shift, dim in NEIGHBOURS:
        pairs = share.numel() / (1 if dim < 0 else 2)
        assert abs((rest * rest.roll(shift, dim)).mean()) < 4 * rate * (1 - rate) / pairs**0.5


def test_another_seed_gives_other_bits(million: Tensor) -> None:
    for seed in (2025, 2024 + 2**40):
        other = philox.random_bits(torch.tensor(seed), *grid(2, 2, range(512), range(512)))
        assert abs((other == million).double().mean() - 2.0**-philox.BITS) < 4 * 2.0 ** -(philox.BITS / 2 + 10)


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 0.1, 0.25, 0.5, 0.9, 0.99999, 1 - 1e-12])
def test_the_expectation_is_kept(rate: float) -> None:
    threshold, factor = philox.dropping(rate)
    assert 0 <= threshold < 2**philox.BITS
    assert abs(threshold / 2**philox.BITS - rate) <= 2.0**-philox.BITS
    assert (2**philox.BITS - threshold) * factor == 2**philox.BITS
