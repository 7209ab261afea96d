"""The check that the Hopper forward must pass on a machine before it is trusted: a small attention against the CPU path."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from flashfuse import chunked_attention
from flashfuse.codegen import hopper
from flashfuse.codegen.emit import module_text
from flashfuse.ir import philox
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind

if TYPE_CHECKING:
    from flashfuse.codegen.hopper_tiles import Dims, HopperTile

_WINDOW = 300  # keys: blocks masked at either end and a full one between, whatever the tile, and blocks that only others need
_PROGRAMS = 3  # so that each takes many tiles, and every buffer is filled many times
_TOLERANCE = 2e-2  # bfloat16 outputs below 4, which are rounded by at most 2^-7, of probabilities rounded by a share of 2^-9


def window_spec(dropout: bool) -> AttentionSpec:
    """A causal sliding window with a scale, and with `dropout` of 1/4 by a captured seed."""
    builder = Builder()
    b, h, m, n = (builder.leaf("index", letter) for letter in "bhmn")
    score = builder.leaf("score") * 0.125
    kept = builder.program(score.apply("where", (n <= m) & (m - n < _WINDOW), score, float("-inf")))
    if not dropout:
        return AttentionSpec(kept, (), EmptyRows.IMPOSSIBLE)
    bits = builder.op("random_bits", builder.leaf("load", 0, Kind.INT, ()), b, h, m, n)
    weight = builder.leaf("probability") * score.apply("where", bits < 2 ** (philox.BITS - 2), 0.0, 4 / 3)
    return AttentionSpec(kept, (Capture("seed", Kind.INT, 0),), EmptyRows.IMPOSSIBLE, weight=builder.program(weight))


def identity(device: torch.device, tile: HopperTile, dims: Dims, dropout: bool) -> str:
    """What the outcome depends on, as a word: the device, the compilers and the kernel."""
    import triton

    facts = (torch.cuda.get_device_name(device), torch.__version__, triton.__version__, tile, dims, _PROGRAMS)
    return hashlib.sha256(f"{facts}{module_text(window_spec(dropout), True, True)}".encode()).hexdigest()[:16]


def fault(device: torch.device, tile: HopperTile, dims: Dims, dropout: bool) -> str:
    """What is wrong with the kernel's result, or nothing: many tiles, a tail, grouped heads, every row's statistics."""
    from flashfuse.codegen.launch import Call

    generator = torch.Generator().manual_seed(0)
    length = 2 * tile.block_m + 2 * tile.block_n + 37
    shapes = [(2, heads, length, dim) for heads, dim in ((4, dims[0]), (2, dims[0]), (2, dims[1]))]
    query, key, value = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes)
    value *= 0.5
    spec = window_spec(dropout)
    seed = [torch.tensor(2**40 + 7)] if dropout else []
    wanted = torch.empty(2, 4, length, dims[1], dtype=torch.float64)
    wanted_stats = chunked_attention.forward(spec, query.double(), key.double(), value.double(), seed, (), wanted)
    try:
        with torch.cuda.device(device):
            call = Call(spec, query.to(device), key.to(device), value.to(device), [each.to(device) for each in seed], ())
            out = torch.empty(2, 4, length, dims[1], dtype=query.dtype, device=device)
            stats = torch.empty(1, 2, 4, length, device=device)
            hopper.launch(call, out, stats, tile, _PROGRAMS)
            differences = [
                float((got.cpu().double() - right).abs().max()) for got, right in ((out, wanted), (stats, wanted_stats))
            ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # see hopper.forward
        return f"{type(error).__name__}: {error}".splitlines()[0]
    wrong = [difference for difference in differences if not difference <= _TOLERANCE]  # NaN is wrong, too
    return f"results differ by {max(wrong):.3g}" if wrong else ""
