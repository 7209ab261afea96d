"""Down from a softmax: every product with a value that its probabilities go into, and what lies between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.patterns import contraction
from flashfuse.patterns.calls import bind
from flashfuse.patterns.selections import is_selection
from flashfuse.patterns.softmax import LateSum, Softmax, leads_to_product
from flashfuse.patterns.spellings import CASTS, ROWS, overwrites_whole
from flashfuse.patterns.sums import Edge, edge_of
from flashfuse.patterns.user_code import describe
from flashfuse.refusal import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class Way:
    """From the softmax to an output: the nodes up to the product with the value, that product, and the output itself.

    With `edges`, the sums on the path, the output is a sum of several attentions' (see `patterns.sums`).
    """

    path: tuple[fx.Node, ...]
    product: fx.Node
    output: fx.Node
    zeroing: frozenset[fx.Node] = frozenset()
    late: LateSum | None = None
    edges: tuple[Edge, ...] = ()


def find_ways(softmax: Softmax) -> list[Way]:
    """Every product with a value that consumes the probabilities. Refuses FF101 or FF401 if there is none.

    Whoever else uses the probabilities gets them from the original code.
    """
    if softmax.late is not None:
        return [Way(softmax.late.path, softmax.late.product, softmax.late.output, late=softmax.late)]
    if not leads_to_product(softmax.anchor):
        raise Refused("FF101", softmax.anchor, "no product of its result with a value")
    ways: list[Way] = []
    strange: list[fx.Node] = []
    pending: list[tuple[fx.Node, tuple[fx.Node, ...], frozenset[fx.Node], tuple[Edge, ...]]]
    pending = [(softmax.anchor, (), frozenset(), ())]
    while pending:
        node, path, zeroes, edges = pending.pop()
        for user in node.users:
            if user.op == "output" or reads_only_metadata(user, node):
                continue
            row = ROWS.get(user.target)
            if contraction.is_product(user):
                if all((way.product, way.edges) != (user, edges) for way in ways):
                    ways.append(Way(path, user, user, zeroes, edges=edges))
            elif _zeroes_nan(user, node) and not edges:
                pending.append((user, (*path, user), zeroes | {user}, edges))
            elif is_selection(user) or (row is not None and (row.index is not None or row.weighs or user.target in CASTS)):
                pending.append((user, (*path, user), zeroes, edges))
            elif edge_of(user, node) is not None and leads_to_product(user):
                pending.append((user, (*path, user), zeroes, (*edges, edge_of(user, node))))  # type: ignore[arg-type]
            else:
                strange.append(user)
    if not ways and not strange:
        raise Refused("FF101", softmax.anchor, "no product of its result with a value")
    if not ways:
        raise Refused("FF401", strange[0], f"{describe(strange[0])} on the probabilities")
    return ways


def _zeroes_nan(user: fx.Node, node: fx.Node) -> bool:
    """`nan_to_num(p)`, `p.masked_fill(p.isnan(), 0)` and `where(p.isnan(), 0, p)`."""
    if user.target is aten.nan_to_num.default:
        return not bind(user, ("self", "nan", "posinf", "neginf"))["nan"]
    if user.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        mask, fill, kept = user.args[1], user.args[2], user.args[0]
    elif user.target in (aten.where.self, aten.where.ScalarSelf):
        mask, fill, kept = user.args
    else:
        return False
    checks_nan = isinstance(mask, fx.Node) and mask.target is aten.isnan.default and mask.args[0] is node
    return checks_nan and kept is node and _is_zero(fill)


def _is_zero(fill: object) -> bool:
    if isinstance(fill, fx.Node) and fill.target is aten.scalar_tensor.default:
        fill = fill.args[0]
    if isinstance(fill, fx.Node) and fill.target in (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default):
        return True
    return isinstance(fill, (int, float)) and fill == 0


def reads_only_metadata(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user needs a node's shape or dtype only."""
    if user.op != "call_function":
        return False
    if user.target is aten._assert_tensor_metadata.default:
        return True
    if isinstance(user.meta.get("val"), (torch.SymInt, int)) and "sym_" in str(user.target):
        return True
    name = str(user.target)
    if any(word in name for word in ("new_", "_like.")):
        return True
    if user.target in (aten.type_as.default, aten.to.other, aten.view_as.default, aten.expand_as.default):
        return user.args[0] is not node
    return user.args[:1] == (node,) and node not in user.args[1:] and overwrites_whole(user)
