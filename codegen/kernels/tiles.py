# ruff: noqa: SIM108 -- a branch on a constexpr must be a statement of its own
"""Loading tiles and walking blocks, for all kernels."""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.plain_score import HAS_GAP  # SPLICE

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW_SCORE = tl.constexpr(-5.0e3)  # rows whose largest kept score is not between this and its opposite take the whole program


@triton.jit
def owned(blocks, heads, section, SWAPPED: tl.constexpr):
    """The block, the batch and the head of this program, of `blocks` a head and `heads` a batch.

    A block of `section` heads follow each other, then the next block. SWAPPED: heads are counted `h * B + b`, not
    `b * H + h` (see `codegen/order.py`).
    """
    whole = blocks * section
    number = tl.program_id(0) % whole
    head = tl.program_id(0) // whole * section + number % section
    if SWAPPED:
        batches = tl.num_programs(0) // (blocks * heads)
        b = head % batches
        h = head // batches
    else:
        b = head // heads
        h = head % heads
    return number // section, b, h


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
def load_block(
    tensor, b, h, first, stride, length, DIM: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The rows from `first` on of a head of `length` rows, `[BLOCK, PAD]`; zero beyond them (TMA or EDGE) and beyond DIM columns.

    `tensor` points to the head; with TMA it is a descriptor of `[1, 1, BLOCK, PAD]` boxes of the whole `[B, H, length, DIM]`.
    """
    if TMA:
        tile = tensor.load([b, h, first, 0]).reshape([BLOCK, PAD])
    else:
        tile = load_tile(tensor + tl.cast(first, tl.int64) * stride, stride, length - first, DIM, BLOCK, PAD, EDGE)
    return tile


@triton.jit
def store_tile(pointer, stride, tile, inside, DIM: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """Store the rows of `[BLOCK, PAD]` that are `inside`, cast to the pointer's type, without columns beyond DIM."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PAD)[None, :]
    mask = inside[:, None] & (column < DIM)
    tl.store(pointer + row * stride + column, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def block_aligned(lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """The first block of a range, and the ends of those of its blocks that lie in the full range as a whole."""
    return lo // BLOCK * BLOCK, (full_lo + BLOCK - 1) // BLOCK * BLOCK, full_hi // BLOCK * BLOCK


@triton.jit
def without_gap(lo, hi, gap_lo, gap_hi, BLOCK: tl.constexpr):
    """The end of a range whose first block is `lo` when its gap is cut out, the gap's first block, and how much is cut out."""
    skipped = 0
    if HAS_GAP:
        gap_lo = tl.maximum((gap_lo + BLOCK - 1) // BLOCK * BLOCK, lo)
        skipped = tl.maximum(tl.minimum(gap_hi // BLOCK * BLOCK, (hi + BLOCK - 1) // BLOCK * BLOCK) - gap_lo, 0)
        hi -= skipped
    return hi, gap_lo, skipped


@triton.jit
def past_gap(step, gap_lo, skipped):
    """The block that a step of the loop over a range without its gap is for."""
    if HAS_GAP:
        step += tl.where(step >= gap_lo, skipped, 0)
    return step


@triton.jit
def with_table(lo, hi, table, first, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Narrow the range of the rows [first, first + BLOCK) by their rows of a range table; the rest is the table's.

    `table` has `blocks` rows, each for ROWS rows of the tensors.
    """
    if BLOCK <= ROWS:
        row = table + first // ROWS * 6
        table_lo = tl.load(row)
        table_hi = tl.load(row + 1)
        full_lo = tl.load(row + 2)
        full_hi = tl.load(row + 3)
        gap_lo = tl.load(row + 4)
        gap_hi = tl.load(row + 5)
    else:
        place = first // ROWS + tl.arange(0, BLOCK // ROWS)
        row = table + place * 6
        table_lo = tl.min(tl.load(row, mask=place < blocks, other=2147483647), 0)
        table_hi = tl.max(tl.load(row + 1, mask=place < blocks, other=0), 0)
        full_lo = tl.max(tl.load(row + 2, mask=place < blocks, other=0), 0)
        full_hi = tl.min(tl.load(row + 3, mask=place < blocks, other=2147483647), 0)
        gap_lo = tl.max(tl.load(row + 4, mask=place < blocks, other=0), 0)
        gap_hi = tl.min(tl.load(row + 5, mask=place < blocks, other=2147483647), 0)
    return tl.maximum(lo, table_lo), tl.minimum(hi, table_hi), full_lo, full_hi, gap_lo, gap_hi
