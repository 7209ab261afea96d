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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory prints its progress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from flashfuse.bench_variants import Variant

PEERS = ("eager", "sdpa", "inductor", "flex", "flashfuse")  # from safe to risky


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str


@dataclass
class Case:
    """A variant's inputs: query, key and value want gradients; facts is empty or one tensor."""

    variant: Variant
    inputs: list[Tensor]
    facts: list[Tensor]
    grad_out: Tensor

    def sliced(self, dtype: torch.dtype | None = None) -> Case:
        """The last batch row and the last key/value head with its query heads, as leaves of their own."""
        group = self.variant.group
        counts = (group, 1, 1)
        cut = [t.detach()[-1:, -n:].contiguous() for t, n in zip(self.inputs, counts, strict=True)]
        cut = [t.to(dtype or t.dtype) for t in cut]
        grad_out = self.grad_out[-1:, -group:].to(dtype or self.grad_out.dtype)
        return Case(self.variant, [t.requires_grad_() for t in cut], [f[-1:] for f in self.facts], grad_out)


@dataclass
class Cell:
    """One peer on one variant: how to run it, and what was found."""

    peer: str
    run: Callable[..., Tensor] | None = None
    row: dict[str, Any] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=lambda: {"forward_ms": [], "both_ms": []})


def make_case(variant: Variant, shape: Shape) -> Case:
    counts = (shape.heads, shape.heads // variant.group, shape.heads // variant.group)
    inputs = [torch.randn(shape.batch, n, shape.length, shape.head_dim, dtype=shape.dtype, device=shape.device) for n in counts]
    facts = [variant.facts(shape.batch, shape.length, shape.device)] if variant.facts else []
    return Case(variant, [t.requires_grad_() for t in inputs], facts, torch.randn_like(inputs[0]))


def make_run(peer: str, case: Case, shape: Shape, row: dict[str, Any]) -> Callable[..., Tensor]:
    """The function (query, key, value) -> output of this peer; may note facts in the row."""
    variant, facts = case.variant, case.facts
    if peer == "sdpa":
        return sdpa_run(variant, facts, shape)
    if peer == "flex":
        return flex_run(variant, facts, shape, row)
    code = variant.code if peer == "eager" else torch.compile(variant.code, backend=peer, dynamic=False)
    return lambda query, key, value: code(query, key, value, *facts)


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
    """[output, and the gradients of query, key and value]."""
    drop_gradients(case.inputs)
    out = run(*case.inputs)
    out.backward(case.grad_out)
    return [out.detach(), *(each.grad for each in case.inputs)]


def eager_results(case: Case) -> list[Tensor]:
    return results_of(lambda *inputs: case.variant.code(*inputs, *case.facts), case)


def largest_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Largest absolute difference of each; infinite where something is not finite."""
    differences = [(f.double() - e).abs().max().item() for f, e in zip(found, exact, strict=True)]
    return [each if math.isfinite(each) else math.inf for each in differences]


def check(cell: Cell, case: Case, exact: list[Tensor], eager_errors: list[float]) -> None:
    """Runs the peer on the whole inputs and notes how its slice compares with float64 and with eager."""
    assert cell.run is not None
    found = results_of(cell.run, case)
    group = case.variant.group
    cut = [t[-1:, -n:] for t, n in zip(found, (group, group, 1, 1), strict=True)]
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


def prepare(cell: Cell, case: Case, shape: Shape, exact: list[Tensor], eager_errors: list[float]) -> None:
    """Compiles, checks and measures memory; a failure is noted in the row and the cell has no run."""
    start = time.perf_counter()
    before = dict(counters["flashfuse"])
    try:
        cell.run = make_run(cell.peer, case, shape, cell.row)
        check(cell, case, exact, eager_errors)
        drop_gradients(case.inputs)
        forward(cell, case)
        cell.row["peak_bytes"] = peak_bytes(lambda: both(cell, case), shape.device)
    except Exception as error:
        cell.row["failed"] = f"{type(error).__name__}: {error}"[:300]
        cell.run = None
    if cell.peer == "flashfuse":
        cell.row["counters"] = {k: v - before.get(k, 0) for k, v in counters["flashfuse"].items()}
    cell.row["prepare_s"] = round(time.perf_counter() - start, 1)
    drop_gradients(case.inputs)
    gc.collect()
    if shape.device == "cuda":
        torch.cuda.empty_cache()


def run_variant(variant: Variant, shape: Shape, peers: list[str], rounds: int) -> list[Cell]:
    """All peers on one variant, on the same inputs, timed in interleaved rounds."""
    torch._dynamo.reset()
    case = make_case(variant, shape)
    exact = eager_results(case.sliced(torch.float64))
    eager_errors = largest_errors(eager_results(case.sliced()), exact)
    start = {"variant": variant.name, "head_dim": shape.head_dim}
    cells = [Cell(peer, row={**start, "peer": peer}) for peer in peers]
    for cell in cells:
        prepare(cell, case, shape, exact, eager_errors)
    for _ in range(rounds):
        for cell in [each for each in cells if each.run is not None]:
            try:
                forward_ms = median_ms(partial(forward, cell, case), shape.device, case.inputs)
                both_ms = median_ms(partial(both, cell, case), shape.device, case.inputs)
            except Exception as error:
                cell.row["failed"] = f"{type(error).__name__}: {error}"[:300]
                cell.run = None
                continue
            cell.times["forward_ms"].append(forward_ms)
            cell.times["both_ms"].append(both_ms)
    for cell in cells:
        cell.row.update({name: statistics.median(times) for name, times in cell.times.items() if times})
        cell.row["rounds"] = cell.times
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
