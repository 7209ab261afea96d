"""The zoo: every family in a mode, each in a process of its own, appended to a file of JSON lines, and the table of it.

    python tests/models/sweep.py run --out zoo.jsonl --modes infer-fp32-static train-bf16-dynamic [--only llama,bert]
    python tests/models/sweep.py table zoo.jsonl [--json benchmarks/results/zoo.json]

What the file already has is not run again. A process is forked for each run, so that nothing of one model (Dynamo's caches,
crashes, memory) touches another; that is also why this is a script and not a thousand tests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import MODES, Mode, cast, measure, run

Result = dict[str, Any]


def run_one(name: str, mode: str, inner: str) -> Result:
    """A family in a mode. What fails in eager code, or for any backend, is `broken`; what fails only here is `crashed`."""
    from catalogue import build

    stage = "broken"
    try:
        wanted = Mode.of(mode)
        model, inputs = build(name, dropout=wanted.dropout)
        run(model.to(wanted.dtype).train(wanted.training), cast(inputs, wanted.dtype), wanted)
        stage = "crashed"
        model, inputs = build(name, dropout=wanted.dropout)
        return {"state": "ok", **measure(model, inputs, wanted, inner=inner)}
    except Exception as error:
        if stage == "crashed" and _fails_without_flashfuse(name, mode):
            stage = "broken"
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
        return {"state": stage, "error": words, "at": f"{Path(last.filename).name}:{last.lineno}"}


def _fails_without_flashfuse(name: str, mode: str) -> bool:
    """Whether Dynamo cannot capture the model for any backend."""
    from catalogue import build

    wanted = Mode.of(mode)
    model, inputs = build(name, dropout=wanted.dropout)
    model = model.to(wanted.dtype).train(wanted.training)
    torch._dynamo.reset()
    try:
        run(model, cast(inputs, wanted.dtype), wanted, call=torch.compile(model, backend="eager", dynamic=wanted.dynamic))
    except Exception:
        return True
    return False


def in_a_process(name: str, mode: str, inner: str, timeout: int) -> Result:
    """`run_one` in a forked process, ended after `timeout` seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(writer, name, mode, inner, timeout)
    os.close(writer)
    start = time.time()
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _pid, status = os.waitpid(child, 0)
    result = json.loads(text) if text else {"state": "died", "error": f"signal {status & 127} after {time.time() - start:.0f} s"}
    return {"family": name, "mode": mode, "seconds": round(time.time() - start, 1), **result}


def _child(writer: int, name: str, mode: str, inner: str, timeout: int) -> None:
    signal.alarm(timeout)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    with os.fdopen(writer, "w") as pipe:
        json.dump(run_one(name, mode, inner), pipe)
    os._exit(0)


def run_all(options: argparse.Namespace) -> None:
    from catalogue import NAMES, preload

    preload()
    out = Path(options.out)
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["family"], row["mode"]) for row in known}
    wanted = options.only.split(",") if options.only else NAMES
    places = [(name, mode) for mode in options.modes for name in wanted if (name, mode) not in done]
    places = places[options.shard :: options.shards]
    for name, mode in places:
        row = in_a_process(name, mode, options.inner, options.timeout)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not options.quiet:
            print(line_of(row), flush=True)


# ------------------------------------------------------------------------------------------------ the table


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
        "not_run": [row["family"] for row in rows if row["state"] == "broken"],
        "refused": dict(Counter(each["code"] for row in ok for each in row["refused"]).most_common()),
        "largest_ratio": max((row["ratio"] for row in ok if row["check"] == "float64"), default=0.0),
        "own_seconds": round(sum(row["own_seconds"] for row in ok), 1),
    }  # fmt: skip


def table(options: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in Path(options.file).read_text().splitlines()]
    latest = {(row["mode"], row["family"]): row for row in rows}
    rows = [latest[place] for place in sorted(latest)]
    for row in rows:
        print(line_of(row) + ("   WRONG" if is_wrong(row) else ""))
    modes = {mode: summary([row for row in rows if row["mode"] == mode]) for mode in MODES}
    modes = {mode: each for mode, each in modes.items() if each["families"]}
    for mode, each in modes.items():
        print(mode, json.dumps(each))
    if options.json:
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        Path(options.json).write_text(json.dumps({"versions": versions, "modes": modes, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--out", required=True)
    runs.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=" ".join(MODES))
    runs.add_argument("--only", default="", help="families, with commas between")
    runs.add_argument("--inner", default="eager", choices=("eager", "aot_eager", "inductor"))
    runs.add_argument("--timeout", type=int, default=180, help="seconds a family and mode")
    runs.add_argument("--shard", type=int, default=0)
    runs.add_argument("--shards", type=int, default=1)
    runs.add_argument("--quiet", action="store_true")
    runs.set_defaults(do=run_all)
    tables = commands.add_parser("table")
    tables.add_argument("file")
    tables.add_argument("--json", default="")
    tables.set_defaults(do=table)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
