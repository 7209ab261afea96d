"""Closed-form ranges, interval evaluation of blocks, and rows that cannot be empty, by brute force."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashfuse.ir.affine import is_causal, rows_never_empty
from flashfuse.ir.certainty import block_certainty
from flashfuse.ir.ranges import key_ranges, query_ranges
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, evaluate

sys.path.insert(0, str(Path(__file__).parent))
from programs import Predicates, grid_leaf, on_grid

SHAPES = ((6, 6), (5, 8), (8, 5), (1, 7))


def blocks(length: int) -> list[tuple[int, int]]:
    """All (first, last) of an axis."""
    return [(first, last) for first in range(length) for last in range(first, length)]


def ranges_of(program: ScoreProgram, M: int, N: int, first: Tensor, last: Tensor, **leaves) -> list[Tensor]:
    results = evaluate(program, grid_leaf(M, N, inputs=[first, last], **leaves))
    return [torch.as_tensor(result).expand(first.shape) for result in results]


def check_ranges(keep: ScoreProgram, M: int, N: int, *, along: str, **leaves) -> tuple[bool, list[tuple[int, int, int]]]:
    """Soundness on all blocks; whether the certain range was exact everywhere, and (block, lo, hi) where not tight."""
    found = key_ranges(keep) if along == "n" else query_ranges(keep)
    grid = on_grid(keep, M, N, **leaves)
    grid = grid if along == "n" else grid.mT
    length = grid.shape[1]
    pairs = torch.tensor(blocks(grid.shape[0]))
    lo, hi, full_lo, full_hi, *gap = ranges_of(found.program, M, N, pairs[:, 0], pairs[:, 1], **leaves)
    assert bool(gap) == found.has_gap
    gap_lo, gap_hi = gap or (torch.zeros_like(lo), torch.zeros_like(lo))
    count = torch.arange(length)
    exact, loose = True, []
    for place, (first, last) in enumerate(pairs.tolist()):
        some, every = grid[first : last + 1].any(0), grid[first : last + 1].all(0)
        possible = (count >= lo[place]) & (count < hi[place]) & ~((count >= gap_lo[place]) & (count < gap_hi[place]))
        certain = (count >= full_lo[place]) & (count < full_hi[place])
        assert not (some & ~possible).any(), f"block {first}..{last}: a kept element lies outside the range"
        assert not (certain & ~every).any(), f"block {first}..{last}: not everything in the certain range is kept"
        assert full_lo[place] >= 0
        assert full_hi[place] <= length
        assert gap_lo[place] >= 0
        assert gap_hi[place] <= length
        exact &= torch.equal(certain, every)
        if not torch.equal(some, possible):
            loose.append((place, int(lo[place]), int(hi[place])))
    return exact, loose


@pytest.mark.parametrize("seed", range(250))
def test_random_predicates(seed: int) -> None:
    keep = Predicates(seed).program()
    for (M, N), along in itertools.product(SHAPES, "nm"):
        check_ranges(keep, M, N, along=along, sizes=[seed % 5])


@pytest.mark.parametrize("seed", range(150))
def test_certain_range_of_a_conjunction_is_exact(seed: int) -> None:
    keep = Predicates(seed).conjunction(1 + seed % 4)
    for (M, N), along in itertools.product(SHAPES, "nm"):
        assert (key_ranges(keep) if along == "n" else query_ranges(keep)).closed
        exact, loose = check_ranges(keep, M, N, along=along)
        assert exact
        if seed % 4 == 0:  # one comparison: the possible range is exact too
            assert not loose


def shapes_of_masks() -> dict[str, ScoreProgram]:
    builder = Builder()
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    M, N = builder.leaf("length", "M"), builder.leaf("length", "N")
    size = builder.leaf("size", 0, Kind.INT)

    def chunk(index: Value, width: int) -> Value:
        return index.apply("floordiv", index, width)

    return {
        name: builder.program(keep)
        for name, keep in {
            "causal": n <= m, "causal_end": n <= m + (N - M), "window": (n <= m) & (m - n < 3),
            "window_of_size": (n <= m) & (m < n + size), "band": (n - m <= 2) & (m - n <= 1),
            "prefix": (n <= m) | (n < size), "anti_causal": m.apply("not", n <= m),
            "chunked": (n <= m) & chunk(m, 3).eq(chunk(n, 3)), "block_causal": chunk(n, 2) <= chunk(m, 2),
            "two_chunks": (chunk(m, 2) - chunk(n, 2) <= 1) & (chunk(n, 2) <= chunk(m, 2)),
            "chunks_from_size": chunk(m + size, 4).eq(chunk(n + 1, 4)), "chunks_of_the_end": chunk(n, 2) < chunk(m + (N - M), 3),
            "sinks": (n <= m) & ((n < 2) | (m - n < 2)), "global_local": (n < 1) | (m < 1) | ((m - n <= 1) & (n - m <= 1)),
            "two_strips": (n < 1) | ((n >= m - 3) & (n <= m - 2)) | (n > m + 3), "not_itself": m.apply("ne", m, n),
        }.items()
    }  # fmt: skip


UNIONS = ("prefix", "sinks", "global_local", "two_strips", "not_itself")


@pytest.mark.parametrize("name", shapes_of_masks())
def test_usual_masks_have_exact_ranges(name: str) -> None:
    keep = shapes_of_masks()[name]
    for (M, N), along in itertools.product(SHAPES, "nm"):
        assert (key_ranges(keep) if along == "n" else query_ranges(keep)).closed
        exact, loose = check_ranges(keep, M, N, along=along, sizes=[2])
        if name not in UNIONS:  # a union need not be one stretch
            assert exact
        if name not in ("two_strips", "not_itself", "chunks_of_the_end"):
            assert not loose, (M, N, along, loose)


def test_prefix_takes_the_longer_certain_stretch() -> None:
    keep = shapes_of_masks()["prefix"]
    first, last = torch.tensor([0, 4]), torch.tensor([1, 5])
    lo, hi, full_lo, full_hi = ranges_of(key_ranges(keep).program, 6, 6, first, last, sizes=[3])
    assert (lo.tolist(), hi.tolist()) == ([0, 0], [3, 6])
    assert (full_lo.tolist(), full_hi.tolist()) == ([0, 0], [3, 5])


def test_what_cannot_be_solved_is_possible_everywhere() -> None:
    builder = Builder()
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    unsolved = builder.program((m - n).apply("mod", m - n, 2).eq(0))
    found = key_ranges(unsolved)
    assert not found.closed
    lo, hi, full_lo, full_hi = ranges_of(found.program, 6, 8, torch.tensor([1]), torch.tensor([2]))
    assert (lo.item(), hi.item()) == (0, 8)
    assert full_lo.item() >= full_hi.item()
    both = builder.program(((m - n).apply("mod", m - n, 2).eq(0)) & (n <= m))
    lo, hi, _, _ = ranges_of(key_ranges(both).program, 6, 8, torch.tensor([1]), torch.tensor([2]))
    assert (lo.item(), hi.item()) == (0, 3)


def test_uniform_loads_bound_ranges() -> None:
    builder = Builder()
    b, n = builder.leaf("index", "b"), builder.leaf("index", "n")
    keep = builder.program(n < builder.leaf("load", 0, Kind.INT, (b,)))
    assert key_ranges(keep).closed
    exact, loose = check_ranges(keep, 4, 6, along="n", captures=[torch.tensor([4])])
    assert exact
    assert not loose


# ------------------------------------------------------------------------------------------------ interval evaluation


def captured(seed: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(0, 4, (length,), generator=generator)
    return [documents.sort().values if seed % 2 else documents, torch.rand(length, generator=generator) < 0.7]


@pytest.mark.parametrize("seed", range(150))
def test_certainty_of_all_blocks(seed: int) -> None:
    keep = Predicates(seed, vectors=True).program()
    certainty = block_certainty(keep)
    for M, N in SHAPES[:3]:
        captures = captured(seed, max(M, N))
        leaves = {"captures": captures, "sizes": [seed % 5]}
        grid = on_grid(keep, M, N, **leaves)
        for (m0, m1), (n0, n1) in itertools.product(blocks(M)[::2], blocks(N)[::3]):
            inputs = []
            for bounded in certainty.inputs:
                first, last = (m0, m1) if bounded.letter == "m" else (n0, n1)
                whole = torch.arange(max(M, N)) if bounded.statement.op == "index" else captures[bounded.statement.attribute]
                block = whole[first : last + 1]
                inputs.append(block.amax() if bounded.high else block.amin())
            results = evaluate(certainty.program, grid_leaf(M, N, inputs=inputs, **leaves))
            certain, possible = (bool(result) for result in results)
            block = grid[m0 : m1 + 1, n0 : n1 + 1]
            assert not certain or block.all()
            assert possible or not block.any()


def test_certainty_of_documents_is_sharp_on_sorted_vectors() -> None:
    builder = Builder()
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    keep = builder.program(
        builder.leaf("load", 0, Kind.INT, (m,)).eq(builder.leaf("load", 0, Kind.INT, (n,))) & (n <= m)
    )
    certainty = block_certainty(keep)
    assert {bounded.letter for bounded in certainty.inputs} == {"m", "n"}

    def outcome(documents: tuple[int, int, int, int], positions: tuple[int, int, int, int]) -> tuple[bool, bool]:
        inputs = []
        for bounded in certainty.inputs:
            source = positions if bounded.statement.op == "index" else documents
            inputs.append(torch.tensor(source[(0 if bounded.letter == "m" else 2) + bounded.high]))
        certain, possible = evaluate(certainty.program, grid_leaf(8, 8, inputs=inputs))
        return bool(certain), bool(possible)

    assert outcome((1, 1, 1, 1), (4, 7, 0, 3)) == (True, True)
    assert outcome((1, 2, 1, 1), (4, 7, 0, 3)) == (False, True)
    assert outcome((2, 2, 0, 1), (4, 7, 0, 3)) == (False, False)
    assert outcome((1, 1, 1, 1), (0, 3, 4, 7)) == (False, False)


# ------------------------------------------------------------------------------------------------ empty rows


@pytest.mark.parametrize("seed", range(400))
def test_rows_never_empty_is_sound(seed: int) -> None:
    make = Predicates(seed, vectors=seed % 2 == 0)
    keep = make.program()
    for square in (True, False):
        if not rows_never_empty(keep, square=square):
            continue
        for M, N in ((5, 5), (1, 1), (8, 8)) if square else ((5, 5), (3, 7), (7, 3), (1, 1)):
            for size in (0, 2, 9):
                grid = on_grid(keep, M, N, sizes=[size], captures=captured(seed, 8))
                assert grid.any(-1).all(), (keep.formula(), M, N)


def test_rows_never_empty_knows_the_usual_masks() -> None:
    usual = shapes_of_masks()
    assert rows_never_empty(usual["causal"], square=True)
    assert rows_never_empty(usual["window"], square=True)
    assert rows_never_empty(usual["causal"], square=False)  # key 0
    assert not rows_never_empty(usual["causal_end"], square=False)
    assert not rows_never_empty(usual["anti_causal"], square=True)


def test_causal_is_recognised_however_it_is_written() -> None:
    builder = Builder()
    n, zero, m = builder.leaf("index", "n"), builder.const(0), builder.leaf("index", "m")
    for way in (n <= m, m >= n, n < m + 1, builder.op("not", n > m), (n - m) <= zero, builder.op("not", (m - n) < zero)):
        assert is_causal(builder.program(way))
    for other in (n < m, n <= m + 1, m <= n, n.eq(m), builder.op("not", n <= m), (n <= m) & (n < 3), n <= 5):
        assert not is_causal(builder.program(other))
