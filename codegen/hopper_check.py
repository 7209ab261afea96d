"""The checks that the Hopper kernels must pass on a machine before they are trusted: a small attention against the CPU path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashfuse import chunked_attention
from flashfuse.codegen import hopper, hopper_backward
from flashfuse.codegen.emit import module_text
from flashfuse.ir import philox
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind

if TYPE_CHECKING:
    from flashfuse.codegen.hopper_tiles import Dims, HopperTile

_WINDOW = 300  # keys: blocks masked at either end and a full one between, whatever the tile, and blocks that only others need
_PROGRAMS = 3  # so that each takes many tiles, and every buffer is filled many times
_TOLERANCE = 1e-2  # of the largest number: bfloat16 rounds it by a share of 2^-9, and probabilities before it


def window_spec(dropout: bool) -> AttentionSpec:
    """A causal sliding window with a scale, and with `dropout` of 1/4 by a captured seed."""
    builder = Builder()
    b, h, m, n = (builder.leaf("index", letter) for letter in "bhmn")
    score = builder.leaf("score") * 0.125
    kept = builder.program(score.apply("where", (n <= m) & (m - n < _WINDOW), score, float("-inf")))
    if not dropout:
        return AttentionSpec(kept, (), EmptyRows.IMPOSSIBLE)
    bits = builder.op("random_bits", builder.leaf("load", 0, Kind.INT, ()), b, h, m, n)
    threshold, factor = philox.dropping(0.25)
    weight = builder.leaf("probability") * score.apply("where", bits < threshold, 0.0, factor)
    return AttentionSpec(kept, (Capture("seed", Kind.INT, 0),), EmptyRows.IMPOSSIBLE, weight=builder.program(weight))


def identity(device: torch.device, tile: HopperTile, dims: Dims, dropout: bool) -> str:
    """What the outcome depends on, as a word: the device, the compilers and the kernel."""
    return _word(window_spec(dropout), device, tile, dims)


def backward_identity(device: torch.device, head_dim: int) -> str:
    """The same for the backward."""
    return _word(window_spec(dropout=False), device, "backward", head_dim)


def _word(spec: AttentionSpec, device: torch.device, *facts: object) -> str:
    import triton

    machine = (torch.cuda.get_device_name(device), torch.__version__, triton.__version__)
    return hashlib.sha256(f"{machine}{facts}{_PROGRAMS}{module_text(spec, True, True)}".encode()).hexdigest()[:16]


def fault(device: torch.device, tile: HopperTile, dims: Dims, dropout: bool) -> str:
    """What is wrong with the forward's result, or nothing: many tiles, a tail, grouped heads, every row's statistics."""
    from flashfuse.codegen.launch import Call

    length = 2 * tile.block_m + 2 * tile.block_n + 37
    query, key, value, _grad = _tensors(length, dims)
    spec = window_spec(dropout)
    seed = [torch.tensor(2**40 + 7)] if dropout else []
    wanted = torch.empty(2, 4, length, dims[1], dtype=torch.float64)
    wanted_stats = chunked_attention.forward(spec, query.double(), key.double(), value.double(), seed, (), wanted)

    def run() -> list[Tensor]:
        call = Call(spec, query.to(device), key.to(device), value.to(device), [each.to(device) for each in seed], ())
        out = torch.full((2, 4, length, dims[1]), float("nan"), dtype=query.dtype, device=device)
        stats = torch.full((1, 2, 4, length), float("nan"), device=device)
        hopper.launch(call, out, stats, tile, _PROGRAMS)
        return [out, stats]

    return _compared(device, run, [wanted, wanted_stats])


def backward_fault(device: torch.device, head_dim: int) -> str:
    """What is wrong with the backward's gradients, or nothing: many blocks, tails, grouped heads."""
    from flashfuse.codegen.launch import Call

    query, key, value, grad_out = _tensors(3 * hopper_backward.BLOCK_N + 37, (head_dim, head_dim))
    spec = window_spec(dropout=False)
    q, k, v = (tensor.double() for tensor in (query, key, value))
    out = torch.empty(grad_out.shape, dtype=torch.float64)
    stats = chunked_attention.forward(spec, q, k, v, (), (), out)
    wanted = chunked_attention.backward(spec, grad_out.double(), q, k, v, out, stats, (), (), ())

    def run() -> list[Tensor]:
        call = Call(spec, query.to(device), key.to(device), value.to(device), (), ())
        call.out, call.grad_out, call.stats = out.to(call.query), grad_out.to(device), stats.float().to(device)
        grads = [torch.full_like(tensor, float("nan")) for tensor in (call.query, call.key, call.value)]
        hopper_backward.launch(call, *grads)
        return grads

    return _compared(device, run, wanted)


def _tensors(length: int, dims: Dims) -> list[Tensor]:
    """Query, key, value and the output's gradient, of two batch rows and four heads in two groups."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, dim) for heads, dim in ((4, dims[0]), (2, dims[0]), (2, dims[1]), (4, dims[1]))]
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def _compared(device: torch.device, run: Callable[[], list[Tensor]], wanted: Sequence[Tensor]) -> str:
    """What a run raises, or by how much its results differ from those that are wanted, beyond what is allowed."""
    try:
        with torch.cuda.device(device):
            pairs = [(got.cpu().double(), right) for got, right in zip(run(), wanted, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # see hopper.forward
        return f"{type(error).__name__}: {error}".splitlines()[0]
    differences = [float((got - right).abs().max() / right.abs().max().clamp(min=1)) for got, right in pairs]
    wrong = [difference for difference in differences if not difference <= _TOLERANCE]  # NaN is wrong, too
    return f"results differ by {max(wrong):.3g} of the largest" if wrong else ""
