"""What the backend did with each softmax of each graph: the records that counters, logs and `explain` read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.refusal import Refusal


@dataclass(frozen=True)
class SiteRecord:
    """One softmax. Exactly one of `spec` and `refusal` is given; `dims` maps B, H, G, M, N, D, E to sizes as text."""

    anchor: str
    where: str
    dims: tuple[tuple[str, str], ...] = ()
    dtype: str = ""
    spec: AttentionSpec | None = None
    refusal: Refusal | None = None

    @property
    def fused(self) -> bool:
        return self.spec is not None


@dataclass(frozen=True)
class GraphRecord:
    """All sites of one captured graph, sub-graphs included, and why the graph could not be read, if so."""

    sites: tuple[SiteRecord, ...]
    failure: str = ""


_listeners: ContextVar[tuple[Callable[[GraphRecord], None], ...]] = ContextVar("flashfuse_listeners", default=())


def publish(record: GraphRecord) -> None:
    """Hand a graph's record to everybody who listens in this context."""
    for listener in _listeners.get():
        listener(record)


@contextmanager
def listening(listener: Callable[[GraphRecord], None]) -> Iterator[None]:
    """Call `listener` with the record of every graph compiled inside the block."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
