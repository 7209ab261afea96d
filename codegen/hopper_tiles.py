"""Tiles of the Hopper forward: one table by head dims, one of small tiles for kinds of specs that want them."""

from __future__ import annotations

from dataclasses import dataclass

from flashfuse.ir.attention_spec import AttentionSpec

ROWS = 64  # queries of one consumer


@dataclass(frozen=True)
class HopperTile:
    """Consumers of 64 queries each, keys in a block, stages of the pipeline, and a consumer's registers."""

    consumers: int
    block_n: int
    stages: int
    registers: int
    staged: bool  # results leave through shared memory of their own
    queries: int = 1  # tiles whose queries are in shared memory at once: with two the loader runs ahead into the next tile

    @property
    def block_m(self) -> int:
        """Queries in a tile."""
        return self.consumers * ROWS


_T = HopperTile
Dims = tuple[int, int]  # head dims of query and value, as the kernel pads them

# head dims up to -> tiles, the fastest first; 227 KiB of shared memory and 64 Ki registers bound them
TILES: dict[Dims, tuple[HopperTile, ...]] = {
    (64, 64): (_T(3, 128, 2, 160, True, 2), _T(2, 128, 4, 240, True), _T(3, 64, 8, 160, True, 2)),
    (96, 96): (_T(2, 128, 3, 240, True), _T(2, 64, 4, 240, True, 2)),
    (128, 128): (_T(2, 128, 2, 240, True), _T(2, 64, 4, 240, True, 2)),
    (192, 128): (_T(2, 128, 2, 240, False), _T(2, 64, 3, 240, True)),
    (192, 192): (_T(2, 64, 3, 240, False),),
    (256, 128): (_T(2, 64, 3, 240, False),),
    (256, 256): (_T(2, 64, 2, 240, False),),
}

# The same for specs of a kind (`kind_of`): blocks of 64 keys waste less at both ends of a range and leave registers for
# dropout, and two buffers of queries, since much of a short tile's time is what stands before its first product.
SMALL_TILES: dict[Dims, tuple[HopperTile, ...]] = {
    (64, 64): (_T(3, 64, 8, 160, True, 2), _T(2, 64, 8, 240, True, 2), _T(2, 128, 4, 240, True, 2)),
    (128, 128): (_T(2, 64, 4, 240, True, 2), _T(3, 64, 4, 160, True, 1), _T(2, 128, 2, 240, True, 2)),
}

# Kinds of specs and rows of tiles that were timed and found faster than the portable kernel: other specs of a kind are left to
# that unless options ask.
SERVED: frozenset[tuple[str, Dims]] = frozenset()

# Rows of tiles where scores that load an element for each query and key were timed and found slower: 2.8 and 2.4 ms with
# Evoformer's pair bias (B = 4, S = 4096, 32 heads), on the portable kernel 1.9.
SLOW_WITH_ELEMENTS: frozenset[Dims] = frozenset({(64, 64)})


def parts(head_dim: int) -> tuple[int, ...]:
    """The powers of two, one or two, in which the kernel takes a head dim: the least sum that holds it."""
    whole = max(64, 1 << (head_dim - 1).bit_length())
    return (whole // 2, whole // 4) if 64 < head_dim <= whole * 3 // 4 else (whole,)


def row_of(spec: AttentionSpec, dims: Dims) -> tuple[Dims, tuple[HopperTile, ...]]:
    """The row of tiles for a spec and head dims: what it goes up to, and its tiles; no tiles where there is no row."""
    for table in (SMALL_TILES, TILES) if kind_of(spec) else (TILES,):
        for most, tiles in table.items():
            if dims[0] <= most[0] and dims[1] <= most[1]:
                return most, tiles
    return dims, ()


def tiles_of(spec: AttentionSpec, dims: Dims) -> tuple[HopperTile, ...]:
    """The tiles for a spec and head dims, the fastest first."""
    return row_of(spec, dims)[1]


def serving() -> list[tuple[HopperTile, Dims, bool]]:
    """What serves without being asked for: tiles, head dims, and whether with dropout."""
    usual = [(tile, dims, False) for dims, tiles in TILES.items() for tile in tiles]
    of_a_kind = [
        (tile, dims, kind == "dropout") for kind, dims in sorted(SERVED) for tile in SMALL_TILES.get(dims, TILES.get(dims, ()))
    ]
    return list(dict.fromkeys(usual + of_a_kind))


def kind_of(spec: AttentionSpec) -> str:
    """What sets a spec apart: "dropout", or that queries see few keys near themselves, "documents" and "window"; else nothing.

    A window's range has a lower end that moves with the query; so has a chunk's.
    """
    if draws(spec):
        return "dropout"
    if spec.ranged_by_vectors:
        return "documents"
    found = spec.key_ranges
    moves = found is not None and found.program.statements[found.program.results[0]].op != "const"
    return "window" if moves else ""


def grows(spec: AttentionSpec) -> bool:
    """Whether later queries see more keys, as under a causal mask, so that many tiles are short."""
    found = spec.key_ranges
    return found is not None and found.program.statements[found.program.results[1]].op not in ("const", "length")


def draws(spec: AttentionSpec) -> bool:
    """Whether a spec draws random numbers."""
    return spec.weight is not None and spec.weight.uses("random_bits")
