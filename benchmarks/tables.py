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


def latest(name: str, peer: str, needed: set[str], *keys: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by what the column `peer` says, for each cell of a result file: of the last run that has all that is `needed`."""
    found = {}
    for run in json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()):
        cells: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in run["rows"]:
            if "failed" not in row:
                cells.setdefault(tuple(row[key] for key in keys), {})[row[peer]] = row | {"device": run["device"]}
        found |= {key: cell for key, cell in cells.items() if needed <= cell.keys()}
    return found


def mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def flex(own: str) -> str:
    """A peer's speed over FlexAttention's, masks prepared in both: forward / backward, and the geometric means."""
    cells = latest("flex_grid", "peer", {"flex", own}, "variant", "length", "head_dim")
    names = list(dict.fromkeys(name for name, _, _ in cells))
    lengths, head_dims = (sorted({cell[place] for cell in cells}) for place in (1, 2))
    found: dict[str, list[float]] = {"forward_ms": [], "backward_ms": []}

    def cell(name: str, length: int, head_dim: int) -> str:
        pair = cells.get((name, length, head_dim))
        if pair is None:
            return ""
        ratios = {key: pair["flex"][key] / pair[own][key] for key in found}
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
    cells = latest(name, "kernel", {"hopper", "cudnn"}, "head_dim", "causal", "length")
    lengths = sorted({length for _, _, length in cells})
    rows = []
    for head_dim, causal in dict.fromkeys((head_dim, causal) for head_dim, causal, _ in cells):
        pairs = [[cells[head_dim, causal, length][kernel]["tflops"] for kernel in ("hopper", "cudnn")] for length in lengths]
        shares = [own / other for own, other in pairs]
        each = [f"{own:.0f} ({share:.2f})" for (own, _), share in zip(pairs, shares, strict=True)]
        devices = {cells[head_dim, causal, length]["hopper"]["device"].split()[1] for length in lengths}
        device = " and ".join(sorted(devices))
        rows.append([f"{head_dim}, {'causal' if causal else 'full'}", *each, f"{mean(shares):.3f}", device])
    return markdown(["head dim, mask", *(f"S = {length}" for length in lengths), "geometric mean", "device"], rows)


def forms() -> str:
    """Milliseconds of attention's other forms, forward / forward+backward, and how many times as fast flashfuse is."""
    cells = latest("attention_forms", "peer", {"inductor", "flashfuse"}, "variant", "head_dim")
    peers = ("eager", "inductor", "flex", "flashfuse")
    keys = ("forward_ms", "both_ms")
    rows = []
    for (variant, head_dim), cell in sorted(cells.items(), key=lambda item: item[0][::-1]):
        times = ["" if peer not in cell else " / ".join(f"{cell[peer][key]:.2f}" for key in keys) for peer in peers]
        ratios = [
            "" if peer not in cell else " / ".join(f"{cell[peer][key] / cell['flashfuse'][key]:.2f}" for key in keys)
            for peer in ("flex", "inductor")
        ]
        rows.append([f"{variant}, {head_dim}", *times, *ratios])
    heads = ["code, head dim", "eager", "Inductor", "FlexAttention", "flashfuse", "× FlexAttention", "× Inductor"]
    return markdown(heads, rows)


def decoding() -> str:
    """Milliseconds of a call of one query a head, and the share of a copy's bandwidth; in brackets of a CUDA graph's."""
    peers = ("eager", "inductor", "flex", "sdpa", "flashfuse")
    shape = ("batch", "heads", "groups", "head_dim")
    cells = latest("decode", "peer", set(peers), *shape)

    def said(row: Row) -> str:
        alone = f"{row['ms']:.3f}, {row['share_of_copy']:.0%}"
        return alone + (f" ({row['graph_ms']:.3f}, {row['graph_share_of_copy']:.0%})" if "graph_ms" in row else "")

    rows = [[", ".join(map(str, key)), *(said(cell[peer]) for peer in peers)] for key, cell in cells.items()]
    heads = ["batch, heads, key heads, head dim", "eager", "Inductor", "FlexAttention", "SDPA, no mask", "flashfuse"]
    return markdown(heads, rows)


TABLES: dict[str, Callable[[], str]] = {
    "flex portable": lambda: flex("portable"),
    "flex flashfuse": lambda: flex("flashfuse"),
    "forms": forms,
    "decoding": decoding,
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
