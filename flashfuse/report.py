"""`flashfuse.explain`: what flashfuse does with a model, site by site, with the user's own lines.

There is no second matcher: the report shows the records that the backend makes anyway.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import flashfuse
from flashfuse.ir.attention_spec import EmptyRows
from flashfuse.options import parse
from flashfuse.records import GraphRecord, SiteRecord
from flashfuse.refusal import Refusal


@dataclass(frozen=True)
class Report:
    """What was found in each compiled graph. `str(report)` is the text for people."""

    graphs: tuple[GraphRecord, ...]
    error: str = ""

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """Every softmax that belongs to an attention or could be taken for one."""
        return tuple(s for g in self.graphs for s in g.sites if s.fused or (s.refusal and s.refusal.code != "FF101"))

    @property
    def fused(self) -> tuple[SiteRecord, ...]:
        """The sites that run as flash attention."""
        return tuple(site for site in self.sites if site.fused)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why the other sites were left alone."""
        return tuple(site.refusal for site in self.sites if site.refusal is not None)

    @property
    def others(self) -> int:
        """How many softmaxes are no attention."""
        return sum(len(graph.sites) for graph in self.graphs) - len(self.sites)

    def to_json(self) -> str:
        """The report as JSON text."""
        rows = [_site_json(site) for site in self.sites]
        failures = [graph.failure for graph in self.graphs if graph.failure]
        return json.dumps(
            {"sites": rows, "failures": failures, "other_softmaxes": self.others, "error": self.error}, indent=2
        )

    def __str__(self) -> str:
        lines = [_versions(), self._summary()]
        for label, site in _grouped(self.sites):
            lines += ["", *(_fused_lines(label, site) if site.spec else _refused_lines(label, site))]
        lines += [f"\nA graph could not be read: {graph.failure}" for graph in self.graphs if graph.failure]
        if self.error:
            lines.append(f"\nThe model itself raised: {self.error}")
        return "\n".join(lines)

    def _summary(self) -> str:
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}"
        text = f"{len(self.sites)} attentions in {graphs}: {len(self.fused)} fused, {len(self.refusals)} left alone"
        return text + (f"; {self.others} other softmaxes are no attention" if self.others else "")


def explain(model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run `model(*args, **kwargs)` once, unchanged, and report what flashfuse would do with each attention in it.

    `options` are those of torch.compile. Works on any device, without Triton, across graph breaks; an exception of the
    model itself ends up in the report.
    """
    from flashfuse.backend import fuse

    chosen = parse(options, None)
    graphs: list[GraphRecord] = []

    def read_only(module: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(fuse(module, chosen).record)
        return module.forward

    error = ""
    try:
        torch.compile(getattr(model, "_orig_mod", model), backend=read_only)(*args, **kwargs)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Report(tuple(graphs), error)


# ------------------------------------------------------------------------------------------------ rendering


def _versions() -> str:
    try:
        from importlib.metadata import version

        triton = f"  triton {version('triton')}"
    except ImportError:
        triton = "  without triton"
    device = f"cuda sm_{''.join(map(str, torch.cuda.get_device_capability()))}" if torch.cuda.is_available() else "cpu"
    return f"flashfuse {flashfuse.__version__}  torch {torch.__version__}{triton}  python {platform.python_version()}  {device}"


def _grouped(sites: tuple[SiteRecord, ...]) -> list[tuple[str, SiteRecord]]:
    """Neighbours that read the same, as one: layers of a model repeat. The label is their number, or `first-last`."""
    groups: list[tuple[int, int, SiteRecord]] = []
    for number, site in enumerate(sites, 1):
        lines = _fused_lines if site.spec else _refused_lines
        if groups and bool(groups[-1][2].spec) == bool(site.spec) and lines("", groups[-1][2]) == lines("", site):
            groups[-1] = (groups[-1][0], number, site)
        else:
            groups.append((number, number, site))
    return [(str(first) if first == last else f"{first}-{last}", site) for first, last, site in groups]


def _fused_lines(label: str, site: SiteRecord) -> list[str]:
    spec = site.spec
    assert spec is not None
    lines = [f"[{label}] FUSED       {site.where or site.anchor}   {_shape(site)}"]
    lines += [f"    {word:<8}{formula}" for word, formula in spec.describe()]
    if spec.captures:
        lines.append("    reads   " + ", ".join(f"{c.name} ({c.kind.value}, {c.rank}-d)" for c in spec.captures))
    lines.append(f"    rows    {_ROWS[spec.empty_rows]}")
    saved = _saved(site)
    if saved:
        lines.append(f"    saved   {saved} of scores not written")
    return lines


_ROWS = {
    EmptyRows.IMPOSSIBLE: "every query keeps a key (proved)",
    EmptyRows.ZERO: "a query without keys gives zero",
    EmptyRows.EXACT: "a query without keys gives what eager code gives",
}


def _refused_lines(label: str, site: SiteRecord) -> list[str]:
    found = site.refusal
    assert found is not None
    lines = [
        f"[{label}] LEFT ALONE  {found.where or site.where or site.anchor}   {found.code} {found.entry.title}",
        f"    {found.entry.meaning}",
        f"    found   {found.found}, at {found.node}",
    ]
    if found.reached:
        lines.append("    reached " + " <- ".join(found.reached))
    if found.entry.hint:
        lines.append(f"    hint    {found.entry.hint}")
    return lines


def _shape(site: SiteRecord) -> str:
    dims = dict(site.dims)
    words = [f"B={dims['B']} H={dims['H']}"]
    if dims["G"] != dims["H"]:
        words.append(f"G={dims['G']}")
    words.append(f"M=N={dims['M']}" if dims["M"] == dims["N"] else f"M={dims['M']} N={dims['N']}")
    words.append(f"D=E={dims['D']}" if dims["D"] == dims["E"] else f"D={dims['D']} E={dims['E']}")
    return " ".join(words) + f" {site.dtype}"


def _saved(site: SiteRecord) -> str:
    sizes = [dict(site.dims)[letter] for letter in "BHMN"]
    if not all(size.isdigit() for size in sizes):
        return ""
    total = float(torch.tensor([int(size) for size in sizes], dtype=torch.float64).prod())
    total *= torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()
    return next(f"{total / unit:.1f} {name}" for unit, name in _UNITS if total >= unit or unit == 1)


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def _site_json(site: SiteRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"where": site.where, "node": site.anchor, "fused": site.fused}
    if site.spec is not None:
        row |= {"dims": dict(site.dims), "dtype": site.dtype, **dict(site.spec.describe()), "key": site.spec.key}
    if site.refusal is not None:
        found = site.refusal
        row |= {"code": found.code, "title": found.entry.title, "found": found.found, "hint": found.entry.hint}
    return row
