"""What the backend did with each softmax of each graph: the records that counters, logs and `explain` read."""

from __future__ import annotations

from dataclasses import dataclass

from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.refusal import Refusal


@dataclass(frozen=True)
class SiteRecord:
    """One softmax. Exactly one of `spec` and `refusal` is given; `dims` maps B, H, G, M, N, D, E to sizes as text.

    `where` is the user's line (`model.py:88`), `path` the same with the whole path. `captures` are the user's names of
    the tensors that the score reads. `region` names the captured graph's nodes that were replaced or, of a refusal,
    those where the search started and stopped. `also_made`: "probabilities" or "scores" where the original code still
    computes them because something else uses them. `notes`: (word, text) about what was done around the kernel.
    """

    anchor: str
    where: str
    dims: tuple[tuple[str, str], ...] = ()
    dtype: str = ""
    spec: AttentionSpec | None = None
    refusal: Refusal | None = None
    path: str = ""
    device: str = ""
    captures: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    also_made: str = ""
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def fused(self) -> bool:
        return self.spec is not None


@dataclass(frozen=True)
class GraphRecord:
    """All sites of one captured graph, sub-graphs included, and why the graph could not be read, if so."""

    sites: tuple[SiteRecord, ...]
    failure: str = ""
