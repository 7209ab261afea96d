"""From Dynamo's captured graph to its normal form: call by call where that tells all, else by one trace of the whole graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from flashfuse.patterns.aliases import rename
from flashfuse.patterns.call_reader import read_calls
from flashfuse.patterns.call_traces import NotByCalls
from flashfuse.patterns.normal_form import NormalForm, fake_mode_of
from flashfuse.patterns.unseen_writes import unseen_writes
from flashfuse.patterns.whole_trace import trace_whole

log = logging.getLogger("flashfuse")


def normalise(module: fx.GraphModule, *, writes_of: Callable[[fx.Node], bool]) -> NormalForm:
    """The normal form of a captured graph whose nodes carry fake values in meta["example_value"].

    `writes_of(node)` tells whether an opaque node may write its arguments. Raises whatever tracing raises.
    """
    if _has_no_tensors(module.graph):
        return NormalForm(fx.Graph())
    try:
        form = read_calls(module, writes_of)
    except NotByCalls as reason:
        log.info("the graph is traced as a whole: %s", reason)
        form = trace_whole(module, writes_of)
    rename(form.graph)
    form.graph.eliminate_dead_code()
    _apply_autocast(form, fake_mode_of(module.graph))
    _keep_lines(form)
    form.unseen_writes = unseen_writes(form, module.graph)
    alive = set(form.graph.nodes)
    form.origins = {node: origins for node, origins in form.origins.items() if node in alive}
    return form


def _has_no_tensors(graph: fx.Graph) -> bool:
    """Whether a graph computes with numbers alone, as between two graph breaks of a model with dynamic shapes."""
    held = [node.meta.get("example_value") for node in graph.nodes if node.op not in ("get_attr", "output")]
    return all(isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) for value in held)


def _keep_lines(form: NormalForm) -> None:
    """Give the user's line to nodes that a composite call (nn.TransformerEncoderLayer's own forward) made without one."""
    for node, made_by in form.produced.items():
        line = made_by.meta.get("stack_trace")
        if line and not node.meta.get("stack_trace"):
            node.meta["stack_trace"] = line


def _apply_autocast(form: NormalForm, fake_mode: FakeTensorMode | None) -> None:
    """Give nodes the dtypes that they have under autocast, which the trace does not see but Dynamo's values show."""
    for node, origins in form.origins.items():
        val = node.meta.get("val")
        for origin in origins:
            shown = origin.node.meta.get("example_value")
            for place in origin.path:
                shown = shown[place] if isinstance(shown, (tuple, list)) else None
            if not isinstance(shown, torch.Tensor) or not isinstance(val, torch.Tensor) or origin.node.op == "get_attr":
                continue
            if shown.dtype != val.dtype and form.produced.get(node) is origin.node:
                with fake_mode or nullcontext():
                    node.meta["val"] = val.to(shown.dtype)
