"""The frame of an attention: following axes from the output up to query, key and value.

The walk starts at a softmax, goes down to the product with the value, gives every dimension of that product's result an
axis, and follows the axes up again, through the softmax to the product of query and key and into both products' operands.
What cannot be explained raises `Refused` at its node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.patterns import axes, contraction
from flashfuse.patterns.axes import Axis, Index, refined
from flashfuse.patterns.calls import bind, is_tensor, normal_dim, shape, value_of
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.operands import Stage, peel
from flashfuse.patterns.score_cone import describe
from flashfuse.patterns.spellings import ROWS
from flashfuse.refusal import Refused

aten = torch.ops.aten
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten.special_softmax.default})
_KEEPS_PROBABILITIES = frozenset({aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.type_as.default})


@dataclass(frozen=True)
class Frame:
    """What the walk over the graph's structure found, before anything is lifted."""

    anchor: fx.Node
    output: fx.Node
    path: tuple[fx.Node, ...]  # from the softmax down to the product with the value, without either
    product: fx.Node
    carriers: frozenset[fx.Node]
    out_index: Index
    rows: Index  # the softmax's index without the key dimension
    keys: tuple[Axis, ...]
    query: tuple[Stage, ...]
    key: tuple[Stage, ...]
    value: tuple[Stage, ...]
    score_index: Index  # the index of the softmax's input
    operands: contraction.Operands
    query_first: bool
    score_dtype: torch.dtype


# ------------------------------------------------------------------------------------------------ down to the output


def find_output(anchor: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The product that consumes the probabilities, and the nodes between. Refuses FF101 or FF301."""
    path: list[fx.Node] = []
    node = anchor
    while True:
        users = [user for user in node.users if not reads_only_metadata(user, node)]
        if not users or not _leads_to_product(node):
            raise Refused("FF101", node, "no product of its result with a value")
        if len(users) > 1:
            raise Refused("FF301", node, "also used by " + ", ".join(describe(user) for user in users[:3]))
        user = users[0]
        if user.op == "output":
            raise Refused("FF301", node, "returned by the graph")
        if contraction.is_product(user):
            return user, tuple(path)
        row = ROWS.get(user.target)
        if row is None or (row.index is None and user.target not in _KEEPS_PROBABILITIES):
            raise Refused("FF401", user, f"{describe(user)} on the probabilities")
        path.append(user)
        node = user


def _leads_to_product(node: fx.Node) -> bool:
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        if contraction.is_product(user):
            return True
        same_shape = is_tensor(user) and len(shape(user)) == len(shape(node)) and shape(user) == shape(node)
        if user.target in ROWS or same_shape:
            stack.extend(user.users)
    return False


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
    return False


# ------------------------------------------------------------------------------------------------ up to the scores


def read_frame(anchor: fx.Node, flow: GradientFlow) -> Frame:
    """Follow the axes from the output up to the operands of both products."""
    output, path = find_output(anchor)
    out_index = tuple(axes.fresh(f"o{place}_", size) for place, size in enumerate(shape(output)))
    second = contraction.operands(output, out_index, "n")
    _only_a_product(second, output)
    probabilities = path[-1] if path else anchor
    left = second.left is probabilities
    if left and second.right is probabilities:
        raise Refused("FF201", output, "the probabilities multiply themselves")
    index = second.left_index if left else second.right_index
    for node in reversed(path):
        index = _through(node, index)
    score_index = index
    softmax_dim = normal_dim(bind(anchor, _SOFTMAX_READS[anchor.target])["dim"], len(index))
    if refined(index[softmax_dim]) != refined(second.summed):  # type: ignore[arg-type]
        found = f"softmax over dim {softmax_dim - len(index)}, while the product with the value sums over another axis"
        raise Refused("FF202", anchor, found)
    scores = anchor.args[0]
    assert isinstance(scores, fx.Node)
    product, carriers = find_product(scores)
    first = contraction.operands(product, _index_at(scores, score_index, product, carriers), "d")
    query_first = _is_query_first(product, first, second.summed)
    sides = [(first.left, first.left_index), (first.right, first.right_index)]
    query, key = sides if query_first else sides[::-1]
    value = (second.right, second.right_index) if left else (second.left, second.left_index)
    return Frame(
        anchor, output, path, product, carriers, out_index,
        rows=tuple(dim for place, dim in enumerate(score_index) if place != softmax_dim),
        keys=second.summed,
        query=tuple(peel(*query, flow, linear=True)),
        key=tuple(peel(*key, flow, linear=True)),
        value=tuple(peel(*value, flow, linear=False)),
        score_index=score_index, operands=first, query_first=query_first,
        score_dtype=value_of(product).dtype,
    )  # fmt: skip


_SOFTMAX_READS = {
    aten.softmax.int: ("self", "dim", "dtype"),
    aten._softmax.default: ("self", "dim", "half_to_float"),
    aten.special_softmax.default: ("self", "dim", "dtype"),
}


def _only_a_product(found: contraction.Operands, node: fx.Node) -> None:
    if value_of(found.alpha) != 1 or value_of(found.beta) != 0:
        raise Refused("FF402", node, f"{describe(node)} adds or scales the output (alpha, beta)")


def _through(node: fx.Node, index: Index) -> Index:
    row = ROWS[node.target]
    if row.index is None:
        if not value_of(node).dtype.is_floating_point:
            raise Refused("FF401", node, "the probabilities are cast to integers")
        return index
    call = bind(node, row.reads)
    return row.index(None, call, index)


def find_product(scores: fx.Node) -> tuple[fx.Node, frozenset[fx.Node]]:
    """The one product that the scores come from, and the nodes that carry the score between it and `scores`."""
    products: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stopped: list[fx.Node] = []
    stack = [scores]
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            stopped += [node] if node.op != "call_function" else []
            continue
        seen.add(node)
        if contraction.is_product(node):
            products.append(node)
            stack.extend(_added(node))
        elif node.target in ROWS:
            stack.extend(argument for argument in node.all_input_nodes if is_tensor(argument))
        else:
            stopped.append(node)
    if not products:
        raise Refused("FF201", stopped[0] if stopped else scores, "no product between the softmax and " + _names(stopped))
    carrying = [node for node in products if not _makes_side_value(node, scores, seen)]
    if len(carrying) != 1:
        raise Refused("FF403", products[0], f"{len(products)} products are summed into the scores: {_names(products)}")
    carriers = _between(carrying[0], scores, seen)
    return carrying[0], carriers


def _added(node: fx.Node) -> list[fx.Node]:
    found = node.args[0] if node.target in (aten.baddbmm.default, aten.addmm.default) else None
    beta = node.kwargs.get("beta", 1)
    return [found] if isinstance(found, fx.Node) and beta != 0 else []


def _makes_side_value(product: fx.Node, scores: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether a product reaches the scores only as a mask: its value is turned into a predicate on every way."""
    users = [user for user in product.users if user in seen]
    return product is not scores and bool(users) and all(value_of(user).dtype is torch.bool for user in users)


def _between(product: fx.Node, scores: fx.Node, seen: set[fx.Node]) -> frozenset[fx.Node]:
    forward: set[fx.Node] = set()
    stack = [product]
    while stack:
        node = stack.pop()
        if node in forward or (node not in seen):
            continue
        forward.add(node)
        stack.extend(node.users)
    return frozenset(forward - {product})


def _index_at(scores: fx.Node, index: Index, product: fx.Node, carriers: frozenset[fx.Node]) -> Index:
    """The product's index, followed through the carriers. Refuses if two ways disagree."""
    found: list[Index] = []
    stack: list[tuple[fx.Node, Index]] = [(scores, index)]
    seen: set[fx.Node] = set()
    while stack:
        node, own = stack.pop()
        if node is product:
            found.append(own)
            continue
        if node in seen:
            continue
        seen.add(node)
        row = ROWS.get(node.target)
        if row is None and contraction.is_product(node):
            raise Refused("FF403", node, "a product between the product of query and key and the softmax")
        if row is None:
            raise Refused("FF401", node, describe(node))
        for argument in node.all_input_nodes:
            if argument is not product and argument not in carriers:
                continue
            if row.index is not None:
                stack.append((argument, row.index(None, bind(node, row.reads), own)))
            else:
                stack.append((argument, axes.broadcast(own, shape(argument))))
    if len({tuple(refined(dim) for dim in each) for each in found}) != 1:  # type: ignore[arg-type]
        raise Refused("FF204", product, "the scores reach the softmax in two different layouts")
    return found[0]


def _is_query_first(product: fx.Node, operands: contraction.Operands, keys: tuple[Axis, ...]) -> bool:
    wanted = set(refined(keys))
    left, right = (
        {axis for dim in index for axis in refined(dim)} & wanted  # type: ignore[arg-type]
        for index in (operands.left_index, operands.right_index)
    )
    if left and right:
        raise Refused("FF201", product, "both factors run over the keys, so this is no query @ key^T")
    if not left and not right:
        raise Refused("FF201", product, "no factor runs over the keys that the softmax normalises")
    return bool(right)


def _names(nodes: list[fx.Node]) -> str:
    return ", ".join(describe(node) for node in nodes[:3]) or "the graph's inputs"
