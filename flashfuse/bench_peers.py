"""Attention as people write it, by eager code, SDPA, Inductor, FlexAttention and flashfuse: times, memory, errors.

Inductor and flashfuse compile the same code. SDPA (with a mask where its causal flag does not say it) and FlexAttention are
made by hand; their masks are made before the clock starts. On the same inputs and in the same run, output and gradients of one
batch row and one key/value head are compared with float64: `error` is the largest ratio of a peer's error to eager's, and at
most 2 is right (FlashAttention's rule). Times are medians of interleaved rounds; memory is the peak of forward+backward.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory prints its progress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from flashfuse.bench_variants import Variant

T = TypeVar("T")

PEERS = ("eager", "sdpa", "inductor", "flex", "flashfuse")  # from safe to risky
SLOW_MS = 500.0  # a call on a GPU that takes longer is timed once


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str


Cut = Callable[[Tensor], Tensor]
Errors = tuple[list[Tensor], list[float]]  # exact results, and how far eager code in the same precision is from them


@dataclass
class Case:
    """Code and its inputs: `inputs` want gradients, `facts` do not.

    `cuts` says of the output, of each input and of each fact which part is compared with float64: a part that can be
    computed from the parts of the inputs alone. `seed` is set before results are compared, for code that draws numbers.
    """

    code: Callable[..., Tensor]
    inputs: list[Tensor]
    facts: list[Tensor]
    grad_out: Tensor
    cuts: list[Cut]
    seed: int | None = None

    def sliced(self, dtype: torch.dtype | None = None, cuts: list[Cut] | None = None) -> Case:
        """The part that is compared, its floating tensors in `dtype` (None: as they are), inputs as leaves of their own."""

        def part(tensor: Tensor, cut: Cut) -> Tensor:
            tensor = cut(tensor.detach()).clone(memory_format=torch.contiguous_format)
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        grad_out, *rest = [
            part(*pair) for pair in zip((self.grad_out, *self.inputs, *self.facts), cuts or self.cuts, strict=True)
        ]
        inputs = [t.requires_grad_() for t in rest[: len(self.inputs)]]
        return Case(self.code, inputs, rest[len(self.inputs) :], grad_out, [], self.seed)


@dataclass
class Cell:
    """One peer on one variant: how to run it, and what was found."""

    peer: str
    run: Callable[..., Tensor] | None = None
    row: dict[str, Any] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=lambda: {"forward_ms": [], "both_ms": []})
    slow: bool = False


def make_case(variant: Variant, shape: Shape) -> Case:
    counts = (shape.heads, shape.heads // variant.group, shape.heads // variant.group)
    inputs = [torch.randn(shape.batch, n, shape.length, shape.head_dim, dtype=shape.dtype, device=shape.device) for n in counts]
    facts = [variant.facts(shape.batch, shape.length, shape.device)] if variant.facts else []
    # the last batch row, and the last key/value head with its query heads
    cuts: list[Cut] = [lambda t, n=n: t[-1:, -n:] for n in (variant.group, variant.group, 1, 1)]  # type: ignore[misc]
    cuts += [lambda t: t[-1:] for _ in facts]
    return Case(variant.code, [t.requires_grad_() for t in inputs], facts, torch.randn_like(inputs[0]), cuts)


def make_run(peer: str, case: Case, variant: Variant, shape: Shape, row: dict[str, Any]) -> Callable[..., Tensor]:
    """The function (query, key, value) -> output of this peer; may note facts in the row."""
    if peer == "sdpa":
        return sdpa_run(variant, case.facts, shape)
    if peer == "flex":
        return flex_run(variant, case.facts, shape, row)
    return same_code(peer, case)


def same_code(peer: str, case: Case) -> Callable[..., Tensor]:
    """The case's own code as a function of its inputs: eager, or compiled by the backend that `peer` names."""
    code = case.code if peer == "eager" else torch.compile(case.code, backend=peer, dynamic=False)
    return lambda *inputs: code(*inputs, *case.facts)


def sdpa_run(variant: Variant, facts: list[Tensor], shape: Shape) -> Callable[..., Tensor]:
    mask = None
    if variant.keep is not None and not variant.is_causal:
        b = torch.arange(shape.batch, device=shape.device)[:, None, None, None]
        position = torch.arange(shape.length, device=shape.device)
        keep = variant.keep(*facts)(b, torch.zeros_like(b), position[:, None], position[None, :])
        mask = keep.expand(shape.batch if facts else 1, 1, shape.length, shape.length)
    settings = {"attn_mask": mask, "is_causal": variant.is_causal, "enable_gqa": variant.group > 1}
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **settings)


def flex_run(variant: Variant, facts: list[Tensor], shape: Shape, row: dict[str, Any]) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if variant.keep is not None:
        create = torch.compile(create_block_mask, dynamic=False)
        sizes = (shape.batch if facts else None, None, shape.length, shape.length)
        keep = variant.keep(*facts)
        block_mask = create(keep, *sizes, device=shape.device)
        row["mask_ms"] = median_ms(lambda: create(keep, *sizes, device=shape.device), shape.device, [])
    flex = torch.compile(flex_attention, dynamic=False)
    settings = {"block_mask": block_mask, "enable_gqa": variant.group > 1}
    return lambda query, key, value: flex(query, key, value, **settings)


def results_of(run: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """[output, and the gradients of the inputs]."""
    drop_gradients(case.inputs)
    if case.seed is not None:
        torch.manual_seed(case.seed)
    out = run(*case.inputs)
    out.backward(case.grad_out)
    return [out.detach(), *(each.grad for each in case.inputs)]


def eager_results(case: Case) -> list[Tensor]:
    return results_of(same_code("eager", case), case)


def eager_reference(case: Case) -> Errors:
    """What the compared part is in float64, and eager's errors on it."""
    exact = eager_results(case.sliced(torch.float64))
    return exact, largest_errors(eager_results(case.sliced()), exact)


def largest_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Largest absolute difference of each; infinite where something is not finite."""
    differences = [(f.double() - e).abs().max().item() for f, e in zip(found, exact, strict=True)]
    return [each if math.isfinite(each) else math.inf for each in differences]


def check(cell: Cell, case: Case, reference: Errors) -> None:
    """Runs the peer on the whole inputs and notes how its slice compares with float64 and with eager."""
    assert cell.run is not None
    exact, eager_errors = reference
    found = results_of(cell.run, case)
    cut = [part(t) for t, part in zip(found, case.cuts[: len(found)], strict=True)]
    errors = largest_errors(cut, exact)
    ratios = [mine / max(theirs, 1e-30) for mine, theirs in zip(errors, eager_errors, strict=True)]
    floor = 1e-5 if found[0].dtype == torch.float32 else 0.0  # the rule is for half precision
    right = all(mine <= 2 * theirs + floor for mine, theirs in zip(errors, eager_errors, strict=True))
    cell.row.update(errors=errors, eager_errors=eager_errors, error=max(ratios), right=right)


def forward(cell: Cell, case: Case) -> Tensor:
    assert cell.run is not None
    with torch.no_grad():
        return cell.run(*case.inputs)


def both(cell: Cell, case: Case) -> None:
    assert cell.run is not None
    cell.run(*case.inputs).backward(case.grad_out)


def prepare(
    cell: Cell, case: Case, make: Callable[[str, dict[str, Any]], Callable[..., Tensor]], reference: Callable[..., Errors]
) -> None:
    """Compiles, checks and measures memory; a failure is noted in the row and the cell has no run."""
    start = time.perf_counter()
    before = dict(counters["flashfuse"])
    device = case.grad_out.device.type
    try:
        cell.run = make(cell.peer, cell.row)
        check(cell, case, reference(cell.run))
        drop_gradients(case.inputs)
        forward(cell, case)
        cell.row["peak_bytes"] = peak_bytes(lambda: both(cell, case), device)
    except Exception as error:
        cell.row["failed"] = f"{type(error).__name__}: {error}"[:300]
        cell.run = None
    if cell.peer == "flashfuse":
        cell.row["counters"] = {k: v - before.get(k, 0) for k, v in counters["flashfuse"].items()}
    cell.row["prepare_s"] = round(time.perf_counter() - start, 1)
    drop_gradients(case.inputs)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def turned(peers: Sequence[T], number: int) -> list[T]:
    """The order of peers in a round: each begins in its turn, since the first after a pause meets a cooler, faster device."""
    start = number % len(peers) if peers else 0
    return [*peers[start:], *peers[:start]]


def time_in_rounds(cells: list[Cell], case: Case, rounds: int) -> None:
    """Interleaved rounds of forward and forward+backward; a cell with calls longer than SLOW_MS on a GPU gets one round."""
    device = case.grad_out.device.type
    for number in range(rounds):
        for cell in [each for each in turned(cells, number) if each.run is not None and not each.slow]:
            try:
                forward_ms = median_ms(partial(forward, cell, case), device, case.inputs)
                both_ms = median_ms(partial(both, cell, case), device, case.inputs)
            except Exception as error:
                cell.row["failed"] = f"{type(error).__name__}: {error}"[:300]
                cell.run = None
                continue
            cell.slow = device == "cuda" and both_ms > SLOW_MS
            cell.times["forward_ms"].append(forward_ms)
            cell.times["both_ms"].append(both_ms)
    for cell in cells:
        cell.row.update({name: statistics.median(times) for name, times in cell.times.items() if times})
        cell.row["rounds"] = cell.times


def run_variant(variant: Variant, shape: Shape, peers: list[str], rounds: int) -> list[Cell]:
    """All peers on one variant, on the same inputs, timed in interleaved rounds."""
    torch._dynamo.reset()
    case = make_case(variant, shape)
    reference = eager_reference(case)
    start = {"variant": variant.name, "head_dim": shape.head_dim}
    cells = [Cell(peer, row={**start, "peer": peer}) for peer in peers]
    for cell in cells:
        prepare(cell, case, lambda peer, row: make_run(peer, case, variant, shape, row), lambda run: reference)
    time_in_rounds(cells, case, rounds)
    return cells


def guarded_rows(variant: Variant, shape: Shape, peers: list[str], rounds: int) -> list[dict[str, Any]]:
    """The variant's rows; a failure outside any cell (a lost CUDA context, say) is a row too."""
    try:
        return [cell.row for cell in run_variant(variant, shape, peers, rounds)]
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"[:300]
        return [{"variant": variant.name, "head_dim": shape.head_dim, "peer": "all", "failed": failed}]


# ------------------------------------------------------------------------------------------------ measuring


def median_ms(run: Callable[[], object], device: str, inputs: list[torch.Tensor], cpu_repeats: int = 3) -> float:
    """Median time of one call in milliseconds. The gradients of `inputs` are dropped before each call."""
    if device == "cuda":
        from triton.testing import do_bench

        drop_gradients(inputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if (first_ms := 1000 * (time.perf_counter() - start)) > SLOW_MS:
            return first_ms  # do_bench would call it seven times at least
        return do_bench(run, warmup=25, rep=100, grad_to_none=inputs, return_mode="median")
    times = []
    for _ in range(cpu_repeats):
        drop_gradients(inputs)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def drop_gradients(inputs: list[torch.Tensor]) -> None:
    for each in inputs:
        each.grad = None


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes that tensors made during `run` held at one time, as PyTorch's allocator reports it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
