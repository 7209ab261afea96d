"""Times, peak memory and result files for the benchmarks."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory prints its progress

import torch

RESULTS = Path(__file__).parent / "results"


def median_ms(
    run: Callable[[], object], device: str, inputs: list[torch.Tensor], cpu_repeats: int = 3
) -> float:
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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
