"""The functions that emission generates from a spec, for plain attention: the final score is the raw score, without sink
or weight.

The kernel files import them by the line marked SPLICE; emission puts generated ones in its place. All work on tiles of
any layout: `m` and `n` are int32 tensors that broadcast to the tile (`[BLOCK, 1]` and `[1, BLOCK]` or the reverse),
`inside_m` and `inside_n` say in the same way where they are real rows and columns, `inputs` holds captures, their
strides and sizes.
"""

import triton
import triton.language as tl

from flashfuse.codegen.kernels.maths import like

SCALE = tl.constexpr(1.0)  # natural units in a unit of what `kept_score` returns
FACTOR = tl.constexpr(1.4426950408889634)  # SCALE * log2(e)
HAS_SINK = tl.constexpr(False)  # whether rows have a sink
HAS_CHOICES = tl.constexpr(False)  # whether `weighted` puts zeros in the place of probabilities, NaN or not
LOADS_AHEAD = tl.constexpr(False)  # whether `kept_score` loads elements at keys
HAS_GAP = tl.constexpr(False)  # whether ranges of keys or queries can have a gap


def named(kernel):
    """Under which name a profiler shows a kernel: what it computes and the head dim (Triton's `repr` of a kernel)."""
    return lambda made_for: f"{kernel}_plain_d{made_for.constants.get('D', 0)}"


@triton.jit
def score(s, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """The final score from the raw score, masks and all, in natural units."""
    return s


@triton.jit
def kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """The final score of an element that the mask keeps, in units of SCALE."""
    return s


@triton.jit
def keep(b, h, m, n, inside_m, inside_n, M, N, inputs):
    """Whether the mask keeps an element."""
    return inside_m & inside_n


@triton.jit
def load_ahead(b, h, m, n, inside_m, inside_n, M, N, inputs):
    """What `kept_score` loads at keys, a tuple."""
    return (0,)


@triton.jit
def kept_score_of(s, loaded, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """`kept_score` from what `load_ahead` gave."""
    return kept_score(s, b, h, m, n, inside_m, inside_n, M, N, inputs)


@triton.jit
def score_gradient(s, grad, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """Gradient of the raw score from that of `score`."""
    return grad


@triton.jit
def kept_gradient(s, grad, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """Gradient of the raw score from that of `kept_score`, in units of 1 / SCALE."""
    return grad


@triton.jit
def sink_score(b, h, m, inside_m, M, N, inputs):
    """The sink of rows, in natural units."""
    return like(0.0, m)


@triton.jit
def weighted(p, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """What a probability, divided by the row's sum or not, is multiplied with the value as."""
    return p


@triton.jit
def weight_gradient(p, grad, b, h, m, n, inside_m, inside_n, M, N, inputs):
    """Gradient of a probability from that of `weighted`."""
    return grad


@triton.jit
def key_range(first, last, b, h, M, N, inputs):
    """For queries first..last: keys outside [lo, hi) or inside [gap_lo, gap_hi) are never kept, those in full always.

    Returned in the order lo, hi, full_lo, full_hi, gap_lo, gap_hi.
    """
    return 0, N, 0, N, 0, 0


@triton.jit
def query_range(first, last, b, h, M, N, inputs):
    """The same with queries and keys exchanged."""
    return 0, M, 0, M, 0, 0


# Gradients of captures. Sums over keys (`row`, in the dq kernel) and over queries (`column`, in the dkdv kernel) are
# tuples with one vector a capture; a capture that has an element for each query and key gets `tile_gradient`. `grad` is the
# gradient of the final score, `dp` that of the weighted probability.


@triton.jit
def start_row_sums(BLOCK: tl.constexpr):
    """Zeros to add to."""
    return ()


@triton.jit
def add_row_sums(sums, kept, s, grad, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, WHOLE: tl.constexpr):
    """Add the sums over axis 1, where `kept`, of the gradients of loaded elements."""
    return sums


@triton.jit
def add_sink_sums(sums, grad, b, h, m, inside_m, M, N, inputs):
    """Add the gradients of loaded elements from `grad`, that of the rows' sinks."""
    return sums


@triton.jit
def store_row_sums(sums, partial, plane, inside):
    """Store vector i at `partial + i * plane`."""
    return


@triton.jit
def load_column_sums(partial, plane, inside):
    """What `store_column_sums` stored."""
    return ()


@triton.jit
def start_column_sums(BLOCK: tl.constexpr):
    """Zeros to add to."""
    return ()


@triton.jit
def add_column_sums(sums, kept, s, grad, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, WHOLE: tl.constexpr):
    """Add the sums over axis 1, where `kept`, of the gradients of loaded elements."""
    return sums


@triton.jit
def store_column_sums(sums, partial, plane, inside):
    """Store vector i at `partial + i * plane`."""
    return


@triton.jit
def tile_gradient(
    s, grad, p, dp, b, h, m, n, inside_m, inside_n, M, N, inputs, CAPTURE: tl.constexpr, WHOLE: tl.constexpr
):
    """Gradient of the elements of capture number CAPTURE."""
    return like(0.0, s)


# Block bounds of the vectors in the mask, and what can be told from them.


@triton.jit
def store_query_bounds(bounds, plane, b, h, m, inside_m, M, N, inputs):
    """Store the smallest and largest value of vector i in a block of queries at plane 2 i and 2 i + 1."""
    return


@triton.jit
def store_key_bounds(bounds, plane, b, h, n, inside_n, M, N, inputs):
    """The same for a block of keys."""
    return


@triton.jit
def block_certainty(queries, query_plane, keys, key_plane, inside, b, h, M, N, inputs):
    """(certain, possible): whether all, and whether any, of a block of queries and keys are kept."""
    return inside, inside
