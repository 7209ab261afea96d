"""Up from a softmax: the products that its scores come from, and the nodes that carry them."""

from __future__ import annotations

import torch
from torch import fx

from flashfuse.patterns import contraction
from flashfuse.patterns.calls import is_tensor, shape, value_of
from flashfuse.patterns.selections import is_selection
from flashfuse.patterns.spellings import ROWS
from flashfuse.patterns.user_code import describe
from flashfuse.patterns.ways import reads_only_metadata
from flashfuse.refusal import Refused

aten = torch.ops.aten


def find_products(scores: fx.Node, shifts: dict[fx.Node, fx.Node]) -> list[tuple[fx.Node, frozenset[fx.Node]]]:
    """The products that the scores come from, each with the nodes that carry the score between it and `scores`."""
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
        elif node.target in ROWS or is_selection(node):
            inputs = (each for each in node.all_input_nodes if not reads_only_metadata(node, each))
            above = [each for each in inputs if is_tensor(each) or is_selection(each)]
            stack.extend([shifts[node]] if node in shifts else above)
        else:
            stopped.append(node)
    if not products:
        unknown = next((node for node in stopped if _comes_from_product(node)), None)
        if unknown is not None:
            raise Refused("FF401", unknown, f"{describe(unknown)} between the product and the softmax")
        raise Refused("FF201", stopped[0] if stopped else scores, "no product between the softmax and " + _names(stopped))
    carrying = [node for node in products if not _makes_side_value(node, scores, seen)]
    return [(node, between(node, scores, seen)) for node in carrying or products]


def _comes_from_product(node: fx.Node, most: int = 40) -> bool:
    """Whether a product lies close above a node of the same shape."""
    stack, seen = list(node.all_input_nodes), {node}
    while stack and len(seen) < most:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if contraction.is_product(current) and is_tensor(node) and len(shape(current)) == len(shape(node)):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _added(node: fx.Node) -> list[fx.Node]:
    found = node.args[0] if node.target in (aten.baddbmm.default, aten.addmm.default) else None
    beta = node.kwargs.get("beta", 1)
    return [found] if isinstance(found, fx.Node) and beta != 0 else []


def _makes_side_value(product: fx.Node, scores: fx.Node, seen: set[fx.Node]) -> bool:
    """Whether a product reaches the scores only as a mask: its value is turned into a predicate on every way."""
    users = [user for user in product.users if user in seen]
    return product is not scores and bool(users) and all(is_tensor(u) and value_of(u).dtype is torch.bool for u in users)


def between(product: fx.Node, scores: fx.Node, seen: set[fx.Node]) -> frozenset[fx.Node]:
    """The nodes on the ways from a product to the scores, among those that were seen above the scores."""
    forward: set[fx.Node] = set()
    stack = [product]
    while stack:
        node = stack.pop()
        if node in forward or node not in seen or not (node is product or node.target in ROWS or is_selection(node)):
            continue
        forward.add(node)
        stack.extend(user for user in node.users if not reads_only_metadata(user, node))
    return frozenset(forward - {product})


def _names(nodes: list[fx.Node]) -> str:
    return ", ".join(describe(node) for node in nodes[:3]) or "the graph's inputs"
