"""`python -m flashfuse explain | doctor | bench | why | cache`.

Every command takes `--json`; text for people is coloured by rich (`pip install "flashfuse[cli]"`).
Exit codes: 0 all is well; 1 something was left alone, or does not work here; 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flashfuse
from flashfuse.errors import FlashfuseError
from flashfuse.options import did_you_mean
from flashfuse.refusal import CATALOGUE, Code

OK, LEFT_ALONE, CANNOT = 0, 1, 2


class CommandError(FlashfuseError):
    """The command cannot be carried out; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.run(chosen)  # type: ignore[no-any-return]
    except FlashfuseError as error:
        print(f"flashfuse: {error}", file=sys.stderr)
        return CANNOT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flashfuse", description=(__doc__ or "").strip().splitlines()[-1])
    parser.add_argument("--version", action="version", version=f"flashfuse {flashfuse.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    explain = command("explain", _explain, "what flashfuse does with a model, attention by attention")
    explain.add_argument("target", help="module:factory or file.py:factory; it returns a model, its arguments and, "
                         "if wanted, a dict of keyword arguments")  # fmt: skip
    explain.add_argument("--html", metavar="FILE", help="also write the report as a page")
    command("doctor", _doctor, "what will work on this machine, and how to mend what will not")
    why = command("why", _why, "what a refusal's code means; all of them without a code")
    why.add_argument("code", nargs="?", help="for instance FF203")
    why.add_argument("--markdown", action="store_true", help="print the whole catalogue as docs/refusals.md has it")
    bench = command("bench", _bench, "attention as people write it, by backend: times, memory, correctness in the same run")
    bench.add_argument("--variants", default="causal,sliding", help="comma-separated, or all")
    bench.add_argument("--peers", default="eager,sdpa,inductor,flashfuse", help="of eager, sdpa, inductor, flex, flashfuse")
    bench.add_argument("--length", type=int, default=1024)
    bench.add_argument("--head-dim", type=int, default=64)
    bench.add_argument("--rounds", type=int, default=3)
    bench.add_argument("--model", metavar="MODULE:FACTORY", help="a model of one's own instead: eager, inductor and flashfuse")
    bench.add_argument("--plot", metavar="FILE", help="also draw the times (needs matplotlib)")
    cache = command("cache", _cache, "the kernels on disk")
    cache.add_argument("action", choices=("list", "size", "clear"), nargs="?", default="list")
    return parser


def console() -> Any:
    """rich's console. Raises CommandError if rich is not installed."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise CommandError('this output needs rich: pip install "flashfuse[cli]", or use --json') from error
    return Console(highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


# ------------------------------------------------------------------------------------------------ explain


def load_model(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What `module:factory` makes: the model, its arguments and its keyword arguments. Raises CommandError."""
    name, _, factory = target.rpartition(":")
    if not name or not factory:
        raise CommandError(f"{target!r} is not of the form module:factory or file.py:factory")
    module = _module(name)
    if not callable(getattr(module, factory, None)):
        names = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        raise CommandError(f"{name} has no function {factory!r}" + did_you_mean(factory, names))
    made = getattr(module, factory)()
    made = made if isinstance(made, tuple) else (made,)
    keywords = made[-1] if len(made) > 1 and isinstance(made[-1], dict) else {}
    rest = made[1:-1] if keywords else made[1:]
    given = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if not callable(made[0]):
        raise CommandError(f"{target} gave {type(made[0]).__name__}, which cannot be called; it must return model, arguments")
    return made[0], tuple(given), keywords


def _module(name: str) -> Any:
    try:
        if not name.endswith(".py"):
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(name)
        path = Path(name).resolve()
        specification = importlib.util.spec_from_file_location(path.stem, path)
        if specification is None or specification.loader is None or not path.exists():
            raise CommandError(f"there is no file {name}")
        module = importlib.util.module_from_spec(specification)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent))
        specification.loader.exec_module(module)
        return module
    except ImportError as error:
        raise CommandError(f"cannot import {name}: {error}") from error


def _explain(chosen: argparse.Namespace) -> int:
    out = None if chosen.json else console()
    model, given, keywords = load_model(chosen.target)
    report = flashfuse.explain(model, *given, **keywords)
    if chosen.html:
        Path(chosen.html).write_text(report.to_html(), encoding="utf-8")
    if out is None:
        print(report.to_json())
    else:
        for line in str(report).splitlines():
            style = "green" if "] FUSED " in line else "bold yellow" if "] LEFT ALONE " in line else None
            out.print(line, style=style, markup=False)
    bad = [refusal for refusal in report.refusals if refusal.code != "FF102"]
    return LEFT_ALONE if bad or report.error or report.failures else OK


# ------------------------------------------------------------------------------------------------ doctor, why, cache


def _doctor(chosen: argparse.Namespace) -> int:
    from flashfuse.doctor import examine

    out = None if chosen.json else console()
    found = examine()
    if out is None:
        print(json.dumps([vars(each) for each in found], indent=2))
    else:
        table = _table("", "", "what", "found", "if that is to change")
        marks = {"ok": "[green]ok[/]", "less": "[yellow]less[/]", "bad": "[red]bad[/]"}
        for each in found:
            table.add_row(marks[each.state], each.name, each.found, each.fix)
        out.print(table)
    return LEFT_ALONE if any(each.state == "bad" for each in found) else OK


def _why(chosen: argparse.Namespace) -> int:
    code = (chosen.code or "").upper()
    if code and code not in CATALOGUE:
        raise CommandError(f"there is no code {chosen.code!r}{did_you_mean(code, CATALOGUE)}")
    rows = [CATALOGUE[code]] if code else list(CATALOGUE.values())
    if chosen.json:
        print(json.dumps([vars(row) for row in rows], indent=2))
        return OK
    if chosen.markdown:
        print(_markdown(), end="")
        return OK
    out = console()
    if code:
        out.print(_page(rows[0]), markup=True)
        return OK
    table = _table("Why a softmax is left alone", "code", "what", "meaning", "what to do")
    for row in rows:
        table.add_row(row.code, row.title, row.meaning, row.hint)
    out.print(table)
    return OK


_MARKDOWN_HEAD = """# Why a softmax is left alone

Printed by `python -m flashfuse why --markdown`; one code: `python -m flashfuse why FF202`.
For each there is a program that gives it in [tests/flashfuse/test_refusals.py](../tests/flashfuse/test_refusals.py).

| code | what | meaning | what to do |
|---|---|---|---|
"""


def _markdown() -> str:
    """The catalogue as docs/refusals.md."""
    rows = [f"| {row.code} | {row.title} | {row.meaning} | {row.hint} |\n" for row in CATALOGUE.values()]
    return _MARKDOWN_HEAD + "".join(rows)


def _page(row: Code) -> str:
    return f"[bold]{row.code}  {row.title}[/]\n\n{row.meaning}\n\n[green]What to do[/]  {row.hint}"


def _bench(chosen: argparse.Namespace) -> int:
    from flashfuse.bench import check_plot, model_rows, plot, variant_rows

    if chosen.plot:
        check_plot()
    out = None if chosen.json else console()
    peers = chosen.peers.split(",")
    if chosen.model:
        jobs = model_rows(*load_model(chosen.model), [peer for peer in peers if peer not in ("sdpa", "flex")], chosen.rounds)
    else:
        jobs = variant_rows(chosen.variants, peers, chosen.length, chosen.head_dim, chosen.rounds)
    rows = _with_progress(jobs) if out is not None else [row for _name, found in jobs for row in found()]
    if chosen.plot:
        plot(rows, chosen.plot)
    if out is None:
        print(json.dumps(rows, indent=2))
    else:
        out.print(_bench_table(rows))
    return LEFT_ALONE if any("failed" in row or not row["right"] for row in rows) else OK


def _with_progress(jobs: list[tuple[str, Callable[[], list[dict[str, Any]]]]]) -> list[dict[str, Any]]:
    """Run the jobs with a bar on the terminal."""
    from rich.progress import Progress

    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, job in jobs:
            progress.update(bar, description=name)
            rows += job()
            progress.advance(bar)
    return rows


def _bench_table(rows: list[dict[str, Any]]) -> Any:
    table = _table("", "code", "by", "forward ms", "and backward", "peak MiB", "error / eager's", "")
    for row in rows:
        if "failed" in row:
            table.add_row(row["variant"], row["peer"], "", "", "", "", f"[red]failed: {row['failed'][:80]}[/]")
            continue
        verdict = "[green]right[/]" if row["right"] else "[red]wrong[/]"
        both = f"{row['both_ms']:.2f}" if "both_ms" in row else ""
        table.add_row(row["variant"], row["peer"], f"{row['forward_ms']:.2f}", both,
                      f"{row['peak_bytes'] / 2**20:.1f}", f"{row['error']:.2f}", verdict)  # fmt: skip
    return table


def _cache(chosen: argparse.Namespace) -> int:
    from flashfuse.codegen.load import cache_folder
    from flashfuse.report_text import bytes_text

    folder = cache_folder()
    found = (folder.glob("attention_*.py"), (folder / "tuned").glob("*.json"), (folder / "answers").glob("*.txt"))
    files = sorted((path for each in found for path in each), key=lambda path: path.stat().st_mtime) if folder.exists() else []
    total = sum(path.stat().st_size for path in files)
    if chosen.action == "clear":
        for path in files:
            path.unlink(missing_ok=True)
    if chosen.json:
        rows = [{"file": path.name, "bytes": 0 if chosen.action == "clear" else path.stat().st_size} for path in files]
        print(json.dumps({"folder": str(folder), "action": chosen.action, "files": rows, "bytes": total}, indent=2))
        return OK
    out = console()
    if chosen.action == "list":
        for path in files:
            out.print(f"{path.name}  {bytes_text(path.stat().st_size)}  {_title(path)}", markup=False)
    word = "removed" if chosen.action == "clear" else "in"
    count = Counter(path.suffix for path in files)
    words = f"{count['.py']} kernels" + (f", {count['.json']} tuning results" if count[".json"] else "")
    words += f", {count['.txt']} checks" if count[".txt"] else ""
    out.print(f"{words}, {bytes_text(total)} {word} {folder}", markup=False)
    return OK


def _title(path: Path) -> str:
    """The formulas in a kernel's docstring, or what a tuning result is for, or how a check came out."""
    if path.suffix == ".json":
        return f"{path.parent.name} tiles"
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8") or "good"
    lines = path.read_text(encoding="utf-8").splitlines()[2:4]
    return "; ".join(line.strip() for line in lines if line.startswith("    ") and "rows without" not in line)
