"""What `fuse` makes of one captured graph, with the stages on the way for those who show them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from flashfuse.patterns.normal_form import NormalForm
from flashfuse.patterns.search import Site
from flashfuse.records import GraphRecord


@dataclass(frozen=True)
class Fused:
    """The graph to hand on (the same object if nothing changed), its record, and whether it writes its inputs.

    For those who show the stages: the captured graph, its normal form (None if it could not be read), what was found in
    it, and the same of its sub-graphs.
    """

    module: fx.GraphModule
    record: GraphRecord
    writes_inputs: bool
    captured: fx.GraphModule
    form: NormalForm | None = None
    sites: tuple[Site, ...] = ()
    inner: tuple[tuple[str, Fused], ...] = ()
