"""Markdown tables of docs/measurements.md from benchmarks/results, the latest row of each cell.

python benchmarks/tables.py            # print them
python benchmarks/tables.py --write    # put them into docs/measurements.md, between its markers
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measurements.md"
Row = dict[str, Any]


def latest(name: str, *keys: str) -> dict[tuple[Any, ...], Row]:
    """The last row of each cell of a result file."""
    runs = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return {tuple(row[key] for key in keys): row for run in runs for row in run["rows"] if "failed" not in row}


def mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def flex(own: str) -> str:
    """A peer's speed over FlexAttention's, masks prepared in both: forward / backward, and the geometric means."""
    cells = latest("flex_grid", "variant", "length", "head_dim", "peer")
    names = list(dict.fromkeys(name for name, _, _, peer in cells if peer == own))
    lengths = sorted({length for _, length, _, peer in cells if peer == own})
    head_dims = sorted({head_dim for *_, head_dim, peer in cells if peer == own})
    found: dict[str, list[float]] = {"forward_ms": [], "backward_ms": []}

    def cell(name: str, length: int, head_dim: int) -> str:
        pair = [cells.get((name, length, head_dim, peer)) for peer in ("flex", own)]
        if pair[0] is None or pair[1] is None:
            return ""
        ratios = {key: pair[0][key] / pair[1][key] for key in found}
        for key, ratio in ratios.items():
            found[key].append(ratio)
        return " / ".join(f"{ratio:.2f}" for ratio in ratios.values())

    rows = [
        [f"{name}, {length}", *(cell(name, length, head_dim) for head_dim in head_dims)] for name in names for length in lengths
    ]
    words = ", ".join(f"{key.removesuffix('_ms')} {mean(each):.2f} (least {min(each):.2f})" for key, each in found.items())
    return markdown(["variant, S", *(f"head dim {each}" for each in head_dims)], rows) + f"\n\nGeometric mean: {words}."


def cudnn(name: str) -> str:
    """The Hopper kernel's TFLOP/s and its share of cuDNN's, by head dim, mask and length."""
    cells = latest(name, "head_dim", "causal", "length", "kernel")
    lengths = sorted({length for _, _, length, _ in cells})
    rows = []
    for head_dim, causal in dict.fromkeys((head_dim, causal) for head_dim, causal, _, _ in cells):
        pairs = [[cells[head_dim, causal, length, kernel]["tflops"] for kernel in ("hopper", "cudnn")] for length in lengths]
        shares = [own / other for own, other in pairs]
        each = [f"{own:.0f} ({share:.2f})" for (own, _), share in zip(pairs, shares, strict=True)]
        rows.append([f"{head_dim}, {'causal' if causal else 'full'}", *each, f"{mean(shares):.3f}"])
    return markdown(["head dim, mask", *(f"S = {length}" for length in lengths), "geometric mean"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "flex portable": lambda: flex("portable"),
    "flex flashfuse": lambda: flex("flashfuse"),
    "cudnn forward": lambda: cudnn("hopper"),
    "cudnn backward": lambda: cudnn("hopper_backward"),
}


def written(page: str) -> str:
    """The page with every table between its markers as the results have it."""
    for name, table in TABLES.items():
        first, last = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        before, found, rest = page.partition(first)
        if not found:
            raise SystemExit(f"{PAGE.name} has no marker {first.strip()}")
        page = before + first + "\n" + table() + "\n" + last + rest.partition(last)[2]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/measurements.md")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text()))
        return
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}\n")


if __name__ == "__main__":
    main()
