"""Times every kernel of a few masks with every candidate tile, on the GPU: where the defaults in `codegen/plan.py` come from.

B*S = 16384, hidden 2048, bf16. Kernels are compiled in parallel processes first. Milliseconds, spilled registers.

    python benchmarks/kernel_tiles.py [--head-dims 64,128] [--masks causal,sliding,document] [--length 4096] [--out kernel_tiles]
        [--kernels grad_key_value] [--tiles 32,32,4,2:32,128,8,2,split]

A tile is queries, keys, warps, stages; `split` is dK and dV by a launch each, `always` masks every block, `tma` loads by
tensor descriptors. The gradients
of every tile are compared with the first's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys

import torch
from measure import ResultFile

from flashfuse.codegen import launch, tuning
from flashfuse.codegen.capture_gradients import capture_gradients
from flashfuse.codegen.plan import Tile
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind

TILES = {
    "forward": ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 32, 4, 3)),
    "grad_query": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
    "grad_key_value": ((32, 64, 4, 4), (32, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (32, 32, 4, 2)),
}


def spec_of(mask: str) -> AttentionSpec:
    """Full, causal, sliding (256) or causal within documents, scale 1/8."""
    b = Builder()
    s, m, n = b.leaf("score"), b.leaf("index", "m"), b.leaf("index", "n")
    keep, captures = n <= m, ()
    if mask == "sliding":
        keep = keep & ((m - n) < 256)
    if mask == "document":
        ids = [b.leaf("load", 0, Kind.INT, [b.leaf("index", "b"), index]) for index in (m, n)]
        keep, captures = keep & ids[0].eq(ids[1]), (Capture("documents", Kind.INT, 2),)
    score = s * 0.125 if mask == "full" else b.op("where", keep, s * 0.125, float("-inf"))
    return AttentionSpec(b.program(score), captures, EmptyRows.IMPOSSIBLE)


def named_tiles(words: str, kernel: str) -> list[Tile]:
    """The tiles given on the command line, or the usual ones with and without a branch."""
    if not words:
        return [Tile(*sizes, branch=branch) for sizes, branch in itertools.product(TILES[kernel], (True, False))]
    parts = [word.split(",") for word in words.split(":")]
    return [
        Tile(*(int(n) for n in part[:4]), branch="always" not in part, split="split" in part, tma="tma" in part) for part in parts
    ]


def attempts(mask: str, head_dim: int, options: argparse.Namespace):
    """(kernel, tile, function that launches it and returns what it computed) for all candidates."""
    length = options.length
    torch.manual_seed(0)
    batch, heads = 16384 // length, 2048 // head_dim
    q, k, v, do = (torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    captures = [torch.randint(0, 12, (batch, length), device="cuda").sort(1).values] if mask == "document" else []
    spec = spec_of(mask)
    out, stats = launch.forward(spec, q, k, v, captures, [])
    call = launch.Call(spec, q, k, v, captures, [])
    call.out, call.grad_out, call.stats, call.delta = out, do, stats, torch.zeros_like(stats[0])
    call.grad_stats = None
    no_captures = capture_gradients(call, [])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launchers = {
        "forward": (lambda tile: launch._forward(call, tile, out, stats, low=False), [out]),
        "grad_query": (lambda tile: launch._grad_query(call, tile, dq, no_captures, low=False), [dq]),
        "grad_key_value": (lambda tile: launch._grad_key_value(call, tile, dk, dv, None), [dk, dv]),
    }
    launchers["grad_query"][0](Tile(64, 32, 4, 2))  # makes delta
    for kernel in options.kernels.split(","):
        for tile in named_tiles(options.tiles, kernel):
            yield kernel, tile, *launchers[kernel]


def whole(mask: str, head_dim: int, length: int):
    """(direction, milliseconds) of everything that one call launches, with the default tiles."""
    import triton

    batch, heads = 16384 // length, 2048 // head_dim
    q, k, v, do = (torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    captures = [torch.randint(0, 12, (batch, length), device="cuda").sort(1).values] if mask == "document" else []
    spec = spec_of(mask)
    out, stats = launch.forward(spec, q, k, v, captures, [])
    needs = [False] * len(captures)
    for direction, run in (
        ("forward", lambda: launch.forward(spec, q, k, v, captures, [])),
        ("backward", lambda: launch.backward(spec, do, q, k, v, out, stats, captures, [], needs)),
    ):
        yield direction, triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def compile_share(cases: list[tuple[str, int]], options: argparse.Namespace, shares: int) -> None:
    """Run every `shares`-th candidate once, so that its binary is in Triton's cache."""
    place = itertools.count()
    for mask, head_dim in cases:
        for _kernel, tile, launcher, _results in attempts(mask, head_dim, options):
            if next(place) % shares == options.share:
                try:
                    launcher(tile)
                except Exception as error:
                    print(f"{tile}: {type(error).__name__}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--masks", default="causal,sliding,document")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kernels", default=",".join(TILES))
    parser.add_argument("--tiles", default="")
    parser.add_argument("--out", default="kernel_tiles")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [(mask, int(dim)) for dim in options.head_dims.split(",") for mask in options.masks.split(",")]
    shares = max(1, (os.cpu_count() or 2) - 2)
    if options.share is not None:
        compile_share(cases, options, shares)
        return
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--share", str(share)]) for share in range(shares)]
    for worker in workers:
        worker.wait()
    time_all(cases, options)


def time_all(cases: list[tuple[str, int]], options: argparse.Namespace) -> None:
    import triton

    results = ResultFile(options.out, "cuda", length=options.length, dtype="torch.bfloat16")
    for mask, head_dim in cases:
        found: dict[str, list[tuple[float, str]]] = {}
        expected: dict[str, list[torch.Tensor]] = {}
        for kernel, tile, launcher, computed in attempts(mask, head_dim, options):
            name = f"{tile.block_m},{tile.block_n},{tile.warps},{tile.stages}{'' if tile.branch else ' always'}"
            name += (" split" if tile.split else "") + (" tma" if tile.tma else "")
            row = {"mask": mask, "head_dim": head_dim, "kernel": kernel, "tile": name}
            try:
                compiled = launcher(tile)
                row["spills"] = tuning.spills(compiled)
                first = expected.setdefault(kernel, [each.clone() for each in computed])
                row["difference"] = max(float((x.float() - y.float()).abs().max()) for x, y in zip(computed, first, strict=True))
                row["ms"] = triton.testing.do_bench(lambda: launcher(tile), warmup=5, rep=25, return_mode="median")  # noqa: B023
                found.setdefault(kernel, []).append((row["ms"], f"{name} s{row['spills']} e{row['difference']:.0e}"))
            except Exception as error:  # a tile that does not fit is a result too
                row["error"] = f"{type(error).__name__}: {str(error)[:100]}"
            results.add(row)
        for direction, ms in whole(mask, head_dim, options.length):
            results.add({"mask": mask, "head_dim": head_dim, "kernel": f"whole {direction}", "tile": "default", "ms": ms})
            print(f"{mask} {head_dim} whole {direction}, default tiles: {ms:.3f}")
        for kernel, rows in found.items():
            print(f"{mask} {head_dim} {kernel}: " + " | ".join(f"{ms:.3f} {name}" for ms, name in sorted(rows)), flush=True)


if __name__ == "__main__":
    main()
