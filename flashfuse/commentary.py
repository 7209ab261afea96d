"""What flashfuse says while it compiles: to the log (`TORCH_LOGS="+flashfuse"`) and to `TORCH_TRACE`, where tlparse shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flashfuse.records import GraphRecord, SiteRecord
from flashfuse.report_text import site_facts, site_paragraphs
from flashfuse.stages import Fused

log = logging.getLogger("flashfuse")


def tell(result: Fused) -> None:
    """One line a site at level INFO (`TORCH_LOGS=flashfuse`), what `explain` says at DEBUG; artifacts for tlparse."""
    record = result.record
    for site in _worth_telling(record):
        log.info("%s", _line(site))
    if log.isEnabledFor(logging.DEBUG):
        for paragraph in site_paragraphs(_worth_telling(record)):
            log.debug("%s", paragraph)
    if record.failure:
        log.info("a graph could not be read: %s", record.failure)
    for name, payload in artifacts(result).items():
        _trace(name, payload)


def _worth_telling(record: GraphRecord) -> list[SiteRecord]:
    return [site for site in record.sites if site.refusal is None or site.refusal.code != "FF101"]


def _line(site: SiteRecord) -> str:
    if site.refusal is not None:
        return f"left alone  {site.refusal}"
    shown = "; ".join(text for word, text in site_facts(site) if word in ("score", "mask"))
    return f"fused  {site.where or site.anchor}  {shown}"


def artifacts(result: Fused) -> dict[str, Callable[[], str]]:
    """Texts by name: what was found, the rewritten graph, and each generated kernel. Made only if somebody listens."""
    sites = _worth_telling(result.record)
    if not sites:
        return {}
    found: dict[str, Callable[[], str]] = {"flashfuse_report": lambda: "\n\n".join(site_paragraphs(sites))}
    found["flashfuse_rewritten_graph"] = lambda: str(result.module.print_readable(print_output=False))
    for spec in {site.spec.key: site.spec for site in sites if site.spec is not None}.values():
        from flashfuse.codegen.emit import module_text

        found[f"flashfuse_kernel_{spec.key}"] = lambda spec=spec: module_text(spec)  # type: ignore[misc]
    return found


def _trace(name: str, payload: Callable[[], str]) -> None:
    try:
        from torch._logging import trace_structured
    except ImportError:  # no public interface; without it the log still tells
        return
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)
