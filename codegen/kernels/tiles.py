"""Loading tiles and walking blocks, for all kernels."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW_SCORE = tl.constexpr(-1.5e4)  # rows whose largest kept score is not above this take the whole program


@triton.jit
def load_tile(pointer, stride, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr):
    """`[BLOCK, PAD]` elements from `pointer`, zero beyond `rows` (if EDGE) and beyond DIM columns."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PAD)[None, :]
    address = pointer + row * stride + column
    if EDGE:
        if DIM == PAD:
            tile = tl.load(address, mask=row < rows, other=0.0)
        else:
            tile = tl.load(address, mask=(row < rows) & (column < DIM), other=0.0)
    else:
        if DIM == PAD:
            tile = tl.load(address)
        else:
            tile = tl.load(address, mask=column < DIM, other=0.0)
    return tile


@triton.jit
def store_tile(pointer, stride, tile, inside, DIM: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """Store the rows of `[BLOCK, PAD]` that are `inside`, cast to the pointer's type, without columns beyond DIM."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PAD)[None, :]
    mask = inside[:, None] & (column < DIM)
    tl.store(pointer + row * stride + column, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def block_aligned(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Ends of three runs of whole blocks: partial [lo, full_lo), full [full_lo, full_hi), partial [full_hi, hi)."""
    # The grid is one deep on axis 2, which the compiler cannot know. If it knew that a run begins at 0 it would treat the
    # first loop's accumulators apart, and ptxas would serialise every wgmma of the kernel (advisory C7515).
    lo = lo // BLOCK * BLOCK + tl.num_programs(2) - 1
    full_lo = tl.maximum((full_lo + BLOCK - 1) // BLOCK * BLOCK, lo)
    full_hi = tl.minimum(full_hi, hi) // BLOCK * BLOCK
    none = full_lo >= full_hi
    full_lo = tl.where(none, lo, full_lo)
    full_hi = tl.where(none, lo, full_hi)
    return lo, hi, full_lo, full_hi


@triton.jit
def with_table(lo, hi, full_lo, full_hi, row):
    """Narrow a range by the row of a range table; the table's full run is the wider proof."""
    return (
        tl.maximum(lo, tl.load(row)),
        tl.minimum(hi, tl.load(row + 1)),
        tl.load(row + 2),
        tl.load(row + 3),
    )
