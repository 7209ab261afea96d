# ruff: noqa: SIM108 -- a branch on a constexpr must be a statement of its own
"""What generated score functions call beyond operators: each with the meaning of the torch function of its row."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent, absolute error about 1e-7."""
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def tanh_approximate(x):
    """The one-instruction hyperbolic tangent, relative error 2^-11: as good as 16-bit scores are."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def minimum(a, b):
    """The smaller one; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """The larger one; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def floormod(a, b):
    """Remainder with the sign of the divisor."""
    a = a + tl.cast(0, tl.int32)  # a tensor, even if the argument is a constant
    b = b + tl.cast(0, tl.int32)
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floordiv(a, b):
    """Quotient rounded towards minus infinity."""
    a = a + tl.cast(0, tl.int32)  # a tensor, even if the argument is a constant
    b = b + tl.cast(0, tl.int32)
    return (a - floormod(a, b)) // b


@triton.jit
def not_(a):
    """Logical not."""
    return a == 0


@triton.jit
def to_float(a):
    """As float32."""
    return tl.cast(a, tl.float32)


@triton.jit
def to_int(a):
    """Rounded towards zero; booleans become 0 and 1."""
    return tl.cast(a, tl.int32)


@triton.jit
def counters(index):
    """For the positions of a tile's side, consecutive from a multiple of 16 on: those without bit 3, counted without it."""
    SIZE: tl.constexpr = index.shape[0] * index.shape[1]
    low, _high = tl.split(tl.permute(tl.reshape(index, [SIZE // 16, 2, 8]), (0, 2, 1)))
    low = tl.reshape(low, [SIZE // 2, 1] if index.shape[1] == 1 else [1, SIZE // 2])
    return (low >> 4 << 3) | (low & 7)


@triton.jit
def random_bits(seed, b, h, m, n):
    """30 bits of Philox for each element of a tile, by its global position (see flashfuse/ir/philox.py).

    The four words of a counter go to elements that one thread holds in a tensor core's tile, transposed or not.
    """
    w0, w1, w2, w3 = tl.philox(seed, counters(n), counters(m), tl.cast(b, tl.int32), tl.cast(h, tl.int32))
    if n.shape[0] == 1:
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # the last two dimensions are bit 3 of columns and of rows
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    ROWS: tl.constexpr = w0.shape[0]
    COLUMNS: tl.constexpr = w0.shape[1]
    words = tl.permute(tl.reshape(words, [ROWS // 8, 8, COLUMNS // 8, 8, 2, 2]), (0, 5, 1, 2, 4, 3))
    return tl.cast(tl.reshape(words, [2 * ROWS, 2 * COLUMNS]) >> 2, tl.int32)


@triton.jit
def wide(a):
    """As int64, for products and sizes that could leave 32 bits."""
    return tl.cast(a, tl.int64)


@triton.jit
def offset(index, stride):
    """How many elements into a tensor."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def like(x, tile):
    """`x` with the shape of `tile`."""
    return tl.where(tile == tile, x, x)  # of which the compiler leaves nothing but the shape


@triton.jit
def bound(x, length):
    """A range's end, forced into [0, length]."""
    return tl.cast(tl.maximum(tl.minimum(x, length), 0), tl.int32)


@triton.jit
def lowest_int(x, inside):
    """The smallest value of a vector of integers or booleans, as int64."""
    return tl.min(tl.where(inside, tl.cast(x, tl.int64), 9223372036854775807), 0)


@triton.jit
def highest_int(x, inside):
    """The largest value of a vector of integers or booleans, as int64."""
    return tl.max(tl.where(inside, tl.cast(x, tl.int64), -9223372036854775807), 0)


@triton.jit
def lowest_float(x, inside):
    """The bits of the smallest value of a vector; minus infinity if one of them is NaN, so that nothing is certain."""
    return to_bits(tl.min(tl.where(inside, tl.where(x != x, float("-inf"), x), float("inf")), 0))


@triton.jit
def highest_float(x, inside):
    """The bits of the largest value of a vector; infinity if one of them is NaN."""
    return to_bits(tl.max(tl.where(inside, tl.where(x != x, float("inf"), x), float("-inf")), 0))


@triton.jit
def to_bits(x):
    """A float32 as an int64 that holds its bits."""
    return tl.cast(tl.cast(x, tl.int32, bitcast=True), tl.int64)


@triton.jit
def from_bits(x):
    """The float32 that `to_bits` stored."""
    return tl.cast(tl.cast(x, tl.int32), tl.float32, bitcast=True)
