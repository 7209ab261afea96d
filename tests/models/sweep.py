"""The zoo: every family in a mode, each in a process of its own, appended to a file of JSON lines, and the table of it.

    python tests/models/sweep.py run --out zoo.jsonl --jobs 16 --budget 500 --families 200
    python tests/models/sweep.py run --out zoo.jsonl --modes infer-fp32-static --only llama,bert
    python tests/models/sweep.py table zoo.jsonl [--json benchmarks/results/zoo.json] [--refusals refusals.md]

What the file already has is not run again. A process is forked for each run, so that nothing of one model (Dynamo's caches,
crashes, memory) touches another; that is also why this is a script and not a thousand tests. A run that takes too long is
killed with all that it started. Cheap families that differ come first, each in all modes, so a budget of seconds cuts all
modes alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the models run on the CPU, and a process that has used a GPU cannot fork
sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import MODES, Mode, cast, measure, run
from tables import Result, line_of, table

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "zoo.json"
POLL = 0.02  # seconds between two looks at the running processes


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


# ------------------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Process:
    """A forked run: its result appears in the file `out` when it has ended by itself."""

    pid: int
    name: str
    mode: str
    out: Path
    start: float

    @classmethod
    def begin(cls, name: str, mode: str, inner: str, folder: Path) -> Process:
        out = folder / f"{name}-{mode}".replace("/", "-")
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(out, name, mode, inner)
        return cls(pid, name, mode, out, start)

    def ended(self, timeout: float) -> Result | None:
        """The row of the table, or None while the run goes on. Beyond `timeout` seconds the run is killed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.start
        found: Result = {}
        if pid == 0:
            if seconds < timeout:
                return None
            self.kill()
            found = {"state": "slow", "error": f"not finished after {seconds:.0f} s"}
        elif self.out.exists():
            found = json.loads(self.out.read_text())
        return {"family": self.name, "mode": self.mode, "seconds": round(seconds, 1),
                **(found or {"state": "died", "error": f"signal {status & 127}"})}  # fmt: skip

    def kill(self) -> None:
        """End the run and what it started: it leads a process group."""
        for kill in (os.killpg, os.kill):  # a process killed at once may not have its group yet
            try:
                kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os.waitpid(self.pid, 0)


def _child(out: Path, name: str, mode: str, inner: str) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        row = run_one(name, mode, inner)
        row["versions"] = _versions()
        unfinished = out.with_suffix(".part")
        unfinished.write_text(json.dumps(row))
        unfinished.rename(out)
        status = 0
    finally:
        os._exit(status)


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}


def results(places: list[tuple[str, str]], options: argparse.Namespace) -> Iterator[Result]:
    """The rows of all places, `jobs` at a time, as they end. After `budget` seconds nothing more is started."""
    start, waiting = time.monotonic(), places[::-1]
    running: list[Process] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            while waiting or running:
                if time.monotonic() - start > options.budget:
                    waiting.clear()
                while waiting and len(running) < options.jobs:
                    running.append(Process.begin(*waiting.pop(), options.inner, Path(folder)))
                for process in list(running):
                    row = process.ended(options.timeout)
                    if row is not None:
                        running.remove(process)
                        yield row
                time.sleep(POLL)
        finally:
            for process in running:
                process.kill()


# ------------------------------------------------------------------------------------------------ the order


def ordered(names: list[str]) -> list[str]:
    """Families by their recorded seconds, a relative of families that come before (qwen2, qwen3, qwen3_vl) later."""
    rows = json.loads(RECORDED.read_text())["rows"] if RECORDED.exists() else []
    known = {row["family"]: row["seconds"] for row in rows if row["mode"] == "infer-fp32-static"}
    typical = sorted(known.values())[len(known) // 2] if known else 1.0
    relatives: Counter[str] = Counter()
    costs = {}
    for name in sorted(names, key=lambda name: known.get(name, typical)):
        kin = name if " " in name else str(re.match(r"[a-zA-Z]*", name)[0])  # type: ignore[index]
        relatives[kin] += 1
        costs[name] = known.get(name, typical) * relatives[kin]
    return sorted(costs, key=lambda name: costs[name])


def run_all(options: argparse.Namespace) -> None:
    """Run what the file has not, append it, and say at the end what was run."""
    from catalogue import available, preload

    start = time.monotonic()
    preload()
    out = Path(options.out)
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["family"], row["mode"]) for row in known}
    names = options.only.split(",") if options.only else ordered(available())[: options.families]
    places = [(name, mode) for name in names for mode in options.modes if (name, mode) not in done]
    places = places[options.shard :: options.shards]
    states: Counter[str] = Counter()
    families: Counter[str] = Counter()
    with out.open("a") as file:
        for row in results(places, options):
            file.write(json.dumps(row) + "\n")
            file.flush()
            states[row["state"]] += 1
            families[row["family"]] += row["state"] == "ok"
            if not options.quiet:
                print(line_of(row), flush=True)
    whole = sum(count == len(options.modes) for count in families.values())
    print(f"{sum(states.values())} of {len(places)} runs in {time.monotonic() - start:.0f} s: {dict(states)}; "
          f"{len(families)} families, {whole} of them in all {len(options.modes)} modes")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--out", required=True)
    runs.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=" ".join(MODES))
    runs.add_argument("--only", default="", help="families, with commas between")
    runs.add_argument("--families", type=int, default=None, help="only the first so many")
    runs.add_argument("--inner", default="eager", choices=("eager", "aot_eager", "inductor"))
    runs.add_argument("--jobs", type=int, default=1, help="runs at a time")
    runs.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing more is started")
    runs.add_argument("--timeout", type=int, default=180, help="seconds a family and mode")
    runs.add_argument("--shard", type=int, default=0)
    runs.add_argument("--shards", type=int, default=1)
    runs.add_argument("--quiet", action="store_true")
    runs.set_defaults(do=run_all)
    tables = commands.add_parser("table")
    tables.add_argument("file")
    tables.add_argument("--json", default="")
    tables.add_argument("--refusals", default="")
    tables.set_defaults(do=table)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
