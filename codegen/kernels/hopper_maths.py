"""What generated score functions call, where Gluon wants layouts to be named: in the place of the functions of `maths.py`."""

from flashfuse.codegen.kernels.hopper_api import gl, gluon
from flashfuse.codegen.kernels.maths import philox


@gluon.jit
def random_bits(seed, b, h, m, n):
    """16 bits of Philox for each element of a tile of queries and keys: the same as those of `maths.random_bits`.

    A counter's eight elements lie in one thread of a tensor core's tile, so that no layout here moves anything between threads.
    """
    ROWS: gl.constexpr = m.shape[0]
    COLUMNS: gl.constexpr = n.shape[1]
    counted: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    rows = gl.min(m.reshape([ROWS // 16, 2, 8]), 1)  # those without bit 3
    row = gl.convert_layout(((rows >> 4 << 3) | (rows & 7)).reshape([ROWS // 2, 1]), counted)
    columns = gl.min(gl.min(n.reshape([COLUMNS // 16, 2, 4, 2]), 3), 1)  # those without bits 0 and 3
    column = gl.convert_layout(((columns >> 4 << 2) | (columns >> 1 & 3)).reshape([1, COLUMNS // 4]), counted)
    w0, w1, w2, w3 = philox(seed, column, b, row, h)
    words = gl.join(gl.join(w0, w1), gl.join(w2, w3))  # the last two dimensions are bits 3 and 0 of the columns
    halves = gl.join(words & 0xFFFF, words >> 16)  # bit 3 of the rows
    halves = halves.reshape([ROWS // 16, 8, COLUMNS // 16, 4, 2, 2, 2]).permute((0, 6, 1, 2, 4, 3, 5))
    return gl.convert_layout(halves.reshape([ROWS, COLUMNS]).to(gl.int32), m.type.layout)
