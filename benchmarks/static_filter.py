"""Compiles every tile of `codegen/plan.py` for devices that need not be there, and says what ptxas made of it.

A row has registers and spilled bytes a thread, shared memory, ptxas' advisories (C75xx: matrix instructions that wait for
each other), and the instructions of the main loop, all of them and those on matrices. GQA has no rows: the number of heads
in a group is an argument, the code is the same. Needs no GPU.

    python benchmarks/static_filter.py [--targets 80,90] [--specs plain,causal] [--head-dims 64,128] [--kernels forward]
        [--every] [--tiles 64,64,4,3:128,64,8,2] [--even both] [--out static_filter]

Without --every, the tiles that a launch settles on; with --tiles, those instead of the plan's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "codegen"))

from compile_report import SHARED_MEMORY, compile_kernel, named_spec, settled
from measure import ResultFile

from flashfuse.codegen.plan import Tile, kernel_plan

SPECS = "plain,causal,window,documents,alibi,softcap"
KERNELS = "forward,grad_query,grad_key_value,decode"


def short(tile: Tile) -> str:
    """A tile as a word."""
    return f"{tile.block_m},{tile.block_n},{tile.warps},{tile.stages}{'' if tile.branch else ' always'}"


def reports_of(options: argparse.Namespace, target: int, head_dim: int, kernel: str, name: str, even: bool) -> list[dict]:
    """The reports of a kernel's candidates."""
    spec = named_spec(name)
    if options.tiles:
        tiles = [Tile(*(int(number) for number in words.split(","))) for words in options.tiles.split(":")]
    elif options.every:
        tiles = getattr(kernel_plan(divmod(target, 10), 4 if options.dtype == "fp32" else 2, head_dim), kernel)
    else:
        return [settled(spec, kernel, target, options.dtype, head_dim, even)]
    return [compile_kernel(spec, kernel, target, options.dtype, head_dim, tile, even) for tile in tiles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="80,86,90")
    parser.add_argument("--specs", default=SPECS)
    parser.add_argument("--head-dims", default="64,96,128,192,256")
    parser.add_argument("--kernels", default=KERNELS)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--every", action="store_true", help="all candidates, not those that a launch settles on")
    parser.add_argument("--tiles", default="", help="these instead of the plan's")
    parser.add_argument("--even", choices=("yes", "no", "both"), default="yes", help="whether tiles divide the lengths")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    results = ResultFile(options.out, "cpu", dtype=options.dtype) if options.out else None
    evens = {"yes": (True,), "no": (False,), "both": (True, False)}[options.even]
    cases = itertools.product(
        options.targets.split(","), options.head_dims.split(","), options.kernels.split(","), options.specs.split(","), evens
    )
    total = spilling = serialised = 0
    for target, head_dim, kernel, name, even in cases:
        for report in reports_of(options, int(target), int(head_dim), kernel, name, even):
            fits = report["shared"] <= SHARED_MEMORY[int(target)]
            total, spilling, serialised = total + 1, spilling + (report["spill"] > 0), serialised + bool(report["advisories"])
            remarks = [*report["advisories"], *["spills"] * (report["spill"] > 0), *["does not fit"] * (not fits)]
            print(
                f"sm_{target} {head_dim:>3} {kernel:<14} {name:<9} {'even' if even else 'edge'} {short(report['tile']):<12} "
                f"{report['registers']:>3} registers {report['spill']:>4} B spilled {report['shared'] / 1024:>5.0f} KiB "
                f"{report['loop']:>5} in the loop, {report['matrix']:>3} {report['matrix_name']:<5} {' '.join(remarks)}",
                flush=True,
            )
            row = {**report, "target": f"sm_{target}", "head_dim": int(head_dim), "spec": name, "even": even,
                   "tile": short(report["tile"]), "fits": fits}  # fmt: skip
            if results is not None:
                results.add(row)
    print(f"{total} kernels, {spilling} spill, {serialised} have serialised matrix instructions")


if __name__ == "__main__":
    main()
