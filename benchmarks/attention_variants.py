"""Attention as people write it (attention_code.py), forward and forward+backward, and other ways to run it.

Peers: eager; inductor and flashfuse, which are torch.compile on the same code; sdpa and flex, hand-made
(the fused SDPA operator, with an explicit mask where its causal flag does not say it, and compiled
FlexAttention with its block mask). Masks of the hand-made peers are built before the clock starts; the
block mask's own time is reported. S = 4096, B*S = 16384 tokens, hidden width 2048, bfloat16.

In the same run, on the same fresh random inputs, the output and gradients of one batch row and one
key/value head are compared with float64: `error` is the largest ratio of a peer's error to eager's, and at
most 2 is right (FlashAttention's rule). Times are medians of interleaved rounds of do_bench. Memory is the
peak of forward+backward above the inputs.

    python benchmarks/attention_variants.py [--head-dims 64] [--variants causal,gqa] [--peers flex,flashfuse]
    python benchmarks/attention_variants.py --small          # tiny shapes, to try the script on a CPU
"""

from __future__ import annotations

import argparse
import gc
import math
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from attention_code import VARIANTS, Variant
from measure import ResultFile, drop_gradients, median_ms, peak_bytes
from torch import Tensor
from torch._dynamo.utils import counters

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
    inputs = [
        torch.randn(shape.batch, n, shape.length, shape.head_dim, dtype=shape.dtype, device=shape.device)
        for n in counts
    ]
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


def flex_run(
    variant: Variant, facts: list[Tensor], shape: Shape, row: dict[str, Any]
) -> Callable[..., Tensor]:
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
    found = results_of(cell.run, case)
    group = case.variant.group
    cut = [t[-1:, -n:] for t, n in zip(found, (group, group, 1, 1), strict=True)]
    errors = largest_errors(cut, exact)
    ratios = [mine / max(theirs, 1e-30) for mine, theirs in zip(errors, eager_errors, strict=True)]
    floor = 1e-5 if found[0].dtype == torch.float32 else 0.0  # the rule is for half precision
    right = all(mine <= 2 * theirs + floor for mine, theirs in zip(errors, eager_errors, strict=True))
    cell.row.update(errors=errors, eager_errors=eager_errors, error=max(ratios), right=right)


def forward(cell: Cell, case: Case) -> Tensor:
    with torch.no_grad():
        return cell.run(*case.inputs)


def both(cell: Cell, case: Case) -> None:
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
                forward_ms = median_ms(lambda each=cell: forward(each, case), shape.device, case.inputs)
                both_ms = median_ms(lambda each=cell: both(each, case), shape.device, case.inputs)
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


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a cell, then flashfuse against FlexAttention's and Inductor's time and SDPA's memory."""
    heading = (
        f"{'variant':11}{'D':>4} {'peer':10}{'fwd ms':>9}{'f+b ms':>9}{'MiB':>8}{'error':>7}{'mask ms':>9}"
    )
    print("\n" + heading)
    for row in rows:
        name = f"{row['variant']:11}{row['head_dim']:>4} {row['peer']:10}"
        if "both_ms" not in row:
            print(name + "failed: " + row.get("failed", "?").replace("\n", " ")[:70])
            continue
        wrong = "" if row["right"] else " WRONG"
        mask = f"{row['mask_ms']:9.3f}" if "mask_ms" in row else ""
        print(
            f"{name}{row['forward_ms']:9.3f}{row['both_ms']:9.3f}{row['peak_bytes'] / 2**20:8.0f}"
            f"{row['error']:7.2f}{mask}{wrong}"
        )
    found = {(row["variant"], row["head_dim"], row["peer"]): row for row in rows if "both_ms" in row}
    print("\nflashfuse: speed against flex and inductor (forward, forward+backward), memory against sdpa")
    for (name, head_dim, peer), row in found.items():
        if peer != "flashfuse":
            continue
        parts = [f"{name:11}{head_dim:>4}"]
        for rival in ("flex", "inductor"):
            if other := found.get((name, head_dim, rival)):
                ratios = [other[key] / row[key] for key in ("forward_ms", "both_ms")]
                parts.append(f"{rival} {ratios[0]:6.2f}x {ratios[1]:6.2f}x")
        if (other := found.get((name, head_dim, "sdpa"))) and other["peak_bytes"]:
            parts.append(f"memory {row['peak_bytes'] / other['peak_bytes']:5.2f}x")
        print("   ".join(parts))


def chosen(text: str, allowed: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in allowed]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}")
    return [name for name in allowed if name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--out", default="attention_variants", help="added to benchmarks/results/OUT.json")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, help="seconds; no variant is begun later"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, no result file")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("no GPU here: only --small runs on a CPU")
    torch.manual_seed(options.seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, length, hidden = (2, 320, 8) if options.small else (4, 4096, 2048)
    peers = chosen(options.peers, PEERS)
    results = ResultFile(
        options.out, device, seed=options.seed, batch=batch, length=length, hidden=hidden, dtype=str(dtype)
    )
    start = time.perf_counter()
    for head_dim in [int(each) for each in options.head_dims.split(",")]:
        heads = 8 if options.small else hidden // head_dim
        shape = Shape(batch, length, heads, head_dim, dtype, device)
        for name in chosen(options.variants, tuple(VARIANTS)):
            if time.perf_counter() - start > options.stop_after:
                print(f"{name} {head_dim}: not begun, --stop-after has passed")
                continue
            for row in guarded_rows(VARIANTS[name], shape, peers, options.rounds):
                results.add(row, write=not options.small)
            print(f"{name} {head_dim}: done after {time.perf_counter() - start:.0f} s", flush=True)
    print_table(results.rows)


if __name__ == "__main__":
    main()
