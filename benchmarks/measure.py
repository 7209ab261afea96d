"""Result files, tables and names on the command line for the benchmarks."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory prints its progress

import torch

RESULTS = Path(__file__).parent / "results"


class ResultFile:
    """benchmarks/results/<name>.json: a list of runs, each with its machine, versions, command line and rows.

    A run is written anew after every row, so that a run that is cut off keeps what it had; earlier runs stay.
    """

    def __init__(self, name: str, device: str, **facts: object) -> None:
        import triton

        self.path = RESULTS / f"{name}.json"
        self.earlier: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []
        self.rows: list[dict[str, Any]] = []
        self.run: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "command": " ".join(["python", *sys.argv]),
            **facts,
            "rows": self.rows,
        }

    def add(self, row: dict[str, Any], write: bool = True) -> None:
        """Appends the row and writes the file."""
        self.rows.append(row)
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([*self.earlier, self.run], indent=1) + "\n")


def milliseconds(peers: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Each peer's time on a GPU: the median of interleaved rounds, in which peers begin in turns."""
    from triton.testing import do_bench

    from flashfuse.bench_peers import turned

    times: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds):
        for name in turned(list(peers), number):
            times[name].append(do_bench(peers[name], warmup=10, rep=40, return_mode="median"))
    return {name: statistics.median(measured) for name, measured in times.items()}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a cell, then flashfuse against FlexAttention's and Inductor's time and SDPA's memory."""
    heading = f"{'variant':11}{'D':>4} {'peer':10}{'fwd ms':>9}{'f+b ms':>9}{'MiB':>8}{'error':>7}{'mask ms':>9}"
    print("\n" + heading)
    for row in rows:
        name = f"{row['variant']:11}{row['head_dim']:>4} {row['peer']:10}"
        if "both_ms" not in row:
            print(name + "failed: " + row.get("failed", "?").replace("\n", " ")[:70])
            continue
        wrong = "" if row["right"] else " WRONG"
        mask = f"{row['mask_ms']:9.3f}" if "mask_ms" in row else ""
        print(
            f"{name}{row['forward_ms']:9.3f}{row['both_ms']:9.3f}{row['peak_bytes'] / 2**20:8.0f}{row['error']:7.2f}{mask}{wrong}"
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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
