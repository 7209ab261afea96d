"""A report as one HTML page: what was found, and data that the page's own script draws. Nothing is loaded from elsewhere.

The page's text, style and script are the files in `page_parts/`. `numpy` (the layout of the graph) and `pygments` (colours
in the kernels) come with `pip install "flashfuse[report]"`; without them the page lacks the graph or the colours.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from flashfuse.block_map import BlockMap
from flashfuse.drawing import Drawing, place, source_line
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.records import SiteRecord
from flashfuse.report_text import reached_text, shape_text, site_facts, site_map, versions

if TYPE_CHECKING:
    from flashfuse.report import Report

_KERNEL_BUDGET = 1_500_000  # bytes of coloured kernels in a page; beyond it only their generated part is shown


def page(report: Report) -> str:
    """The whole page as text."""
    parts = files("flashfuse") / "page_parts"
    data = json.dumps(_data(report), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    filled = {
        "STYLE": (parts / "page.css").read_text(encoding="utf-8") + _highlight_style(),
        "SCRIPT": (parts / "page.js").read_text(encoding="utf-8"),
        "DATA": data,
        "VERSIONS": html.escape(versions()),
        "SUMMARY": html.escape(report.summary),
    }
    text = (parts / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: filled[found[1]], text)


def framed(text: str) -> str:
    """A page for a notebook's cell: in a frame of its own, so that styles do not meet."""
    return f'<iframe style="width:100%;height:720px;border:0" srcdoc="{html.escape(text)}"></iframe>'


# ------------------------------------------------------------------------------------------------ the data


def _data(report: Report) -> dict[str, Any]:
    sites: list[dict[str, Any]] = []
    kernels: dict[str, str] = {}
    graphs: list[dict[str, Any]] = []
    for number, graph in enumerate(report.graphs):
        first: dict[int, int] = {}  # the graph's own number of a site -> its place in the list
        for own, site in enumerate(graph.sites):
            if site in report.sites:
                first[own] = len(sites)
                sites.append({"graph": number, **_site(site)})
                if site.spec is not None and site.spec.key not in kernels:
                    kernels[site.spec.key] = _kernel(site.spec, sum(map(len, kernels.values())))
        if number < len(report.drawings):
            graphs.append({each: _graph(drawing, first) for each, drawing
                           in zip(("before", "after"), report.drawings[number], strict=True)})  # fmt: skip
    notes = [f"A graph could not be read: {failure}" for failure in report.failures]
    notes += [f"The capture was broken off ({count}×): {reason}" for reason, count in report.breaks]
    notes += [f"The model itself raised: {report.error}"] if report.error else []
    notes += [] if _has("numpy") else ['No graph is drawn: pip install "flashfuse[report]"']
    return {"sites": sites, "kernels": kernels, "graphs": graphs, "notes": notes}


def _site(site: SiteRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"where": site.where or site.anchor, "path": site.path, "code": source_line(site.path)}
    if site.spec is not None:
        program = "\n\n".join(f"{name}:\n{each.pretty()}" for name, each in site.spec.programs.items())
        row |= {"fused": True, "title": shape_text(site), "facts": site_facts(site), "program": program}
        row |= {"kernel": site.spec.key, "map": _map(site_map(site))}
    if site.refusal is not None:
        found = site.refusal
        facts = [("why", found.entry.meaning), ("found", f"{found.found}, at {found.node}")]
        if found.where and found.where != site.where:
            facts.append(("line", found.where))
        if found.reached:
            facts.append(("reached", reached_text(found.reached)))
        facts.append(("hint", found.entry.hint))
        row |= {"fused": False, "title": f"{found.code} {found.entry.title}", "facts": facts}
    return row


def _map(found: BlockMap | None) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = ["".join(map(str, row)) for row in found.rows]
    return {"m": found.block_m, "n": found.block_n, "rows": rows, "skipped": round(found.skipped, 4)}


def _graph(drawing: Drawing, sites: dict[int, int]) -> dict[str, Any]:
    """Groups as [name, columns, rows]; nodes as [name, called, group, x, y, line, shape, inputs, site, role]."""
    if not _has("numpy"):
        return {"groups": [], "nodes": [], "lines": []}
    placed = place(drawing)
    number = {group.module: index for index, group in enumerate(placed)}
    lines: dict[str, int] = {}
    order = {node.name: index for index, node in enumerate(drawing)}
    nodes = []
    for node in drawing:
        x, y = placed[number[node.module]].places[node.name]
        line = lines.setdefault(node.path, len(lines))
        inputs = [order[each] for each in node.inputs]
        site = sites.get(node.site, -1)
        nodes.append([node.name, node.called, number[node.module], x, y, line, node.shape, inputs, site,
                      node.role if site >= 0 else ""])  # fmt: skip
    shown = [[path.rsplit("/", 1)[-1], source_line(path)] for path in lines]
    return {"groups": [[group.module, group.columns, group.rows] for group in placed], "nodes": nodes, "lines": shown}


# ------------------------------------------------------------------------------------------------ kernels


def _kernel(spec: AttentionSpec, so_far: int) -> str:
    """A generated kernel's file as HTML; only its generated part once the page is large."""
    from flashfuse.codegen.emit import module_text

    text = module_text(spec)
    if so_far > _KERNEL_BUDGET:
        start = text.find(" generated from the score program")
        text = text[start : text.find(" the kernel files", start)]
    return _highlighted(text)


@lru_cache(maxsize=64)
def _highlighted(text: str) -> str:
    if not _has("pygments"):
        return html.escape(text)
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return str(highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)))


def _highlight_style() -> str:
    if not _has("pygments"):
        return ""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs("pre.kernel")
    dark = HtmlFormatter(style="monokai").get_style_defs("[data-theme=dark] pre.kernel")
    return "\n".join([light, dark, "pre.kernel, [data-theme=dark] pre.kernel { background: none }"])


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
