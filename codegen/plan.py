"""Device choices: tiles, warps and pipeline stages, from one table.

The first candidate of a row is the default; the others follow in the order in which to try them where a kernel exceeds
shared memory or spills many registers. Rows of sm_90 with 2 bytes an element were measured on an H100
(`benchmarks/results/kernel_tiles.json`): small tiles on four warps win, with and without a mask, since several blocks
then share a multiprocessor and hide each other's softmax; but the backward at head dim 128 gains more from descriptors,
whose loads need neither registers nor warps (docs/measurements.md). Other rows were chosen by what ptxas makes of them
(`benchmarks/static_filter.py`); each has candidates for the 99 KiB of shared memory of sm_86 and sm_89.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial


@dataclass(frozen=True)
class Tile:
    """One kernel's choices: rows of queries and of keys in a tile, warps, and stages of the software pipeline.

    `branch`: mask only the blocks that need it, by a branch in the loop; without it every block is masked, which costs
    instructions and saves what the branch does to the pipeline. `split`: one launch for the key's gradient and another
    for the value's, which recomputes the scores and leaves registers for larger tiles. `tma`: load the blocks of the loop
    through tensor descriptors, where device and strides allow it.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    branch: bool = True
    split: bool = False
    tma: bool = False


@dataclass(frozen=True)
class KernelPlan:
    """Candidates of each kernel, best first; never empty."""

    forward: tuple[Tile, ...]
    grad_query: tuple[Tile, ...]
    grad_key_value: tuple[Tile, ...]
    grad_capture: tuple[Tile, ...]
    decode: tuple[Tile, ...]  # `block_m` is the least
    spills: int = 0

    def bearable(self, tile: Tile) -> int:
        """How many registers a thread of an earlier candidate's kernel may spill before this one is tried."""
        return _LAST_SPILLS if tile in _LAST else self.spills


_T = Tile
_TMA = partial(Tile, tma=True)

# (architecture, bytes an element, padded head dim up to) -> forward, grad_query, grad_key_value
_TABLE: dict[tuple[str, int, int], tuple[tuple[Tile, ...], tuple[Tile, ...], tuple[Tile, ...]]] = {
    ("sm_90", 2, 64): (
        (_T(64, 64, 4, 3), _T(128, 64, 8, 3), _TMA(64, 64, 4, 2)),
        (_T(64, 64, 4, 3), _T(64, 64, 4, 2), _TMA(64, 64, 4, 2)),
        (_T(32, 64, 4, 4), _T(32, 64, 4, 3), _T(64, 64, 8, 2), _T(64, 64, 4, 2), _TMA(64, 64, 4, 2)),
    ),
    ("sm_90", 2, 128): (
        (_T(64, 64, 4, 3), _T(128, 64, 8, 3), _T(64, 64, 4, 2), _TMA(64, 64, 4, 3)),
        (_TMA(128, 64, 8, 3), _T(64, 64, 4, 2), _T(128, 64, 8, 2), _TMA(64, 64, 4, 2)),
        (_TMA(64, 64, 4, 2), _T(32, 64, 4, 3), _T(64, 128, 8, 2), _T(64, 64, 8, 2), _T(64, 64, 8, 1), _TMA(64, 128, 8, 2)),
    ),
    ("sm_90", 2, 256): (
        (_T(64, 64, 4, 3), _T(128, 32, 8, 2), _T(64, 32, 4, 2), _TMA(64, 64, 4, 3), _TMA(128, 64, 8, 2)),
        (_T(128, 32, 8, 2), _T(64, 32, 8, 1), _TMA(128, 32, 8, 2)),
        (_T(32, 32, 4, 2), _T(32, 64, 8, 2), _T(32, 64, 8, 1), _TMA(32, 64, 8, 2)),
    ),
    ("sm_90", 2, 512): (
        (_T(64, 32, 8, 2), _T(32, 32, 8, 2)),
        (_T(64, 32, 8, 1), _T(32, 16, 8, 1)),
        (_T(32, 16, 8, 1), _T(16, 16, 8, 1)),
    ),
    ("sm_90", 4, 64): (
        (_T(128, 32, 8, 2), _T(64, 32, 4, 2)),
        (_T(64, 32, 4, 2),),
        (_T(32, 32, 4, 1), _T(16, 64, 4, 1)),
    ),
    ("sm_90", 4, 128): (
        (_T(64, 32, 4, 2),),
        (_T(64, 16, 4, 1), _T(64, 32, 8, 1)),
        (_T(32, 32, 8, 1),),
    ),
    ("sm_90", 4, 256): ((_T(64, 16, 8, 1),), (_T(16, 16, 4, 1),), (_T(16, 16, 4, 1),)),
    ("sm_80", 2, 64): (
        (_T(128, 64, 4, 3), _T(64, 64, 4, 3)),
        (_T(64, 64, 4, 2), _T(64, 32, 4, 3)),
        (_T(32, 128, 8, 2), _T(32, 128, 8, 1), _T(16, 64, 4, 3)),
    ),
    ("sm_80", 2, 128): (
        (_T(128, 64, 8, 3), _T(64, 64, 4, 2)),
        (_T(64, 64, 8, 2), _T(64, 32, 4, 2)),
        (_T(64, 64, 8, 1), _T(32, 64, 4, 2)),
    ),
    ("sm_80", 2, 256): (
        (_T(128, 32, 8, 2), _T(64, 32, 4, 2), _T(64, 16, 4, 2)),
        (_T(64, 32, 8, 2), _T(64, 32, 8, 1), _T(64, 16, 8, 2)),
        (_T(32, 64, 8, 2), _T(32, 32, 8, 2), _T(16, 32, 4, 2)),
    ),
    ("sm_80", 2, 512): (
        (_T(64, 32, 8, 2), _T(32, 32, 4, 2), _T(16, 32, 4, 1)),
        (_T(32, 32, 8, 1), _T(32, 16, 8, 1)),
        (_T(32, 16, 8, 1), _T(16, 16, 8, 1)),
    ),
    ("sm_80", 4, 64): ((_T(64, 32, 4, 2),), (_T(32, 32, 4, 1),), (_T(32, 32, 4, 1), _T(16, 64, 4, 1))),
    ("sm_80", 4, 128): ((_T(64, 32, 8, 1),), (_T(64, 16, 4, 1),), (_T(32, 32, 8, 1),)),
    ("sm_80", 4, 256): ((_T(32, 16, 4, 1),), (_T(16, 16, 4, 1),), (_T(16, 16, 4, 1),)),
}  # fmt: skip

_LAST = (_T(32, 32, 4, 1), _T(16, 16, 4, 1))  # fit wherever Triton runs
_GRAD_CAPTURE = (_T(64, 64, 8, 1),)
_GRAD_CAPTURE_512 = (_T(64, 32, 8, 1), _T(16, 16, 8, 1))
# Without a mask its loop loads ahead, two stages; a wide tile reads each query and key less often.
_GRAD_CAPTURE_SM90 = (_T(128, 64, 8, 2), _T(64, 64, 8, 2), *_GRAD_CAPTURE)
_STAGES_WITH_ELEMENTS = 3  # of dK/dV on sm_90 at head dim 64: beside four, tiles of a bias leave no room (5.98 to 4.11 ms)
# Documents at head dim 128 on sm_90: short ranges show the beginnings and ends of a program's loop, so that more and smaller
# programs a multiprocessor win (dQ 0.397 to 0.380 ms, dK/dV 0.590 to 0.532 at 16k keys).
_FIRST_IN_SHORT_RANGES = (_TMA(64, 64, 4, 2), _T(32, 64, 4, 3))
_DECODE = (_T(16, 64, 4, 3), _T(16, 32, 4, 2), _T(16, 16, 4, 1))
_TUNED: dict[str, tuple[Tile, ...]] = {  # further candidates under max-autotune; what does not fit or spills drops out
    "forward": (_T(64, 64, 4, 3), _T(128, 64, 8, 3), _T(128, 64, 8, 2), _T(128, 128, 8, 2), _T(64, 32, 4, 3)),
    "grad_query": (_T(64, 64, 4, 3), _T(64, 64, 4, 2), _T(128, 64, 8, 2), _T(64, 32, 4, 3)),
    "grad_key_value": (
        _T(32, 64, 4, 3), _T(64, 128, 8, 2), _T(32, 128, 8, 2), _T(32, 128, 8, 2, split=True), _T(64, 64, 4, 2, split=True)
    ),
}  # fmt: skip
_LAST_SPILLS = 48  # registers a thread
_SPILLS = {"sm_90": 48, "sm_80": 0}  # measured on an H100: 28 cost less than a smaller tile
_INTERPRETER = KernelPlan((_T(32, 16, 1, 1),), (_T(32, 16, 1, 1),), (_T(16, 32, 1, 1),), (_T(16, 16, 1, 1),), (_T(16, 32, 1, 1),))


@lru_cache(maxsize=256)
def kernel_plan(
    capability: tuple[int, int] | None,
    itemsize: int,
    head_dim: int,
    reads_elements: bool = False,
    ranged_by_vectors: bool = False,
) -> KernelPlan:
    """The plan for elements of `itemsize` bytes and the larger of the two (padded) head dims.

    `capability` is the device's (major, minor); None is Triton's interpreter. The rest: as of an AttentionSpec.
    """
    if capability is None:
        return _INTERPRETER
    bucket = next(size for size in (64, 128, 256, 512) if head_dim <= size)
    architecture = "sm_90" if capability[0] == 9 else "sm_80"
    forward, grad_query, grad_key_value = (row + _LAST for row in _TABLE[(architecture, itemsize, bucket)])
    grad_capture: tuple[Tile, ...] = _GRAD_CAPTURE_512 if bucket == 512 else _GRAD_CAPTURE
    if architecture == "sm_90" and itemsize == 2 and bucket <= 128:
        grad_capture = (_T(128, 64, 8, 3), *_GRAD_CAPTURE_SM90) if bucket == 64 else _GRAD_CAPTURE_SM90
    if architecture == "sm_90" and itemsize == 2 and bucket == 64 and reads_elements:
        grad_key_value = tuple(tile for tile in grad_key_value if tile.stages <= _STAGES_WITH_ELEMENTS)
    if architecture == "sm_90" and itemsize == 2 and bucket == 128 and ranged_by_vectors:
        first_query, first_key_value = _FIRST_IN_SHORT_RANGES
        grad_query = tuple(dict.fromkeys((first_query, *grad_query)))
        grad_key_value = tuple(dict.fromkeys((first_key_value, *grad_key_value)))
    return KernelPlan(forward, grad_query, grad_key_value, grad_capture + _LAST, _DECODE, _SPILLS[architecture])


def tuning_candidates(plan: KernelPlan, kernel: str) -> tuple[Tile, ...]:
    """The tiles to be timed for a kernel: those of the plan's own row, and a few of other shapes."""
    own = tuple(tile for tile in getattr(plan, kernel) if tile not in _LAST)
    return own if plan is _INTERPRETER else tuple(dict.fromkeys(own + _TUNED.get(kernel, ())))
