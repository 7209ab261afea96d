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
def philox(seed, c0, c1, c2, c3):
    """The four words of Philox 4x32-7 of each counter, as uint32: see flashfuse/ir/philox.py.

    Upper and lower half come of one 64-bit product: one instruction, where `tl.philox` takes two.
    """
    seed = tl.cast(seed, tl.uint64)
    k0 = tl.cast(seed, tl.uint32)
    k1 = tl.cast(seed >> 32, tl.uint32)
    c0 = tl.cast(c0, tl.uint32)
    c1 = tl.cast(c1, tl.uint32)
    c2 = tl.cast(c2, tl.uint32)
    c3 = tl.cast(c3, tl.uint32)
    for _ in tl.static_range(7):
        first = tl.cast(c0, tl.uint64) * 0xD2511F53
        second = tl.cast(c2, tl.uint64) * 0xCD9E8D57
        c0 = tl.cast(second >> 32, tl.uint32) ^ c1 ^ k0
        c1 = tl.cast(second, tl.uint32)
        c2 = tl.cast(first >> 32, tl.uint32) ^ c3 ^ k1
        c3 = tl.cast(first, tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def half_of(index):
    """For the positions of a tile's side, consecutive from a multiple of 16 on: those without bit 3."""
    SIZE: tl.constexpr = index.shape[0] * index.shape[1]
    low, _high = tl.split(tl.permute(tl.reshape(index, [SIZE // 16, 2, 8]), (0, 2, 1)))
    return tl.reshape(low, [SIZE // 2, 1] if index.shape[1] == 1 else [1, SIZE // 2])


@triton.jit
def random_bits(seed, b, h, m, n):
    """16 bits of Philox for each element of a tile, by its global position (see flashfuse/ir/philox.py).

    Halves of a counter's words go to elements that one thread holds in a tensor core's tile, so that nothing moves between
    threads. In a tile of queries and keys those are all eight; in its transpose bit 0 of n tells two threads apart, each of
    which takes half of the same words. All words pass through one tensor on their way: of two that share what they are made
    of, the compiler would send each through shared memory instead of laying out all as the tile.
    """
    rows = half_of(m)
    row = (rows >> 4 << 3) | (rows & 7)
    columns = half_of(n)
    if n.shape[0] == 1:
        SIZE: tl.constexpr = n.shape[1]
        columns, _odd = tl.split(tl.reshape(columns, [1, SIZE // 4, 2]))
    w0, w1, w2, w3 = philox(seed, (columns >> 4 << 2) | (columns >> 1 & 3), b, row, h)
    ROWS: tl.constexpr = w0.shape[0]
    COLUMNS: tl.constexpr = w0.shape[1]
    if n.shape[0] == 1:
        pairs = tl.join(tl.cast(w0, tl.uint64) << 32 | w1, tl.cast(w2, tl.uint64) << 32 | w3)  # bit 0 of the columns
        words = tl.join(tl.cast(pairs >> 32, tl.uint32), tl.cast(pairs, tl.uint32))  # bit 3 of the columns
        halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS // 8, 8, COLUMNS // 4, 4, 2, 2, 2])  # bit 3 of the rows
        bits = tl.reshape(tl.permute(halves, (0, 6, 1, 2, 5, 3, 4)), [2 * ROWS, 4 * COLUMNS])
    else:
        odd = (columns & 1) != 0
        words = tl.join(tl.where(odd, w2, w0), tl.where(odd, w3, w1))
        halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS // 8, 8, COLUMNS // 8, 8, 2, 2])
        bits = tl.reshape(tl.permute(halves, (0, 4, 1, 2, 5, 3)), [2 * ROWS, 2 * COLUMNS])
    return tl.cast(bits, tl.int32)


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
