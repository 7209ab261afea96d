"""Every softmax of a graph as a `Match` or a `Refusal`: none is passed over in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from flashfuse.patterns.attention import Match, read_softmax
from flashfuse.patterns.axes import LayoutError
from flashfuse.patterns.calls import is_tensor
from flashfuse.patterns.contraction import is_product
from flashfuse.patterns.frame import find_ways
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.score_cone import describe, user_line
from flashfuse.patterns.sdpa import SDPA, read_sdpa
from flashfuse.patterns.softmax import recognise
from flashfuse.refusal import Refusal, Refused

log = logging.getLogger("flashfuse")
aten = torch.ops.aten
_OPAQUE = frozenset({aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default})


@dataclass(frozen=True)
class Site:
    """One softmax: its node in the normal form, the user's line, and what was found."""

    anchor: fx.Node
    where: str
    found: Match | Refusal


def find_attention(
    graph: fx.Graph,
    *,
    requires_grad: Callable[[fx.Node], bool],
    overwritten: Callable[[fx.Node], bool] = lambda node: False,
    sdpa: str = "auto",
) -> list[Site]:
    """Read every softmax, SDPA call and opaque attention call of a normal form, in graph order.

    `overwritten`: whether the captured graph loses a node's value, so that a later one should be captured if there is one.
    `sdpa`: "auto" leaves SDPA calls to PyTorch where its own kernels serve, "always" and "never" mean what they say.
    """
    flow = GradientFlow(requires_grad, overwritten)
    return [
        Site(node, user_line(node), found)
        for node in graph.nodes
        if node.op == "call_function"
        for found in _read_safely(node, flow, sdpa)
    ]


def _read_safely(node: fx.Node, flow: GradientFlow, sdpa: str) -> list[Match | Refusal]:
    """`_read`; a failure of flashfuse itself costs this one node (FF501), not the graph."""
    try:
        return _read(node, flow, sdpa)
    except Exception as error:
        log.info("a node could not be read", exc_info=True)
        return [refusal(node, Refused("FF501", node, f"{type(error).__name__}: {error}"))]


def _read(node: fx.Node, flow: GradientFlow, sdpa: str) -> list[Match | Refusal]:
    """What a node is: nothing for most nodes, and one entry for each output of a softmax."""
    if node.target in _OPAQUE:
        return [refusal(node, Refused("FF103", node, describe(node)))]
    if node.target is SDPA:
        return [_guarded(node, lambda: _read_sdpa(node, flow, sdpa))]
    try:
        softmax = recognise(node)
        if softmax is None:
            return []
        ways = find_ways(softmax)
    except Refused as refused:
        return [refusal(node, refused)]
    return [_guarded(node, partial(read_softmax, softmax, way, flow)) for way in ways]


def _read_sdpa(node: fx.Node, flow: GradientFlow, sdpa: str) -> Match:
    if sdpa == "never":
        raise Refused("FF102", node, 'options={"sdpa": "never"}')
    return read_sdpa(node, flow, always=sdpa == "always")


def _guarded(node: fx.Node, read: Callable[[], Match]) -> Match | Refusal:
    try:
        return read()
    except Refused as refused:
        return refusal(node, refused)
    except LayoutError as error:
        return refusal(node, Refused("FF204", node, str(error)))


def refusal(anchor: fx.Node, refused: Refused) -> Refusal:
    """The record of a refusal, with the line of the node where the walk stopped (or else the softmax's)."""
    stopped = refused.node if isinstance(refused.node, fx.Node) else anchor
    return Refusal(
        refused.code, str(anchor), str(refused.node), refused.found,
        where=user_line(stopped) or user_line(anchor),
        reached=_reached(anchor, stopped), safe_for_inductor=refused.safe_for_inductor,
    )  # fmt: skip


def _reached(anchor: fx.Node, stopped: fx.Node) -> tuple[str, ...]:
    """The ATen names on the way up from the softmax, at most to the product; shorter if the walk stopped on the way."""
    way: list[str] = []
    node: fx.Node | None = anchor
    while node is not None and node.op == "call_function" and len(way) < 12:
        way.append(describe(node).removeprefix("aten."))
        if node is stopped or is_product(node):
            break
        tensors = [argument for argument in node.all_input_nodes if is_tensor(argument)]
        node = tensors[0] if tensors else None
    return tuple(way)
