"""Specs and inputs that the codegen tests share, and the dense float64 computation that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashfuse.ir import philox
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind

LOWEST = float(torch.finfo(torch.float32).min)


class Program:
    """A builder with the leaves of a score program at hand. `capture` declares a tensor and loads an element of it."""

    def __init__(self) -> None:
        self.builder = Builder()
        self.captures: list[Capture] = []
        self.s = self.builder.leaf("score")
        self.p = self.builder.leaf("probability")
        self.b, self.h, self.m, self.n = (self.builder.leaf("index", letter) for letter in "bhmn")
        self.M, self.N = (self.builder.leaf("length", letter) for letter in "MN")
        self.zero = self.builder.const(0)

    def declare(self, name: str, kind: Kind, rank: int) -> int:
        """The number of a new capture."""
        self.captures.append(Capture(name, kind, rank))
        return len(self.captures) - 1

    def load(self, capture: int, *indices: Value) -> Value:
        """An element of a declared capture."""
        return self.builder.leaf("load", capture, self.captures[capture].kind, indices)

    def capture(self, name: str, kind: Kind, *indices: Value) -> Value:
        """Declare and load at once."""
        return self.load(self.declare(name, kind, len(indices)), *indices)

    def size(self, number: int) -> Value:
        """An integer given at call time."""
        return self.builder.leaf("size", number, Kind.INT)

    def masked(self, keep: Value, x: Value, fill: float) -> Value:
        """`x` where `keep`, else `fill`."""
        return x.apply("where", keep, x, fill)

    def dropped(self, x: Value, p: float) -> Value:
        """`x` after dropout by a new captured seed."""
        bits = self.builder.op("random_bits", self.capture("seed", Kind.INT), self.b, self.h, self.m, self.n)
        threshold, factor = philox.dropping(p)
        return x * x.apply("where", bits < threshold, 0.0, factor)

    def spec(self, result: Value, rows: EmptyRows = EmptyRows.EXACT, **more: Value) -> AttentionSpec:
        """The verified spec; `weight` and `sink` as in AttentionSpec."""
        programs = {name: self.builder.program(value) for name, value in more.items()}
        spec = AttentionSpec(self.builder.program(result), tuple(self.captures), rows, **programs)
        spec.verify()
        return spec


@dataclass(frozen=True)
class Case:
    """One attention: a spec, shapes, and captures made from a generator. `dense` computes final scores from raw ones.

    `dense(s, captures, sizes, indices)` works on float64 `[B, H, M, N]` scores; it is plain torch
    and knows nothing of score programs. So are `sink(captures)`, which broadcasts to `[B, H, M, 1]`, and
    `weight(p, captures, indices)`.
    """

    name: str
    spec: AttentionSpec
    dense: Callable[..., Tensor]
    captures: Callable[[torch.Generator], list[Tensor]] = lambda generator: []
    sizes: tuple[int, ...] = ()
    shape: tuple[int, int, int, int, int, int, int] = (2, 2, 2, 37, 37, 16, 16)  # B H G M N D E
    needs: tuple[bool, ...] = ()
    zero_rows: bool = False
    layout: str = "contiguous"
    sink: Callable[..., Tensor] | None = None
    weight: Callable[..., Tensor] | None = None
    reference: torch.dtype = torch.float64  # float32 where what float32 rounds away is meant


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    captures: list[Tensor]


def make_inputs(case: Case, dtype: torch.dtype, value_dtype: torch.dtype | None = None, device: str = "cpu") -> Inputs:
    """Random inputs of a case in the layout that it asks for."""
    generator = torch.Generator().manual_seed(0)
    B, H, G, M, N, D, E = case.shape
    value_dtype = value_dtype or dtype

    def tensor(*shape: int, as_dtype: torch.dtype) -> Tensor:
        if case.layout == "bmhe":
            b, h, m, d = shape
            return torch.randn(b, m, h, d, generator=generator).to(device, as_dtype).transpose(1, 2)
        if case.layout == "columns":
            return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(device, as_dtype).mT
        if case.layout == "expanded":
            return torch.randn(1, *shape[1:], generator=generator).to(device, as_dtype).expand(shape)
        return torch.randn(*shape, generator=generator).to(device, as_dtype)

    captures = [capture.to(device) for capture in case.captures(generator)]
    return Inputs(
        tensor(B, H, M, D, as_dtype=dtype),
        tensor(B, G, N, D, as_dtype=dtype),
        tensor(B, G, N, E, as_dtype=value_dtype),
        tensor(B, H, M, E, as_dtype=value_dtype),
        captures,
    )


def dense_attention(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients [dq, dk, dv, *needed captures] of the dense computation.

    Products are in `dtype`; scores and softmax too, but in float32 if that is a 16-bit type (masks of float32's lowest
    number need it, and it is the stricter thing to compare with).
    """
    scores = dtype if dtype.itemsize >= 4 else torch.float32
    B, H, G, M, N, _, _ = case.shape
    leaves = [t.detach().to(dtype).requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
    captures = [
        c.detach().to(scores if c.is_floating_point() else c.dtype).requires_grad_(needed)
        for c, needed in zip(inputs.captures, case.needs or (False,) * len(inputs.captures), strict=True)
    ]
    query, key, value = leaves
    key, value = key.repeat_interleave(H // G, 1), value.repeat_interleave(H // G, 1)
    device = query.device
    indices = (
        torch.arange(B, device=device)[:, None, None, None], torch.arange(H, device=device)[None, :, None, None],
        torch.arange(M, device=device)[None, None, :, None], torch.arange(N, device=device)[None, None, None, :],
    )  # fmt: skip
    x = case.dense((query @ key.mT).to(scores), captures, case.sizes, indices)
    x = x.expand(B, H, M, N)
    sinks = [] if case.sink is None else [case.sink(captures).to(scores).expand(B, H, M, 1)]
    p = torch.cat([x, *sinks], -1).softmax(-1)[..., :N]
    if case.zero_rows:
        p = torch.where((x == float("-inf")).all(-1, keepdim=True), torch.zeros((), dtype=scores, device=device), p)
    if case.weight is not None:
        p = case.weight(p, captures, indices)
    out = p.to(dtype) @ value
    wanted = [*leaves, *(c for c in captures if c.requires_grad)]
    gradients = torch.autograd.grad(out, wanted, inputs.grad_out.to(dtype), allow_unused=True)
    return out.detach(), [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, gradients, strict=True)]
