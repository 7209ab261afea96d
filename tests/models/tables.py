"""What a sweep found: a line for each run, the counts of each mode, and the refusals by what they are.

A site is an attention: a softmax that lies between two products, whether its normal form could be read or not. What never
counts: a softmax without a product on both sides (FF101: routers, classifiers, losses, pooling), and calls of SDPA without
a mask that PyTorch's kernels serve (FF102).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from measure import MODES

Result = dict[str, Any]


def line_of(row: Result) -> str:
    """One line of the table."""
    head = f"{row['family']:34}{row['mode']:22}"
    if row["state"] != "ok":
        return f"{head}{row['state']}  {row['error'][:140]} {row.get('at', '')}"
    codes = Counter(each["code"] for each in row["refused"])
    words = " ".join(f"{code}x{count}" for code, count in sorted(codes.items())) or "-"
    ratio = f"{row['ratio']:.2f}" + (f" ({row['bounded']:.2f})" if "bounded" in row else "")
    failure = f"  {row['failures'][0][:90]}" if row["failures"] else ""
    return (f"{head}{row['sites']:4}{row['fused']:4}  {words:22}{ratio:14}{row['check'][:24]:26}"
            f"{row['own_seconds']:6.2f}s{row['seconds']:7.1f}s{failure}")  # fmt: skip


def is_wrong(row: Result) -> bool:
    """Whether a result fails the rule, also given the model's conditioning."""
    return row["state"] == "ok" and not min(row["ratio"], row.get("bounded", row["ratio"])) <= 2


def summary(rows: list[Result]) -> Result:
    """Counts over the rows of one mode."""
    ok = [row for row in rows if row["state"] == "ok"]
    sites, fused = sum(row["sites"] for row in ok), sum(row["fused"] for row in ok)
    return {
        "families": len(ok), "with_attention": sum(row["sites"] > 0 for row in ok), "sites": sites, "fused": fused,
        "share": round(fused / sites, 4) if sites else None,
        "wholly_fused": sum(row["sites"] == row["fused"] > 0 for row in ok),
        "wrong": [row["family"] for row in ok if is_wrong(row)],
        "ill_conditioned": [row["family"] for row in ok if row["ratio"] > 2 and not is_wrong(row)],
        "crashed": [row["family"] for row in rows if row["state"] in ("crashed", "died")],
        "too_slow": [row["family"] for row in rows if row["state"] == "slow"],
        "unread": [row["family"] for row in ok if row["failures"]],
        "not_run": [row["family"] for row in rows if row["state"] == "broken"],
        "refused": dict(Counter(each["code"] for row in ok for each in row["refused"]).most_common()),
        "largest_ratio": max((row["ratio"] for row in ok if row["check"] == "float64"), default=0.0),
        "own_seconds": round(sum(row["own_seconds"] for row in ok), 1),
    }  # fmt: skip


def table(options: argparse.Namespace) -> None:
    """Print every run, then the counts of each mode; `--json` writes both, `--refusals` what was refused, grouped."""
    rows = [json.loads(line) for line in Path(options.file).read_text().splitlines()]
    latest = {(row["mode"], row["family"]): row for row in rows}
    rows = [latest[place] for place in sorted(latest)]
    for row in rows:
        print(line_of(row) + ("   WRONG" if is_wrong(row) else ""))
    modes = {mode: summary([row for row in rows if row["mode"] == mode]) for mode in MODES}
    modes = {mode: each for mode, each in modes.items() if each["families"]}
    for mode, each in modes.items():
        print(mode, json.dumps(each))
    print(overview(modes))
    if options.refusals:
        Path(options.refusals).write_text(refusals(rows))
    if options.json:
        versions = next((row["versions"] for row in rows if "versions" in row), {})
        Path(options.json).write_text(json.dumps({"versions": versions, "modes": modes, "rows": rows}, indent=1) + "\n")


def overview(modes: dict[str, Result]) -> str:
    """The README's table."""
    columns = ("mode", "models", "attentions", "fused", "wrong results", "largest ratio by the first rule")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for mode, each in modes.items():
        ratio = "finite, repeatable" if mode.startswith("dropout") else f"{each['largest_ratio']:.2f}"
        share = f"{each['fused']} ({each['share']:.1%})" if each["sites"] else "0"
        lines.append(f"| {mode} | {each['families']} | {each['sites']} | {share} | {len(each['wrong'])} | {ratio} |")
    return "\n".join(lines)


def refusals(rows: list[Result]) -> str:
    """Every refused chain with its families, the one with most sites first, after what is wrong, crashed or unread."""
    ok = [row for row in rows if row["state"] == "ok"]
    parts = ["# Refused attentions", _listed("Wrong results", [line_of(row) for row in ok if is_wrong(row)]),
             _listed("Crashed or not run", [line_of(row) for row in rows if row["state"] != "ok"]),
             _listed("Graphs that could not be read", 
                     [f"{row['family']}: {row['failures'][0]}" for row in ok if row["failures"]]),
             "## Refusals\n"]  # fmt: skip
    groups: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for row in ok:
        for each in row["refused"]:
            groups[each["code"], each["found"], each["way"]][f"{row['family']} ({each['where']}) {row['mode']}"] += 1
    for (code, found, way), places in sorted(groups.items(), key=lambda item: -item[1].total()):
        words = "; ".join(f"{place} x{count}" for place, count in sorted(places.items()))
        parts.append(f"- **{code}** x{places.total()}: {found}\n  - way: `{way}`\n  - {words}")
    return "\n".join(parts) + "\n"


def _listed(title: str, lines: list[str]) -> str:
    return "\n".join([f"\n## {title}\n", *(f"- {line}" for line in lines or ["none"])])
