"""Forward and backward of a spec on the Triton kernels: what is allocated and launched, in which order, on which tiles.

Works on CUDA tensors, and on CPU tensors in Triton's interpreter when TRITON_INTERPRET=1 was set before import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flashfuse.codegen import decode, grids, hopper, hopper_backward, kernel_choice, tuning
from flashfuse.codegen.capture_gradients import CaptureBuffers, capture_gradients
from flashfuse.codegen.launches import Launches, interpreting
from flashfuse.codegen.plan import KernelPlan, Tile, kernel_plan, tuning_candidates
from flashfuse.codegen.range_tables import Table, write_table
from flashfuse.codegen.range_tables import block_ranges as block_ranges  # `attention_op` finds it here
from flashfuse.codegen.replay import Recording, repeated
from flashfuse.errors import InternalError, UnsupportedError
from flashfuse.ir.attention_spec import MAX_HEAD_DIM, MAX_HEAD_DIM_FLOAT32, AttentionSpec
from flashfuse.ir.cheaper import LONGEST, subtracts_positions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_chosen: dict[tuple[Any, ...], int] = {}  # which candidate of a plan suits


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why these tensors cannot run on the Triton kernels, or None if they can."""
    if not query.is_cuda and not (query.device.type == "cpu" and interpreting()):
        return f"tensors are on {query.device.type}, kernels run on cuda"
    if query.is_cuda and torch.version.hip is not None:
        return "kernels are written for NVIDIA devices"
    if query.is_cuda and _capability(query.device) < (8, 0):
        return "kernels need compute capability 8.0"
    if query.dtype is not key.dtype:
        return f"query is {query.dtype}, key is {key.dtype}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}"
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            return f"{name} has head dim {tensor.shape[-1]}, kernels take 1 to {MAX_HEAD_DIM}"
        if query.is_cuda and tensor.shape[-1] > MAX_HEAD_DIM_FLOAT32 and torch.float32 in (query.dtype, value.dtype):
            return f"{name} has head dim {tensor.shape[-1]}, kernels take 1 to {MAX_HEAD_DIM_FLOAT32} in float32"
    return None


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    layout: str = "bhme",
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out `[B, H, M, E]` in the spec's dtype, in memory in the order of `layout`, and the float32 row statistics
    `[planes, B, H, M]`.

    `ranges` is the range table that `block_ranges` gave for the mask, if it was made before. Raises UnsupportedError where
    the kernels cannot run.
    """

    def run(recording: Recording | None) -> Sequence[Tensor]:
        call = Call(spec, query, key, value, captures, sizes, recording, ranges)
        with call.device():
            return _run_forward(call, layout)

    asked = kernel_choice.asked(spec.key)
    identity = (spec.key, "forward", layout, tuple(sizes), _precision(query), ranges is None, asked)
    out, stats = repeated(identity, (query, key, value, *captures, *_there(ranges)), query.device, run)
    return out, stats


def _there(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _run_forward(call: Call, layout: str) -> tuple[Tensor, Tensor]:
    out = call.empty((call.B, call.H, call.M, call.E), call.spec.out_dtype(call.value.dtype), layout)
    stats = call.empty((call.spec.planes, call.B, call.H, call.M), torch.float32)
    if stats.numel() == 0 or call.N == 0:
        call.cannot_repeat()
        return out.zero_(), stats.fill_(float("inf"))
    target = out if out.stride(-1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    split = decode.split_of(call)
    if split is not None:
        decode.run(call, split, target, stats)
    else:
        if not (hopper.takes(call) and hopper.forward(call, target, stats)):
            call.launch("forward", lambda tile: grids.forward(call, tile, target, stats, low=False), (target, stats))
        if call.low_rows:
            call.launch("forward", lambda tile: grids.forward(call, tile, target, stats, low=True))
    if target is not out:
        call.cannot_repeat()
        out.copy_(target)
    return out, stats


def backward(
    spec: AttentionSpec,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    needs: Sequence[bool],
    ranges: Tensor | None = None,
    grad_stats: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of query, key, value and of each capture that `needs` names, in order; `ranges` as in `forward`.

    `grad_stats` `[B, H, M]`, contiguous, is the gradient of the rows' logsumexp, if any.

    Raises UnsupportedError where the kernels cannot run.
    """
    wanted = [number for number, needed in enumerate(needs) if needed]

    def run(recording: Recording | None) -> list[Tensor]:
        call = Call(spec, query, key, value, captures, sizes, recording, ranges)
        call.grad_out, call.stats, call.grad_stats = _last_contiguous(grad_out.to(value.dtype)), stats, grad_stats
        if stats.numel() == 0 or call.N == 0:
            call.cannot_repeat()
            return _no_gradients(query, key, value, [captures[number] for number in wanted])
        with call.device():
            return _run_backward(call, out, wanted)

    kind = (kernel_choice.asked(spec.key), torch.are_deterministic_algorithms_enabled(), ranges is None, grad_stats is None)
    identity = (spec.key, "backward", tuple(sizes), tuple(wanted), _precision(query), *kind)
    given = (query, key, value, out, stats, grad_out, *captures, *_there(ranges), *_there(grad_stats))
    return list(repeated(identity, given, query.device, run))


def _no_gradients(query: Tensor, key: Tensor, value: Tensor, captures: Sequence[Tensor]) -> list[Tensor]:
    tensors = (query, key, value, *captures)
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _run_backward(call: Call, out: Tensor, wanted: list[int]) -> list[Tensor]:
    call.out = _last_contiguous(out)
    grad_query, grad_key, grad_value = (call.empty_like(tensor) for tensor in (call.query, call.key, call.value))
    if wanted:
        call.cannot_repeat()  # their sums are finished by torch
    gradients = capture_gradients(call, wanted)
    rows, columns = gradients.row_partial, gradients.column_partial
    if hopper_backward.takes(call, wanted) and hopper_backward.backward(call, grad_query, grad_key, grad_value, rows):
        if call.low_rows:
            _low_rows(call, grad_query, grad_key, grad_value, gradients)
        return [grad_query, grad_key, grad_value, *gradients.finished()]
    call.delta = call.empty((call.B, call.H, call.M), torch.float32)
    call.launch(
        "grad_query",  # first: it makes delta
        lambda tile: grids.grad_query(call, tile, grad_query, gradients, low=False),
        (grad_query, call.delta, *_there(rows)),
    )
    call.launch(
        "grad_key_value",
        lambda tile: grids.grad_key_value(call, tile, grad_key, grad_value, columns),
        (grad_key, grad_value, *_there(columns)),
    )
    if call.low_rows:
        _low_rows(call, grad_query, grad_key, grad_value, gradients)
    for capture, grad in gradients.tiles():
        call.launch("grad_capture", lambda tile, c=capture, g=grad: grids.grad_capture(call, tile, c, g))  # type: ignore[misc]
    for capture in gradients.diagonals():
        call.launch("grad_capture", lambda tile, c=capture: grids.grad_diagonals(call, tile, c, gradients))  # type: ignore[misc]
    return [grad_query, grad_key, grad_value, *gradients.finished()]


def _low_rows(call: Call, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, gradients: CaptureBuffers) -> None:
    """Add what rows that lie low give, of which `call.flags` tells, to gradients that lack it."""
    call.launch(
        "grad_key_value",
        lambda tile: grids.add_low_queries(call, tile, grad_key, grad_value, gradients.column_partial),
        repeatable=False,
    )
    call.launch("grad_query", lambda tile: grids.grad_query(call, tile, grad_query, gradients, low=True))


class Call(Launches):
    """One call's tensors, made fit for the kernels, and what all its launches share."""

    out: Tensor
    grad_out: Tensor
    stats: Tensor
    grad_stats: Tensor | None
    delta: Tensor
    flags: Tensor  # which blocks of queries have low rows; made with the gradient of the query

    def __init__(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        sizes: Sequence[int],
        recording: Recording | None = None,
        ranges: Tensor | None = None,
    ) -> None:
        reason = unsupported(query, key, value)
        if reason is not None:
            raise UnsupportedError(reason)
        fast_tanh = query.element_size() == 2 and not interpreting()
        super().__init__(spec, captures, sizes, query.device, recording, fast_tanh=fast_tanh)
        self.query, self.key, self.value = (_last_contiguous(tensor) for tensor in (query, key, value))
        self.B, self.H, self.M, self.D = query.shape
        self.G, self.N, self.E = value.shape[1], value.shape[2], value.shape[3]
        if self.G and self.H % self.G:
            raise InternalError(f"{self.H} query heads over {self.G} key heads")
        if max(self.M, self.N) > LONGEST and any(subtracts_positions(program) for program in spec.programs.values()):
            raise UnsupportedError(f"{max(self.M, self.N)} positions, kernels subtract floats of up to {LONGEST} here")
        self.padded = (_padded(self.D), _padded(self.E))
        self.masked = spec.split.keep is not None
        self.low_rows = self.masked and spec.planes == 2
        precision = _precision(query)
        self.constants = {
            "D": self.D, "E": self.E, "D_PAD": self.padded[0], "E_PAD": self.padded[1],
            "HAS_MASK": self.masked, "PLANES": spec.planes, "PRECISION": precision,
            "SHIFTED": precision != "tf32" or (spec.planes == 2 and not self.masked),
        }  # fmt: skip
        self._table = None if ranges is None else Table.of(ranges)

    @property
    def no_table(self) -> Table:
        """What kernels get in the place of a range table."""
        return Table(self.query, (0, 0), 0)

    @property
    def table(self) -> Table:
        """The range table: the given one, or one made now where interval evaluation can tell something."""
        if self._table is None:
            shape = (self.B, self.H, self.M, self.N)
            self._table = self.no_table if self.spec.certainty is None else Table.of(write_table(self, shape))
        return self._table

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """H, heads in a group, M, N: as the kernels take them."""
        return self.H, self.H // self.G, self.M, self.N

    @property
    def plane(self) -> int:
        """Elements of one plane of the row statistics."""
        return self.B * self.H * self.M

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """The three leading strides of each."""
        return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])

    def launch(
        self, kernel: str, attempt: Callable[[Tile], Any], results: Sequence[Tensor] = (), *, repeatable: bool = True
    ) -> None:
        """Run `attempt`, which returns the compiled kernel, with the tile that suits the device, or that tuning found.

        Only a launch that says which tensors are its `results` is tuned. `repeatable`: running it twice does no harm.
        """
        capability = _capability(self.query.device) if self.query.is_cuda else None
        itemsize = max(self.query.element_size(), self.value.element_size())
        kind = (self.spec.reads_elements, self.spec.ranged_by_vectors)
        plan: KernelPlan = kernel_plan(capability, itemsize, max(self.padded), *kind)
        identity = (kernel, self.spec.key, self.query.dtype, self.value.dtype, self.D, self.E, capability)
        if not results or not tuning.requested(self.spec.key):
            _settle(identity, plan, kernel, attempt, repeatable)
            return
        candidates = tuning_candidates(plan, kernel)
        key = tuning.key_of(self, kernel, self.constants["PRECISION"])
        found = tuning.result_for(key, candidates)
        if found is not None:
            with contextlib.suppress(OutOfResources):  # another alignment than when it was tuned
                attempt(found)
                return
        default = _settle(identity, plan, kernel, attempt, repeatable)
        if found is None and tuning.possible(self):
            tuning.tune(key, attempt, results, default, candidates, self.rounding)

    @property
    def rounding(self) -> float:
        """The relative rounding of the products."""
        if self.query.element_size() == 4 and self.value.element_size() == 4:
            return 2.0**-10 if self.constants["PRECISION"] == "tf32" else 2.0**-17
        return max(torch.finfo(tensor.dtype).eps for tensor in (self.query, self.value))


def _settle(identity: tuple[Any, ...], plan: KernelPlan, kernel: str, attempt: Callable[[Tile], Any], repeatable: bool) -> Tile:
    """Run `attempt` with the first tile of the plan that suits the device, and return it.

    A tile whose kernel exceeds shared memory is passed over; so is one that spills registers, if `repeatable`
    and a later one spills less. The choice is remembered for the process.
    """
    tiles: tuple[Tile, ...] = getattr(plan, kernel)
    if identity in _chosen:
        attempt(tiles[_chosen[identity]])
        return tiles[_chosen[identity]]
    best: tuple[int, int] | None = None  # (spills, number)
    for number, tile in enumerate(tiles):
        if best is not None and (best[0] <= plan.bearable(tile) or not repeatable):
            break
        try:
            compiled = attempt(tile)
        except OutOfResources:
            if number + 1 == len(tiles) and best is None:
                raise
            continue
        found = (tuning.spills(compiled), number)
        best = min(best or found, found)
    if best is None:
        raise InternalError(f"no tiles for {kernel}")
    if repeatable:
        _chosen[identity] = best[1]
    return tiles[best[1]]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _precision(query: Tensor) -> str:
    """How products are computed: for float32 as torch's global settings ask, for 16 bits there is one way.

    Six products of bfloat16 thirds are as good as float32; three of tf32 halves are not, and Triton 3.6 compiles them
    wrongly for head dims above 128.
    """
    if query.dtype is not torch.float32 or torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if interpreting() else "bf16x6"
