"""The Hopper forward: when it serves, its launch, and what must hold before it is trusted.

It is written in Gluon, reads its tensors through TMA descriptors and takes 16-bit elements in head dims that are padded
(by the hardware, with zeros) to 64, 96, 128, 192 or 256. Everything else runs on the portable kernels, and so does whatever
fails here: a kernel that does not compile, one that ptxas spoils, and all of them on a machine where a small attention
comes out wrong.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashfuse.codegen import hopper_order, kernel_choice, ptxas
from flashfuse.codegen.descriptors import describable, strides_of
from flashfuse.codegen.hopper_tiles import (
    ROWS,
    SERVED,
    SLOW_WITH_ELEMENTS,
    Dims,
    HopperTile,
    draws,
    grows,
    kind_of,
    parts,
    row_of,
    tiles_of,
)
from flashfuse.codegen.load import kernel_module, remembered
from flashfuse.codegen.order import bytes_of_keys, order_of
from flashfuse.ir.attention_spec import EmptyRows

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

log = logging.getLogger("flashfuse")

_LEAST_KEYS = 512
_LEAST_KEYS_CAUSAL = {(64, 64): 2049}  # by rows of tiles: the portable kernel is 5% faster at 2048 keys, 7% slower at 8192
_LEAST_FILL = 0.6  # tiles a multiprocessor
_MOST_SPILLED = 512  # bytes a thread; they lie where blocks are masked and where a tile begins

# How long functions of the score take the compiler, where a thread has 64 of them: sine and cosine, which branch, 9 seconds
# each, 22 together and minutes with erf besides; the others about 1.
_COMPILE_COST = {"sin": 4, "cos": 4, "erf": 1, "log": 1, "mod": 1, "floordiv": 1}
_MOST_COMPILE_COST = 4

served: Counter[str] = Counter()  # key of a spec -> calls that ran here; repeated ones do not count

_passed_over: dict[tuple[str, Dims], int] = {}  # key of a spec and head dims -> tiles of which ptxas makes nothing good
_failed: dict[tuple[str, Dims], str] = {}  # the same -> why its kernel is not used
_told: set[tuple[str, str]] = set()
_examined: set[tuple[str, Dims, HopperTile]] = set()  # kernels that ptxas was asked about
_trust: dict[tuple[Any, ...], str] = {}


@cache
def missing() -> str:
    """Why this Triton cannot have the Hopper kernels, or nothing if it can."""
    try:
        from flashfuse.codegen.kernels import hopper_forward  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:
        return f"this Triton's Gluon is not the one that they are written for ({error})"
    return ""


def takes(call: Call) -> bool:
    """Whether a call runs here. The reason, where it does not, is logged once for each spec."""
    asked = kernel_choice.asked(call.spec.key)
    reason = "options ask for portable kernels" if asked == "portable" else refusal(call, eager=asked == "hopper")
    if (call.spec.key, reason) not in _told:
        _told.add((call.spec.key, reason))
        log.info("attention %s: %s forward%s", call.spec.key, "portable" if reason else "Hopper", reason and f", {reason}")
    return not reason


def unfit(call: Call) -> str:
    """Why neither forward nor backward can run here, whatever their tiles, or nothing."""
    if not call.query.is_cuda or torch.cuda.get_device_capability(call.query.device) != (9, 0):
        return "the device has not compute capability 9.0"
    if call.query.dtype not in (torch.float16, torch.bfloat16) or call.value.dtype is not call.query.dtype:
        return f"elements are {call.query.dtype} and {call.value.dtype}"
    if call.spec.wide:
        return "its output is float32"
    if sum(_COMPILE_COST.get(statement.op, 0) for _, statement in call.spec.statements) > _MOST_COMPILE_COST:
        return "its score program would take long to compile"
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        if not describable(tensor):
            return f"{name} is not aligned to 16 bytes"
    return ""


def refusal(call: Call, *, eager: bool = False) -> str:
    """Why a call runs on the portable forward, or nothing. `eager`: also where that is likely to be faster."""
    if reason := unfit(call):
        return reason
    dims = dims_of(call)
    row, tiles = row_of(call.spec, dims)
    if min(call.padded) < 64 or not tiles:
        return f"head dims {call.D} and {call.E}"
    if not eager and call.spec.has_gaps:
        return "its ranges of keys have gaps"
    kind = kind_of(call.spec)
    if not eager and kind and (kind, row) not in SERVED:
        return f"with its {kind} it was not found faster"
    if not eager and call.spec.reads_elements and row in SLOW_WITH_ELEMENTS:
        return "with a bias of its own for each element it was found slower"
    tile = tile_of(call)
    fill = -(-call.M // tile.block_m) * call.B * call.H / multiprocessors(call.query.device)
    least = _LEAST_KEYS_CAUSAL.get(row, _LEAST_KEYS) if not kind and grows(call.spec) else _LEAST_KEYS
    if not eager and (least > call.N or fill < _LEAST_FILL):
        return "few keys or queries"
    return missing() or _failed.get((call.spec.key, dims), "") or distrust(call.query.device, tile, dims, draws(call.spec))


def dims_of(call: Call) -> Dims:
    """A call's head dims, padded."""
    return sum(parts(call.D)), sum(parts(call.E))


def tile_of(call: Call) -> HopperTile:
    """The first tile for a call's head dims that was not passed over."""
    dims = dims_of(call)
    return tiles_of(call.spec, dims)[_passed_over.get((call.spec.key, dims), 0)]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptors(tensor: Tensor, rows: int) -> tuple[Any, Any]:
    """Of `[1, 1, rows, part]` tiles of a `[B, H, length, dim]` tensor, zero beyond its ends, for one or both parts of its dim."""
    whole, *rest = parts(tensor.shape[3])
    return descriptor(tensor, rows, whole), descriptor(tensor, rows, rest[0]) if rest else None


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Of `[1, 1, rows, columns]` tiles of a `[B, H, length, dim]` tensor, zero beyond its ends."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1, 1, rows, columns]
    kind = gl.bfloat16 if tensor.dtype is torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(box, kind)
    return TensorDescriptor(tensor, list(tensor.shape), strides_of(tensor), box, layout)


def forward(call: Call, out: Tensor, stats: Tensor) -> bool:
    """Launch for a call that is taken: what the portable kernel writes, low rows left to it. False if it has failed."""
    tile = tile_of(call)
    try:
        compiled = launch(call, out, stats, tile)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler in the making may raise; the portable kernels do not need it
        _pass_over(call, tile, f"it does not compile ({type(error).__name__}: {' '.join(str(error).split())[-200:]})")
        return False
    served[call.spec.key] += 1
    if (call.spec.key, dims_of(call), tile) not in _examined:
        _examined.add((call.spec.key, dims_of(call), tile))
        fault = spoiled(compiled)
        if fault:  # what it computed is right all the same
            _pass_over(call, tile, fault)
    return True


def _pass_over(call: Call, tile: HopperTile, fault: str) -> None:
    """From the next call on the next tile serves, after the last one the portable kernel."""
    dims = dims_of(call)
    tiles = tiles_of(call.spec, dims)
    if tile is tiles[-1]:
        _failed[(call.spec.key, dims)] = fault
        log.info("attention %s: portable forward, the Hopper kernel is not used: %s", call.spec.key, fault)
    else:
        _passed_over[(call.spec.key, dims)] = tiles.index(tile) + 1
        log.info("attention %s: another Hopper tile than %s: %s", call.spec.key, tile, fault)


def spoiled(compiled: Any) -> str:
    """What ptxas did to a compiled kernel that makes it slow, or nothing. It is asked once for each kernel and machine."""
    ptx = compiled.asm["ptx"]

    def find() -> str:
        try:
            found = ptxas.report(ptx, "sm_90a")
        except OSError as error:
            log.info("ptxas cannot be asked: %s", error)
            return ""
        if found.advisories:
            return f"its matrix instructions wait for each other ({found.advisories[0]})"
        return f"it spills {found.spilled} bytes a thread" if found.spilled > _MOST_SPILLED else ""

    return remembered(f"ptxas_{hashlib.sha256(ptx.encode()).hexdigest()[:16]}.txt", find)


def launch(call: Call, out: Tensor, stats: Tensor, tile: HopperTile, programs: int = 0) -> Any:
    """Launch the kernel, and return it compiled. `programs`: how many; by default as many as run at once."""
    table = call.table
    tiles = -(-call.M // tile.block_m) * call.B * call.H
    staged = tile.staged and describable(out)
    programs = min(tiles, programs or multiprocessors(call.query.device))
    order = order_of(call, call.H, bytes_of_keys(call))
    module = kernel_module(call.spec, fast_tanh=True, hopper=True)
    return call.run(
        module.flashfuse_hopper_forward, programs,
        *descriptors(call.query, ROWS), *descriptors(call.key, tile.block_n), *descriptors(call.value, tile.block_n),
        *(descriptors(out, ROWS) if staged else (out, None)), stats, table.tensor, call.inputs,
        *call.strides(out), *table.strides, call.B, *call.shape,
        max(section(call, tile, programs), order.section), call.plane,
        D=call.D, E=call.E, BLOCK_N=tile.block_n, CONSUMERS=tile.consumers, STAGES=tile.stages, QUERIES=tile.queries,
        REGISTERS=tile.registers, TABLE_ROWS=table.rows,
        EVEN=call.N % tile.block_n == 0, HAS_MASK=call.masked, PLANES=call.spec.planes,
        SHIFTED=call.constants["SHIFTED"], EMPTY_ZERO=call.spec.empty_rows is EmptyRows.ZERO, STAGED=staged,
        SWAPPED=order.swapped, num_warps=4,
    )  # fmt: skip


def section(call: Call, tile: HopperTile, programs: int) -> int:
    """Heads whose tiles are taken together (see the kernel's `tile_of`); one where all tiles are as long as each other."""
    if not call.masked:
        return 1
    blocks = -(-call.M // tile.block_m)
    return hopper_order.heads_of_section(call.B * call.H, bytes_of_keys(call), blocks, programs, tile.block_m / tile.block_n)


def distrust(device: torch.device, tile: HopperTile, dims: Dims, dropout: bool = False) -> str:
    """Why the kernels are not trusted on this machine: nothing once a small attention has come out right on it.

    `dropout`: one whose probabilities are dropped, by the bits that the backward will draw again.
    """
    from flashfuse.codegen import hopper_check as check

    facts = (device, tile, dims, dropout)
    return checked(facts, lambda: check.identity(*facts), lambda: check.fault(*facts))


def checked(facts: tuple[Any, ...], identity: Callable[[], str], fault: Callable[[], str]) -> str:
    """What a check finds wrong, or nothing: for `facts` it runs once a process, and under its `identity` once a machine."""
    if facts in _trust:
        return _trust[facts]
    if torch.cuda.is_current_stream_capturing():
        return "the first call lies within a CUDA graph, where nothing can be checked"
    found = remembered(f"hopper_{identity()}.txt", fault)
    if found:
        warnings.warn(f"flashfuse: the Hopper kernels failed their check and are not used: {found}", stacklevel=2)
    _trust[facts] = found and f"it failed its check on this machine ({found})"
    return _trust[facts]
