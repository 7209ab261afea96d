"""The Hopper backward: when it serves, its three launches, and what must hold before it is trusted (see `hopper.py`).

Gradients of the query are summed in float32 by TMA in whatever order blocks arrive, so it does not serve where torch asks
for determinism; nor where the logsumexp has a gradient, or a capture that is read for every query and key, which only the
portable kernels know how to sum. Rows that lie low are left out, and added by the portable kernels' launches for them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashfuse.codegen import hopper, hopper_order, kernel_choice
from flashfuse.codegen.capture_gradients import elements_read
from flashfuse.codegen.descriptors import describable
from flashfuse.codegen.hopper_tiles import draws, kind_of
from flashfuse.codegen.load import kernel_module
from flashfuse.codegen.order import bytes_of_queries, order_of

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

log = logging.getLogger("flashfuse")

HEAD_DIMS = (64, 128)  # as the kernel pads them
BLOCK_M, BLOCK_N = 64, 128
STAGES = 2  # of queries and of output gradients
SUMMED = 64  # columns of the query's gradient that a consumer sums
REGISTERS = 240
_PREPARED = 64  # rows of a program before and after the main kernel
_LEAST_FILL = 0.6  # blocks of keys a multiprocessor

_failed: dict[tuple[str, int], str] = {}  # key of a spec and padded head dim -> why the kernel is not used
_examined: set[tuple[str, int]] = set()
_told: set[tuple[str, str]] = set()


def takes(call: Call, wanted: list[int]) -> bool:
    """Whether a backward runs here. `wanted`: captures that need a gradient. The reason, where it does not, is logged once."""
    asked = kernel_choice.asked(call.spec.key)
    reason = "options ask for portable kernels" if asked == "portable" else refusal(call, wanted, eager=asked == "hopper")
    if (call.spec.key, reason) not in _told:
        _told.add((call.spec.key, reason))
        log.info("attention %s: %s backward%s", call.spec.key, "portable" if reason else "Hopper", reason and f", {reason}")
    return not reason


def refusal(call: Call, wanted: list[int], *, eager: bool = False) -> str:
    """Why a backward runs on the portable kernels, or nothing. `eager`: also where those are likely to be faster."""
    if reason := hopper.unfit(call):
        return reason
    if torch.are_deterministic_algorithms_enabled():
        return "sums must not depend on the order of blocks"
    if call.grad_stats is not None or elements_read(call.spec) & set(wanted):
        return "a capture or the logsumexp has a gradient"
    if call.spec.planes == 2 and (wanted or not call.masked):
        return "rows can lie low"
    if draws(call.spec):
        return "dropout"
    head_dim = padded(call)
    if not head_dim:
        return f"head dims {call.D} and {call.E}"
    if not describable(call.grad_out) or call.grad_out.dtype is not call.query.dtype:
        return "the output's gradient is not aligned to 16 bytes"
    fill = -(-call.N // BLOCK_N) * call.B * call.G / hopper.multiprocessors(call.query.device)
    if not eager and (kind_of(call.spec) or call.spec.certainty is not None or call.spec.has_gaps):
        return "its ranges were not timed as faster"
    if not eager and (call.M < 512 or fill < _LEAST_FILL):
        return "few keys or queries"
    return hopper.missing() or _failed.get((call.spec.key, head_dim), "") or distrust(call.query.device, head_dim)


def padded(call: Call) -> int:
    """The kernel's head dim for a call; 0 where it has none."""
    dims = {next((head_dim for head_dim in HEAD_DIMS if dim <= head_dim), 0) for dim in (call.D, call.E)}
    return dims.pop() if len(dims) == 1 else 0


def distrust(device: torch.device, head_dim: int) -> str:
    """Why the kernels are not trusted on this machine: nothing once a small attention's gradients came out right on it."""
    from flashfuse.codegen import hopper_check as check

    facts = ("backward", device, head_dim)
    return hopper.checked(facts, lambda: check.backward_identity(*facts[1:]), lambda: check.backward_fault(*facts[1:]))


def backward(call: Call, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, partial: Tensor | None = None) -> bool:
    """Fill the three gradients of a call that is taken, but for rows that lie low, and `partial` `[captures, B, H, M]` with
    the rows' gradients of what sinks read. False if the kernel has failed."""
    facts = (call.spec.key, padded(call))
    try:
        compiled = launch(call, grad_query, grad_key, grad_value, partial)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # see hopper.forward
        _fail(facts, f"it does not compile ({type(error).__name__}: {' '.join(str(error).split())[-200:]})")
        call.cannot_repeat()  # some of its launches are noted
        return False
    if facts not in _examined:
        _examined.add(facts)
        if fault := hopper.spoiled(compiled):
            _fail(facts, fault)  # what it computed is right; the next call takes the portable kernels
    return True


def _fail(facts: tuple[str, int], reason: str) -> None:
    _failed[facts] = reason
    log.info("attention %s: portable backward, the Hopper kernel is not used: %s", facts[0], reason)


def launch(call: Call, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, partial: Tensor | None = None) -> Any:
    """Launch the three kernels, and return the main one compiled."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    module = kernel_module(call.spec, fast_tanh=True, hopper=True)
    head_dim = padded(call)
    heads, rows_padded = call.B * call.H, -(-call.M // BLOCK_M) * BLOCK_M
    rows = call.empty((2 * heads, rows_padded), torch.float32)
    grad_sum = call.empty((heads, call.M, head_dim), torch.float32)
    call.delta = call.empty((call.B, call.H, call.M), torch.float32) if call.low_rows else rows
    call.flags = call.empty((call.B, call.H, rows_padded // _PREPARED), torch.int32) if call.low_rows else rows
    call.run(
        module.flashfuse_hopper_prepare, rows_padded // _PREPARED * heads,
        call.out, call.grad_out, call.stats, rows, grad_sum, call.delta, call.flags, rows if partial is None else partial,
        call.inputs, *call.strides(call.out, call.grad_out), call.H, call.M, call.N, call.plane, rows_padded,
        E=call.E, E_PAD=head_dim, D_PAD=head_dim, BLOCK=_PREPARED, LOW=call.low_rows, SUMS=partial is not None, num_warps=4,
    )  # fmt: skip
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    box = [1, BLOCK_M, SUMMED]
    order = order_of(call, call.G, bytes_of_queries(call))
    compiled = call.run(
        module.flashfuse_hopper_backward, -(-call.N // BLOCK_N) * call.B * call.G,
        hopper.descriptor(call.query, BLOCK_M, head_dim), hopper.descriptor(call.key, BLOCK_N, head_dim),
        hopper.descriptor(call.value, BLOCK_N, head_dim), hopper.descriptor(call.grad_out, BLOCK_M, head_dim),
        TensorDescriptor(rows, list(rows.shape), [rows.shape[1], 1], [1, BLOCK_M], flat),
        TensorDescriptor(
            grad_sum, list(grad_sum.shape), list(grad_sum.stride()), box, gl.NVMMASharedLayout.get_default_for(box, gl.float32)
        ),
        grad_key, grad_value, call.inputs, *call.strides(grad_key, grad_value),
        call.B, call.H, call.G, call.M, call.N, max(section(call), order.section),
        D=call.D, E=call.E, BLOCK_M=BLOCK_M, STAGES=STAGES, REGISTERS=REGISTERS,
        EVEN=call.M % BLOCK_M == 0 and call.N % BLOCK_N == 0, HAS_MASK=call.masked, SWAPPED=order.swapped, num_warps=4,
    )  # fmt: skip
    call.run(
        module.flashfuse_hopper_round, rows_padded // _PREPARED * heads,
        grad_sum, grad_query, *call.strides(grad_query), call.H, call.M, D=call.D, D_PAD=head_dim, BLOCK=_PREPARED, num_warps=4,
    )  # fmt: skip
    return compiled


def section(call: Call) -> int:
    """Heads of keys whose blocks are taken together: their queries and gradients fit the L2 cache; one without a mask."""
    if not call.masked:
        return 1
    return hopper_order.heads_that_fit(call.B * call.G, bytes_of_queries(call))
