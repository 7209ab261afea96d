"""Every softmax of a graph as a `Match` or a `Refusal`: none is passed over in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from flashfuse.patterns.attention import Match, check_seeds, read_softmax
from flashfuse.patterns.axes import LayoutError
from flashfuse.patterns.calls import is_tensor
from flashfuse.patterns.contraction import is_product
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.sdpa import SDPA, read_sdpa
from flashfuse.patterns.softmax import recognise
from flashfuse.patterns.sums import check_terms
from flashfuse.patterns.user_code import describe, user_line
from flashfuse.patterns.ways import Way, find_ways
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
    hidden: Callable[[fx.Node], bool] = lambda node: False,
    unfit: Callable[[fx.Node], bool] = lambda node: False,
    sdpa: str = "auto",
) -> list[Site]:
    """Read every softmax, SDPA call and opaque attention call of a normal form, in graph order.

    `overwritten`: whether the captured graph loses a node's value, so that a later one should be captured if there is one.
    `hidden`, `unfit`: what writes that autograd does not see do to it (`GradientFlow`).
    `sdpa`: "auto" leaves SDPA calls to PyTorch where its own kernels serve, "always" and "never" mean what they say.
    """
    flow = GradientFlow(requires_grad, overwritten, hidden, unfit)
    found = [each for node in graph.nodes if node.op == "call_function" for each in _read_safely(node, flow, sdpa)]
    return [Site(each.anchor, user_line(each.anchor), each.found) for each in _with_sums(found)]


@dataclass(frozen=True)
class _Read:
    """What one softmax is, on its way to one output."""

    anchor: fx.Node
    found: Match | Refusal
    way: Way | None = None


def _with_sums(found: list[_Read]) -> list[_Read]:
    """Terms of one sum know of each other, or are all left alone."""
    sums: dict[fx.Node, list[_Read]] = {}
    for each in found:
        if each.way is not None and each.way.edges:
            sums.setdefault(each.way.product, []).append(each)
    joined = {id(each): each.found for each in found}
    for product, terms in sums.items():
        also = [each for each in found if each.way is not None and each.way.product is product and not each.way.edges]
        joined |= {id(term): outcome for term, outcome in zip(terms, _joined(terms, also), strict=True)}
    return [replace(each, found=joined[id(each)]) for each in found]


def _joined(terms: list[_Read], also: list[_Read]) -> list[Match | Refusal]:
    ways = [each.way.edges for each in (*terms, *also) if each.way is not None]
    matches = [term.found for term in terms if isinstance(term.found, Match)]
    try:
        check_terms(ways)
        if len(matches) == len(terms):
            check_seeds(matches)
    except Refused as refused:
        return [refusal(term.anchor, refused) for term in terms]
    if len(matches) == len(terms):
        return [replace(match, terms=tuple(matches)) for match in matches]
    failed = next(term.found for term in terms if isinstance(term.found, Refusal))
    last = ways[0][-1].node
    why = Refused("FF401", last, f"{describe(last)} on probabilities of which some are left alone ({failed.code} {failed.found})")
    return [term.found if isinstance(term.found, Refusal) else refusal(term.anchor, why) for term in terms]


def _read_safely(node: fx.Node, flow: GradientFlow, sdpa: str) -> list[_Read]:
    """`_read`; a failure of flashfuse itself costs this one node (FF501), not the graph."""
    try:
        return _read(node, flow, sdpa)
    except Exception as error:
        log.info("a node could not be read", exc_info=True)
        return [_Read(node, refusal(node, Refused("FF501", node, f"{type(error).__name__}: {error}")))]


def _read(node: fx.Node, flow: GradientFlow, sdpa: str) -> list[_Read]:
    """What a node is: nothing for most nodes, and one entry for each output of a softmax."""
    if node.target in _OPAQUE:
        return [_Read(node, refusal(node, Refused("FF103", node, describe(node))))]
    if node.target is SDPA:
        return [_Read(node, _guarded(node, flow, lambda: _read_sdpa(node, flow, sdpa)))]
    try:
        softmax = recognise(node)
        if softmax is None:
            return []
        ways = find_ways(softmax)
    except Refused as refused:
        return [_Read(node, refusal(node, refused))]
    return [_Read(node, _guarded(node, flow, partial(read_softmax, softmax, way, flow)), way) for way in ways]


def _read_sdpa(node: fx.Node, flow: GradientFlow, sdpa: str) -> Match:
    if sdpa == "never":
        raise Refused("FF102", node, 'options={"sdpa": "never"}')
    return read_sdpa(node, flow, always=sdpa == "always")


def _guarded(node: fx.Node, flow: GradientFlow, read: Callable[[], Match]) -> Match | Refusal:
    try:
        match = read()
        around = (*match.product.all_input_nodes, *match.output.all_input_nodes)  # what the products' own backwards read
        flow.check_inputs([*(each.node for each in match.inputs), *(each for each in around if is_tensor(each))])
        return match
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
