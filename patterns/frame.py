"""The frame of an attention: following axes from the output up to query, key and value.

The walk starts at a softmax, goes down to the product with the value, gives every dimension of that product's result an
axis, and follows the axes up again, through the softmax to the product of query and key and into both products' operands.
What cannot be explained raises `Refused` at its node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from flashfuse.patterns import axes, contraction
from flashfuse.patterns.axes import Axis, Index, refined
from flashfuse.patterns.calls import bind, is_tensor, shape, value_of
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.joined import largest_sum
from flashfuse.patterns.operands import Stage, peel
from flashfuse.patterns.score_cone import describe
from flashfuse.patterns.selections import is_selection, operand_index
from flashfuse.patterns.sinks import Cut, Sink, beside_sink, cut_of, find_sink
from flashfuse.patterns.softmax import LateSum, Softmax, leads_to_product, row_shifts, upwards
from flashfuse.patterns.spellings import CASTS, ROWS, overwrites_whole
from flashfuse.patterns.sums import Edge, Factor, edge_of, factors_behind
from flashfuse.refusal import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """Query and key of one of several products that are joined, and the axes that it sums over."""

    query: Stage
    key: Stage
    summed: tuple[Axis, ...]


@dataclass(frozen=True)
class Frame:
    """What the walk over the graph's structure found, before anything is lifted."""

    softmax: Softmax | None  # None: a call that holds the whole attention
    output: fx.Node
    probabilities: fx.Node  # what the softmax gives, or with late normalisation the exponentials
    path: tuple[fx.Node, ...]  # from there down to the product with the value, without either
    path_index: tuple[Index, ...]  # the index of each
    passing: frozenset[fx.Node]  # nodes of that path that only zero rows of NaN, or cut off a sink
    zeroes_nan: bool
    product: fx.Node
    carriers: frozenset[fx.Node]
    out_index: Index
    rows: Index  # the softmax's index without the key dimension
    keys: tuple[Axis, ...]
    query: tuple[Stage, ...]
    key: tuple[Stage, ...]
    value: tuple[Stage, ...]
    scores: fx.Node  # the softmax's input, without a sink
    sink: Sink | None
    score_index: Index  # the index of the scores
    shifts: dict[fx.Node, fx.Node]  # sums in the scores with a term that cancels: the term that stays
    operands: contraction.Operands
    query_first: bool
    score_dtype: torch.dtype
    edges: tuple[Edge, ...] = ()  # the sums on the path
    factors: tuple[Factor, ...] = ()  # what multiplies the output instead of the probabilities
    more: tuple[Part, ...] = ()  # query and key of further products, joined to the first along the head dim

    @property
    def held(self) -> frozenset[fx.Node]:
        """Nodes of the path whose element is that of the node before: parts, sums, factors taken to the output."""
        own = {*(edge.node for edge in self.edges), *(factor.node for factor in self.factors)}
        return frozenset(own | {node for node in self.path if is_selection(node)})


# ------------------------------------------------------------------------------------------------ down to the output


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


# ------------------------------------------------------------------------------------------------ up to the scores


def read_frame(softmax: Softmax, way: Way, flow: GradientFlow, *, join: bool = False) -> Frame:
    """Follow the axes from the output up to the operands of both products.

    `join`: take several products of query and key that are added up for one, where that is possible.
    """
    out_index = tuple(axes.fresh(f"o{place}_", size) for place, size in enumerate(shape(way.output)))
    second = contraction.operands(way.product, _index_of_product(way, out_index), "n")
    _only_a_product(second, way.product)
    source = softmax.anchor if softmax.late is None else softmax.scores
    last = way.path[-1] if way.path else source
    left = second.left is last
    if left and second.right is last:
        raise Refused("FF201", way.product, "the probabilities multiply themselves")
    index = second.left_index if left else second.right_index
    path_index: list[Index] = []
    cut: Cut | None = None
    befores = (source, *way.path[:-1])
    for node, before in zip(reversed(way.path), reversed(befores), strict=False):
        path_index.insert(0, index)
        cuts = None if cut is not None else cut_of(node, index, second.summed)
        if cut is not None and cut.start and node.target in ROWS and ROWS[node.target].weighs:
            raise Refused("FF401", node, "the probabilities are weighted before keys are cut off in front of them")
        cut = cut or cuts
        index = index if cuts is not None else _through(node, before, index)
    if refined(index[softmax.dim]) != refined(second.summed):  # type: ignore[arg-type]
        found = f"softmax over dim {softmax.dim - len(index)}, while the product with the value sums over another axis"
        raise Refused("FF202", softmax.anchor, found)
    softmax, shifts = beside_sink(softmax, row_shifts(softmax, index, second.summed))
    sink = find_sink(softmax, cut, shifts, index)
    scores = softmax.scores if sink is None else sink.scores
    value = (second.right, second.right_index) if left else (second.left, second.left_index)
    rows = tuple(axes.free(dim) for place, dim in enumerate(index) if place != softmax.dim)  # type: ignore[arg-type]
    among = (find_products(scores, shifts), scores, index, shifts, second.summed, rows, value[1], flow)
    chosen = (_choose_joined(*among) if join else None) or _choose(*among)
    query, key = (peel(*side, flow, linear=True) for side in _sides(chosen.operands, chosen.query_first))
    if chosen.more:  # what is peeled off one part alone would be lacking in the others
        query, key = query[:1], key[:1]
    return Frame(
        softmax, way.output, source, way.path, tuple(path_index),
        way.zeroing | ({cut.node} if cut is not None else frozenset()), bool(way.zeroing), chosen.product, chosen.carriers,
        out_index,
        rows=rows,
        keys=second.summed,
        query=tuple(query),
        key=tuple(key),
        value=tuple(peel(*value, flow, linear=False)),
        scores=scores, sink=sink, score_index=index, shifts=shifts, operands=chosen.operands, query_first=chosen.query_first,
        score_dtype=value_of(chosen.product).dtype, edges=way.edges,
        more=chosen.more, factors=factors_behind(way.path, befores, path_index, second.summed) if way.edges else (),
    )  # fmt: skip


@dataclass(frozen=True)
class _Scores:
    """The product of query and key, the nodes that carry the score from there to the softmax, and its operands."""

    product: fx.Node
    carriers: frozenset[fx.Node]
    operands: contraction.Operands
    query_first: bool
    more: tuple[Part, ...] = ()


def _sides(operands: contraction.Operands, query_first: bool) -> list[tuple[fx.Node, Index]]:
    """Query and key of a product, each with its index."""
    sides = [(operands.left, operands.left_index), (operands.right, operands.right_index)]
    return sides if query_first else sides[::-1]


def _choose_joined(
    products: list[tuple[fx.Node, frozenset[fx.Node]]], scores: fx.Node, index: Index, shifts: dict[fx.Node, fx.Node],
    keys: tuple[Axis, ...], rows: Index, value: Index, flow: GradientFlow,
) -> _Scores | None:  # fmt: skip
    """The largest sum of products each of which can be query and key, as one product; None if there is none."""
    if len(products) < 2:
        return None
    joined = largest_sum(*products[0])
    if joined is None or any(flow.stops_at(node) for node in (joined.node, *joined.products)):
        return None
    carriers = _between(joined.node, scores, {*products[0][1], joined.node})
    try:
        own = _index_at(scores, index, joined.node, carriers, shifts)
        parts = [contraction.operands(product, own, "d") for product in joined.products]
        first = [_is_query_first(joined.node, part, keys) for part in parts]
        sides = [_sides(part, query_first) for part, query_first in zip(parts, first, strict=True)]
        for _query, (_node, key) in sides:
            _check_key(joined.node, key, rows, value)
    except (Refused, axes.LayoutError):
        return None
    whole = replace(parts[0], alpha=joined.factor, beta=0, added=None)
    more = tuple(
        Part(Stage(*query), Stage(*key), part.summed) for (query, key), part in zip(sides[1:], parts[1:], strict=True)
    )
    return _Scores(joined.node, carriers, whole, first[0], more)


def _choose(
    products: list[tuple[fx.Node, frozenset[fx.Node]]], scores: fx.Node, index: Index, shifts: dict[fx.Node, fx.Node],
    keys: tuple[Axis, ...], rows: Index, value: Index, flow: GradientFlow,
) -> _Scores:  # fmt: skip
    """The product of query and key among those that are summed into the scores; the others become captured tensors.

    Raises what the first of them raised if none can be it.
    """
    found: list[_Scores] = []
    failed: list[Exception] = []
    for product, carriers in products:
        try:
            operands = contraction.operands(product, _index_at(scores, index, product, carriers, shifts), "d")
            query_first = _is_query_first(product, operands, keys)
            if flow.stops_at(product):
                raise Refused("FF408", product, f"the gradient stops at {describe(product)}")
            _check_key(product, operands.right_index if query_first else operands.left_index, rows, value)
            found.append(_Scores(product, carriers, operands, query_first))
        except (Refused, axes.LayoutError) as error:
            failed.append(error)
    if not found:
        raise failed[0]
    return found[0]


def _check_key(product: fx.Node, key: Index, rows: Index, value: Index) -> None:
    """Refuse (FF403) a key that differs for each query: a product with such a tensor is a bias, or mixes heads."""
    in_rows, in_key, in_value = ({axis for dim in each for axis in refined(dim)} for each in (rows, key, value))  # type: ignore[arg-type]
    if in_rows - in_value and in_rows - in_value <= in_key:
        raise Refused("FF403", product, "its second factor is another one for each query")


def _index_of_product(way: Way, out_index: Index) -> Index:
    """The index of the product with the value, of which a late division and views may make the output."""
    if way.late is None:
        return out_index
    return upwards(way.late.dividend, axes.broadcast(out_index, shape(way.late.dividend)))[1]


def _only_a_product(found: contraction.Operands, node: fx.Node) -> None:
    if value_of(found.alpha) != 1 or value_of(found.beta) != 0:
        raise Refused("FF402", node, f"{describe(node)} adds or scales the output (alpha, beta)")


def _through(node: fx.Node, before: fx.Node, index: Index) -> Index:
    if is_selection(node):
        return operand_index(node, index)
    row = ROWS.get(node.target)
    if row is None or row.index is None:
        if not value_of(node).dtype.is_floating_point:
            raise Refused("FF401", node, "the probabilities are cast to integers")
        if len(shape(before)) != len(index) or not all(map(axes.same_size, shape(before), shape(node))):
            raise Refused("FF204", node, "the probabilities are broadcast")
        return index
    call = bind(node, row.reads)
    return row.index(None, call, index)


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
    return [(node, _between(node, scores, seen)) for node in carrying or products]


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


def _between(product: fx.Node, scores: fx.Node, seen: set[fx.Node]) -> frozenset[fx.Node]:
    forward: set[fx.Node] = set()
    stack = [product]
    while stack:
        node = stack.pop()
        if node in forward or node not in seen or not (node is product or node.target in ROWS or is_selection(node)):
            continue
        forward.add(node)
        stack.extend(user for user in node.users if not reads_only_metadata(user, node))
    return frozenset(forward - {product})


def _index_at(
    scores: fx.Node, index: Index, product: fx.Node, carriers: frozenset[fx.Node], shifts: dict[fx.Node, fx.Node]
) -> Index:
    """The product's index, followed through the carriers. Refuses if two ways disagree."""
    found: list[Index] = []
    stack: list[tuple[fx.Node, Index]] = [(scores, index)]
    seen: dict[fx.Node, Index] = {}
    while stack:
        node, own = stack.pop()
        if node is product:
            found.append(own)
            continue
        if node in seen:
            found += [] if _same_index(seen[node], own) else [own, seen[node]]
            continue
        seen[node] = own
        row = ROWS.get(node.target)
        for argument in [shifts[node]] if node in shifts else node.all_input_nodes:
            if (argument is not product and argument not in carriers) or reads_only_metadata(node, argument):
                continue
            if is_selection(node) or (row is not None and row.index is not None):
                stack.append((argument, operand_index(node, own)))
            else:
                stack.append((argument, axes.broadcast(own, shape(argument))))
    if not all(_same_index(each, found[0]) for each in found):
        raise Refused("FF204", product, "the scores reach the softmax in two different layouts")
    return found[0]


def _same_index(a: Index, b: Index) -> bool:
    return len(a) == len(b) and all(refined(x) == refined(y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


def _is_query_first(product: fx.Node, operands: contraction.Operands, keys: tuple[Axis, ...]) -> bool:
    wanted = set(refined(keys))
    left, right = (
        {axis for dim in index for axis in refined(dim)} & wanted  # type: ignore[arg-type]
        for index in (operands.left_index, operands.right_index)
    )
    if left and right:
        raise Refused("FF201", product, "both factors run over the keys, so this is no query @ key^T")
    if not wanted:
        raise Refused("FF201", product, "the softmax runs over a single key, so that it gives 1 whatever the scores")
    if not left and not right:
        raise Refused("FF201", product, "no factor runs over the keys that the softmax normalises")
    if left | right != wanted:
        raise Refused("FF201", product, "its factor runs over a part of the keys that the softmax normalises only")
    return bool(right)


def _names(nodes: list[fx.Node]) -> str:
    return ", ".join(describe(node) for node in nodes[:3]) or "the graph's inputs"
