"""Random launches of many programs, each program in a process of its own, since most of the time is the compiler's."""

from __future__ import annotations

import collections
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import ResultFile

Launch = Callable[[str, random.Random], tuple[float, str]]  # difference over what is allowed, the launch in words


class NotServedError(RuntimeError):
    """A launch for which the kernel under test does not serve; the message says why."""


def soak_program(name: str, launches: int, seed: int, stop_after: float, launch: Launch) -> dict[str, Any]:
    """The row of one program: how many launches ran, how many were wrong, and why some were not served."""
    chosen, start = random.Random(f"{seed} {name}"), time.time()
    torch.manual_seed(seed)
    differences: list[float] = []
    left: collections.Counter[str] = collections.Counter()
    for _ in range(launches):
        if time.time() - start > stop_after:
            break
        try:
            difference, words = launch(name, chosen)
        except NotServedError as reason:
            left[str(reason)[:200]] += 1
            continue
        differences.append(difference)
        if not difference <= 1:
            print(f"WRONG {name} {words}: {difference:.3g} of what is allowed", flush=True)
    return {
        "program": name, "launches": len(differences), "wrong": sum(not difference <= 1 for difference in differences),
        "largest_difference": max(differences, default=0.0), "not_served": dict(left), "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def soak(names: Sequence[str], launches: int, seed: int, stop_after: float, launch: Launch, results: ResultFile) -> None:
    """Share `launches` between programs, which run side by side; `launch` is a module's function."""
    share = -(-launches // len(names))
    with multiprocessing.get_context("spawn").Pool(len(names)) as pool:
        jobs = [pool.apply_async(soak_program, (name, share, seed, stop_after, launch)) for name in names]
        rows = [job.get() for job in jobs]
    for row in rows:
        results.add(row)
        words = ", ".join(f"{count} left: {reason}" for reason, count in row["not_served"].items())
        print(f"{row['program']:12}{row['launches']:7} launches, {row['wrong']} wrong, largest difference "
              f"{row['largest_difference']:.2f} of what is allowed, {row['seconds']:.0f} s {words}", flush=True)  # fmt: skip
    done, wrong = (sum(row[key] for row in rows) for key in ("launches", "wrong"))
    print(f"{done} launches, {wrong} wrong", flush=True)
