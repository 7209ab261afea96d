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
from flashfuse.patterns.calls import bind, shape, value_of
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.joined import largest_sum
from flashfuse.patterns.operands import Stage, peel
from flashfuse.patterns.products import between, find_products
from flashfuse.patterns.row_shifts import row_shifts
from flashfuse.patterns.selections import is_selection, operand_index
from flashfuse.patterns.sinks import Cut, Sink, beside_sink, cut_of, find_sink
from flashfuse.patterns.softmax import Softmax, upwards
from flashfuse.patterns.spellings import ROWS
from flashfuse.patterns.sums import Edge, Factor, factors_behind
from flashfuse.patterns.user_code import describe
from flashfuse.patterns.ways import Way, reads_only_metadata
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
    carriers = between(joined.node, scores, {*products[0][1], joined.node})
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
