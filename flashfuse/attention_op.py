"""The operators that a rewritten graph calls: `flashfuse::attention`, its backward, and `flashfuse::fence`.

A call carries the whole spec as text, so that any process, cache or exported program can rebuild the kernel from the
call alone. On CUDA the Triton kernels run; elsewhere, and wherever they cannot, the chunked torch path gives the same
values.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashfuse.errors import FlashfuseError, StrictError, UnsupportedError
from flashfuse.ir.attention_spec import AttentionSpec, from_text, plain_load_letters

_library = torch.library.Library("flashfuse", "DEF")
for _name in ("attention", "attention_forward"):
    _library.define(
        f"{_name}(Tensor query, Tensor key, Tensor value, Tensor[] captures, SymInt[] sizes, str spec, str layout,"
        " Tensor? ranges=None) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
    )
_library.define(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor stats,"
    " Tensor[] captures, SymInt[] sizes, bool[] needs, str spec, Tensor? ranges=None, Tensor? grad_stats=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define("fence(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

_warned: set[str] = set()
_failed: dict[tuple[str, str], str] = {}  # why the kernel of a spec and direction is not tried again


# ------------------------------------------------------------------------------------------------ forward and backward


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    layout: str,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a spec: out `[B, H, M, E]` in value's dtype (float32 if the spec is wide), laid out in memory in the order
    of `layout`, and the float32 row statistics `[planes, B, H, M]` that the backward needs. `ranges` is what
    `flashfuse::block_ranges` gave."""
    meaning = from_text(spec)
    found = run_kernels(meaning, "forward", query.is_cuda, query, key, value, captures, sizes, layout, ranges)
    if found is not None:
        return found  # type: ignore[no-any-return]
    out = _empty_out(meaning, query, value, layout)
    return out, _run_in_torch(meaning, "forward", query, key, value, captures, sizes, out)


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    needs: Sequence[bool],
    spec: str,
    ranges: Tensor | None = None,
    grad_stats: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of query, key and value, and of each capture whose entry of `needs` is True, in this order.

    `grad_stats` `[B, H, M]`, float32, is the gradient of the rows' logsumexp, if something was made of it.
    """
    meaning, arguments = from_text(spec), (grad_out, query, key, value, out, stats, captures, sizes, tuple(needs))
    found = run_kernels(meaning, "backward", query.is_cuda, *arguments, ranges, grad_stats)
    if found is None:
        found = _run_in_torch(meaning, "backward", *arguments, grad_stats)
    inputs = _differentiated(query, key, value, captures, needs)
    return [_laid_out_like(own, tensor) for own, tensor in zip(found, inputs, strict=True)]


def _laid_out_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the layout that the fake implementation promises: that of an empty tensor like the input."""
    if tensor.is_contiguous() and gradient.is_contiguous():
        return gradient
    promised = torch.empty_like(tensor, device="meta").stride()
    if gradient.stride() == promised:
        return gradient
    return torch.empty_like(tensor).copy_(gradient)


def _empty_out(spec: AttentionSpec, query: Tensor, value: Tensor, layout: str) -> Tensor:
    shape, order = (*query.shape[:3], value.shape[3]), ["bhme".index(letter) for letter in layout]
    return torch.empty_permuted(shape, order, dtype=spec.out_dtype(value.dtype), device=query.device)


def _differentiated(
    query: Tensor, key: Tensor, value: Tensor, captures: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """The inputs that get a gradient, in the order of the backward's results."""
    return [query, key, value, *(c for c, wanted in zip(captures, needs, strict=True) if wanted)]


def kernels_run_on(device_type: str) -> bool:
    """Whether calls on a device go to the Triton kernels, as far as the device decides."""
    return device_type == "cuda" or os.environ.get("FLASHFUSE_INTERPRET") == "1"


def run_kernels(spec: AttentionSpec, direction: str, on_cuda: bool, *arguments: Any) -> Any:
    """What the Triton kernels give, or None where they cannot run. A failing kernel warns once a spec."""
    if not (on_cuda or kernels_run_on("cpu")) or (_failed and (spec.key, direction) in _failed):
        return None
    try:
        return getattr(_launch(), direction)(spec, *arguments)
    except UnsupportedError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if os.environ.get("FLASHFUSE_STRICT") == "1":
            raise StrictError(f"the {direction} kernel of {_line(spec)} failed: {reason}") from error
        if not isinstance(error, torch.OutOfMemoryError):
            _failed[spec.key, direction] = reason
    _warn_once(spec, direction, reason)
    return None


@cache
def _launch() -> Any:
    from flashfuse.codegen import launch

    return launch


def _run_in_torch(spec: AttentionSpec, direction: str, *arguments: Any) -> Any:
    """Without Triton: torch's own flash kernel where that computes just this, else in chunks."""
    from flashfuse import aten_flash, chunked_attention

    found = getattr(aten_flash, direction)(spec, *arguments)
    return getattr(chunked_attention, direction)(spec, *arguments) if found is None else found


def _warn_once(spec: AttentionSpec, direction: str, reason: str) -> None:
    if spec.key not in _warned:
        _warned.add(spec.key)
        warnings.warn(
            f"flashfuse: the {direction} of {_line(spec)} runs without its Triton kernel, slower: {reason}",
            stacklevel=3,
        )


def _line(spec: AttentionSpec) -> str:
    """The attention by the user's line, or by its formula."""
    lines = [statement.source for _program, statement in spec.statements if statement.source]
    return f"the attention at {lines[-1]}" if lines else f"attention {spec.describe()[0][1]}"


_library.impl("attention_forward", run_forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("flashfuse::attention_forward", lib=_library)
def _attention_forward_fake(query, key, value, captures, sizes, spec, layout, ranges=None):  # type: ignore[no-untyped-def]
    meaning = from_text(spec)
    dtype = torch.float64 if torch.float64 in (query.dtype, value.dtype) else torch.float32
    return _empty_out(meaning, query, value, layout), query.new_empty((meaning.planes, *query.shape[:3]), dtype=dtype)


@torch.library.register_fake("flashfuse::attention_backward", lib=_library)
def _attention_backward_fake(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, out, stats, captures, sizes, needs, spec, ranges=None, grad_stats=None
):
    return [torch.empty_like(tensor) for tensor in _differentiated(query, key, value, captures, needs)]


# ------------------------------------------------------------------------------------------------ autograd


class _Attention(torch.autograd.Function):
    """Attention with gradients of query, key, value and of every float capture that asks for one."""

    @staticmethod
    def forward(
        ctx: Any, sizes: Any, spec: str, layout: str, ranges: Tensor | None,
        query: Tensor, key: Tensor, value: Tensor, *captures: Tensor,
    ) -> Any:  # fmt: skip
        out, stats = torch.ops.flashfuse.attention_forward(query, key, value, list(captures), sizes, spec, layout, ranges)
        ctx.set_materialize_grads(False)
        if not from_text(spec).logsumexp:
            ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(query, key, value, out, stats, ranges, *captures)
        ctx.sizes, ctx.spec = sizes, spec
        ctx.needs = [bool(needed) for needed in ctx.needs_input_grad[7:]]
        return out, stats

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_stats: Tensor | None) -> Any:
        query, key, value, out, stats, ranges, *captures = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_rows = None if grad_stats is None else grad_stats[0].contiguous()  # the shift of low rows is no function of scores
        found = torch.ops.flashfuse.attention_backward(
            grad_out.to(value.dtype), query, key, value, out, stats, captures, ctx.sizes, ctx.needs, ctx.spec, ranges, grad_rows
        )
        if torch.is_grad_enabled():  # create_graph=True: without this the gradients would be silently taken for constants
            found = _NoSecondDerivative.apply(len(found), *found, grad_out, query, key, value, *captures)
        rest = iter(found[3:])
        return None, None, None, None, *found[:3], *(next(rest) if needed else None for needed in ctx.needs)


class _NoSecondDerivative(torch.autograd.Function):
    """Gives gradients back as functions of the inputs whose own derivative is a clear error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise FlashfuseError(
            "a fused attention has no second derivative; compile this model without flashfuse "
            '(backend="inductor"), or leave the attention out with torch.compiler.disable'
        )


def _check_needs(spec: AttentionSpec, needs: Sequence[bool]) -> None:
    for place, needed in enumerate(needs):
        if needed and plain_load_letters(spec, place) is None:
            name = spec.captures[place].name
            raise FlashfuseError(f"capture {name} needs a gradient but is read at computed positions; detach it")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    layout: str,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashfuse::attention`: out and row statistics, as `attention_forward` gives them, with gradients."""
    if not torch.is_grad_enabled():
        return torch.ops.flashfuse.attention_forward(query, key, value, captures, sizes, spec, layout, ranges)
    _check_needs(from_text(spec), [capture.requires_grad for capture in captures])
    return _Attention.apply(sizes, spec, layout, ranges, query, key, value, *captures)  # type: ignore[no-any-return]


_library.impl("attention", attention, "CompositeImplicitAutograd")


# ------------------------------------------------------------------------------------------------ fence


_library.impl("fence", torch.clone, "CompositeExplicitAutograd")


@torch.library.register_fake("flashfuse::fence", lib=_library)
def _fence_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


torch.library.register_autograd("flashfuse::fence", lambda ctx, grad: grad, lib=_library)
