"""Result files for the benchmarks."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
