"""`flashfuse.explain`: what flashfuse does with a model, site by site, with the user's own lines.

There is no second matcher: the report shows the records that the backend makes anyway.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from flashfuse.drawing import Drawing, draw
from flashfuse.options import parse
from flashfuse.records import GraphRecord, SiteRecord
from flashfuse.refusal import Refusal
from flashfuse.report_text import mask_of, saved_bytes, site_facts, site_map, site_paragraphs, versions
from flashfuse.stages import Fused

log = logging.getLogger("flashfuse")


@dataclass(frozen=True)
class Report:
    """What was found in each compiled graph. `str(report)` is the text for people.

    `error` is what the model itself raised, `breaks` why its capture was broken off, each with a number of times;
    `drawings` are the graphs before and after.
    """

    graphs: tuple[GraphRecord, ...]
    error: str = ""
    breaks: tuple[tuple[str, int], ...] = ()
    drawings: tuple[tuple[Drawing, Drawing], ...] = field(default=(), repr=False)

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

    @property
    def failures(self) -> tuple[str, ...]:
        """Why graphs could not be read."""
        return tuple(graph.failure for graph in self.graphs if graph.failure)

    def to_json(self) -> str:
        """The report as JSON text."""
        rows = [_site_json(site) for site in self.sites]
        value = {
            "versions": versions(), "graphs": len(self.graphs), "fused": len(self.fused), "left_alone": len(self.refusals),
            "sites": rows, "failures": list(self.failures), "other_softmaxes": self.others,
            "graph_breaks": dict(self.breaks), "error": self.error,
        }  # fmt: skip
        return json.dumps(value, indent=2)

    def to_html(self) -> str:
        """The report as one page that needs nothing else: no network, no other file."""
        from flashfuse.page import page

        return page(self)

    def _repr_html_(self) -> str:
        from flashfuse.page import framed

        return framed(self.to_html())

    def __str__(self) -> str:
        paragraphs = [f"{versions()}\n{self.summary}", *site_paragraphs(self.sites)]
        paragraphs += [f"A graph could not be read: {failure}" for failure in self.failures]
        paragraphs += [f"The capture was broken off {_times(count)}: {reason}" for reason, count in self.breaks]
        if self.error:
            paragraphs.append(f"The model itself raised: {self.error}")
        return "\n\n".join(paragraphs)

    @property
    def summary(self) -> str:
        """`12 attentions in 1 graph: 12 fused, 0 left alone`."""
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}"
        found = f"{len(self.sites)} attention{'s' * (len(self.sites) != 1)}"
        text = f"{found} in {graphs}: {len(self.fused)} fused, {len(self.refusals)} left alone"
        if self.others:
            text += f"; {self.others} other softmax{'es are' if self.others != 1 else ' is'} no attention"
        return text


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def explain(model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Run `model(*args, **kwargs)` once, unchanged, and report what flashfuse would do with each attention in it.

    `options` are those of torch.compile. Works on any device, without Triton, across graph breaks; an exception of the
    model itself ends up in the report. Raises OptionError for options that do not exist, and nothing else.
    """
    from flashfuse.backend import fuse

    chosen = parse(options, None)
    graphs: list[GraphRecord] = []
    drawings: list[tuple[Drawing, Drawing]] = []

    def read_only(module: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        result = fuse(module, chosen)
        graphs.append(result.record)
        drawings.append(_drawn(result))
        return module.forward

    error = ""
    with _as_often_as_asked(), _counted_breaks() as breaks:
        try:
            torch.compile(getattr(model, "_orig_mod", model), backend=read_only)(*args, **kwargs)
        except Exception as raised:
            error = _in_words(raised)
    return Report(tuple(graphs), error, tuple(breaks.items()), tuple(drawings))


def _drawn(result: Fused) -> tuple[Drawing, Drawing]:
    """The graph's drawings; empty ones if drawing fails, which must not cost the report."""
    try:
        return draw(result)
    except Exception:
        log.info("a graph could not be drawn", exc_info=True)
        return (), ()


def _in_words(error: BaseException) -> str:
    """The error itself, without Dynamo's wrapping of it."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {inner}".strip()


@contextmanager
def _as_often_as_asked() -> Iterator[None]:
    """Dynamo gives up on code that was compiled too often; every `explain` compiles."""
    limits = {name: 2**30 for name in ("recompile_limit", "accumulated_recompile_limit") if hasattr(torch._dynamo.config, name)}
    with torch._dynamo.config.patch(**limits):
        yield


@contextmanager
def _counted_breaks() -> Iterator[Counter[str]]:
    """Fills the counter with the graph breaks that happened in the block, by the first line of their reason."""
    found: Counter[str] = Counter()
    counters = torch._dynamo.utils.counters["graph_break"]
    before = Counter(counters)
    yield found
    for reason, count in (Counter(counters) - before).items():
        found[str(reason).strip().splitlines()[0]] += count


def _site_json(site: SiteRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"where": site.where, "path": site.path, "node": site.anchor, "fused": site.fused}
    if site.spec is not None:
        mask, blocks = mask_of(site), site_map(site)
        row |= {"dims": dict(site.dims), "dtype": site.dtype, "device": site.device, **dict(site_facts(site))}
        row |= {"predicate": mask.text if mask else None, "skipped": blocks.skipped if blocks else None}
        row |= {"bytes_saved": saved_bytes(site), "key": site.spec.key}
    if site.refusal is not None:
        found = site.refusal
        row |= {"code": found.code, "title": found.entry.title, "meaning": found.entry.meaning, "found": found.found}
        row |= {"stopped_at": found.where, "reached": list(found.reached), "hint": found.entry.hint}
    return row
