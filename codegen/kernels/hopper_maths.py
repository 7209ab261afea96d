"""What generated score functions call, where Gluon wants layouts to be named: in the place of the functions of `maths.py`."""

import triton.language as tl

from flashfuse.codegen.kernels.hopper_api import gl, gluon


@gluon.jit
def place_of(index):
    """For the positions of a tile's side, consecutive from a multiple of 16 on: those without bit 3, counted without it."""
    SIZE: gl.constexpr = index.shape[0] * index.shape[1]
    low = gl.min(index.reshape([SIZE // 16, 2, 8]), 1)  # both of a pair lie in one thread
    return (low >> 4 << 3) | (low & 7)


@gluon.jit
def random_bits(seed, b, h, m, n):
    """30 bits of Philox for each element of a tile of queries and keys: the same as those of `maths.random_bits`.

    A counter's four elements lie in one thread of a tensor core's tile, so that no layout here moves anything between threads.
    """
    ROWS: gl.constexpr = m.shape[0]
    COLUMNS: gl.constexpr = n.shape[1]
    counted: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    row = gl.convert_layout(place_of(m).reshape([ROWS // 2, 1]), counted)
    column = gl.convert_layout(place_of(n).reshape([1, COLUMNS // 2]), counted)
    w0, w1, w2, w3 = tl.philox(seed, column, row, tl.cast(b, tl.int32), tl.cast(h, tl.int32))
    words = gl.join(gl.join(w0, w1), gl.join(w2, w3))  # the last two dimensions are bit 3 of columns and of rows
    words = words.reshape([ROWS // 16, 8, COLUMNS // 16, 8, 2, 2]).permute((0, 5, 1, 2, 4, 3)).reshape([ROWS, COLUMNS])
    return gl.convert_layout((words >> 2).to(gl.int32), m.type.layout)
