"""Reading one softmax: is it the middle of an attention, and which one exactly?

The walk starts at the softmax, goes down to the product with the value, gives every dimension of that product's result
an axis, and follows the axes up again: through the softmax to the product of query and key, and through both products'
operands. What cannot be explained raises `Refused` at its node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows, plain_load_letters
from flashfuse.ir.mask import LOW_SCORE
from flashfuse.ir.ranges import rows_never_empty
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import Value
from flashfuse.patterns import axes, contraction
from flashfuse.patterns.axes import Axis, Index, LayoutError, refined
from flashfuse.patterns.calls import bind, is_tensor, normal_dim, shape, value_of
from flashfuse.patterns.operands import Stage, View, canonical_view, is_viewable, peel
from flashfuse.patterns.score_cone import Lifter, Positions, describe, folded
from flashfuse.patterns.spellings import ROWS
from flashfuse.refusal import Refused

aten = torch.ops.aten
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten.special_softmax.default})
_KEEPS_PROBABILITIES = frozenset({aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.type_as.default})
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Input:
    """One tensor of the call: the normal form's node, the view to canonical form, and a cast to make first."""

    node: fx.Node
    view: View | None = None
    cast: torch.dtype | None = None
    copy: bool = False


@dataclass
class Match:
    """An attention: `output` (in the normal form) may be replaced by the spec's op on these inputs.

    `out_view` leads from the op's [B, H, M, E] result to the output's own layout.
    """

    anchor: fx.Node
    output: fx.Node
    spec: AttentionSpec
    query: Input
    key: Input
    value: Input
    captures: tuple[Input, ...]
    sizes: tuple[Any, ...]
    out_view: View
    layout: str
    region: frozenset[fx.Node]
    dims: dict[str, Any] = field(default_factory=dict)


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


def read_frame(anchor: fx.Node) -> Frame:
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
        query=tuple(peel(*query, linear=True)),
        key=tuple(peel(*key, linear=True)),
        value=tuple(peel(*value, linear=False)),
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


# ------------------------------------------------------------------------------------------------ roles and layout


@dataclass(frozen=True)
class Roles:
    """The canonical axes and the chosen stages."""

    batch: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    group: tuple[Axis, ...]
    queries: tuple[Axis, ...]
    query: Stage
    key: Stage
    value: Stage

    @property
    def heads(self) -> tuple[Axis, ...]:
        return (*self.kv_heads, *self.group)


def solve_roles(frame: Frame) -> tuple[Roles, dict[str, View], dict[str, bool]]:
    """The deepest stages for which all three operands have the canonical layout by views alone.

    Failing that, the product's own operands, of which one may then be copied as eager's own product would copy it.
    """
    summed = refined(frame.operands.summed)
    value_dim = tuple(axis for dim in frame.out_index for axis in refined(dim) if axis in frame.value[0].axes())  # type: ignore[arg-type]
    rows = tuple(axis for dim in frame.rows for axis in refined(dim))  # type: ignore[arg-type]
    value_dim = tuple(axis for axis in value_dim if axis not in rows)
    fallback = None
    for key in reversed(frame.key):
        for value in reversed(frame.value):
            roles = _roles(frame, rows, key, value)
            if roles is None:
                continue
            found = _stage_views(frame, roles, summed, value_dim)
            if found is not None and not any(found[2].values()):
                return found
            fallback = found or fallback
    if fallback is None:
        raise Refused("FF204", frame.product, "no strided view of query, key and value has the canonical layout")
    return fallback


def _roles(frame: Frame, rows: tuple[Axis, ...], key: Stage, value: Stage) -> Roles | None:
    in_key, in_value = set(key.axes()), set(value.axes())
    only_query = [axis for axis in rows if axis not in in_key and axis not in in_value and axis in frame.query[0].axes()]
    batch = [axis for axis in rows if axis not in only_query]
    # the last query-only axis is the query position; those right before it and after all batch axes are a head group
    queries = tuple(only_query[-1:]) if only_query and rows[-1] is only_query[-1] else ()
    if only_query and not queries:
        return None
    tail: list[Axis] = []
    for axis in reversed(rows[: len(rows) - len(queries)]):
        if axis not in only_query:
            break
        tail.insert(0, axis)
    # query-only axes further to the front are batch axes that key and value are expanded over
    batch += [axis for axis in only_query if axis not in tail and axis not in queries]
    batch = [axis for axis in rows if axis in batch]
    return Roles(tuple(batch[:-1]), tuple(batch[-1:]), tuple(tail), queries, frame.query[0], key, value)


def _stage_views(
    frame: Frame, roles: Roles, summed: tuple[Axis, ...], value_dim: tuple[Axis, ...]
) -> tuple[Roles, dict[str, View], dict[str, bool]] | None:
    try:
        key_view = canonical_view(roles.key.index, (roles.batch, roles.kv_heads, frame.keys, summed))
        value_view = canonical_view(roles.value.index, (roles.batch, roles.kv_heads, frame.keys, value_dim))
    except LayoutError:
        return None
    copies = {
        "key": not is_viewable(roles.key, key_view),
        "value": not is_viewable(roles.value, value_view),
    }
    if (copies["key"] and roles.key is not frame.key[0]) or (copies["value"] and roles.value is not frame.value[0]):
        return None
    for query in reversed(frame.query):
        if query.dtype != roles.key.dtype and query is not frame.query[0]:
            continue
        try:
            view = canonical_view(query.index, (roles.batch, roles.heads, roles.queries, summed))
        except LayoutError:
            continue
        copied = not is_viewable(query, view)
        if copied and query is not frame.query[0]:
            continue
        chosen = Roles(roles.batch, roles.kv_heads, roles.group, roles.queries, query, roles.key, roles.value)
        views = {"query": view, "key": key_view, "value": value_view}
        return chosen, views, {**copies, "query": copied}
    return None


def check_layouts(frame: Frame, roles: Roles) -> None:
    """Refuse (FF203) a key whose head and key axes lie the other way round than the value's, if sizes cannot tell."""
    head, position = refined(roles.kv_heads), refined(frame.keys)
    if len(head) != 1 or len(position) != 1 or not axes.same_size(head[0].size, position[0].size):
        return
    orders = []
    for stages in (frame.key, frame.value):
        own = stages[-1].axes()
        if head[0] not in own or position[0] not in own:
            return
        orders.append(own.index(head[0]) < own.index(position[0]))
    if orders[0] != orders[1]:
        found = f"heads and keys are both {head[0].size} long; key has them in another order than value"
        raise Refused("FF203", frame.operands.right if frame.query_first else frame.operands.left, found)


# ------------------------------------------------------------------------------------------------ the whole reading


def read_softmax(anchor: fx.Node, requires_grad: Any) -> Match:
    """The attention around a softmax. `requires_grad(node)` tells whether a captured tensor needs a gradient.

    Raises Refused, or LayoutError where a view on the way has no named-axes meaning.
    """
    frame = read_frame(anchor)
    for _attempt in range(4):
        roles, views, copies = solve_roles(frame)
        lifter, score = _lift(frame, roles)
        again, _views, _copies = solve_roles(frame)
        if _same_axes(roles, again):
            break
    check_region(frame)
    check_layouts(frame, roles)
    spec = make_spec(lifter, score, frame, roles)
    check_gradients(spec, lifter, requires_grad)
    match = assemble(frame, roles, views, copies, lifter, spec)
    try:
        check_capabilities(match, frame, lifter)
    except Refused as refused:
        refused.safe_for_inductor = refused.safe_for_inductor or _inductor_reads_it_right(frame)
        raise
    return match


def _inductor_reads_it_right(frame: Frame) -> bool:
    """Inductor's own matcher takes any fill of `where` and `masked_fill` for -inf and mixes up dtypes."""
    choosing = any("where" in str(node.target) or "masked_fill" in str(node.target) for node in frame.carriers)
    return not choosing and len({frame.query[0].dtype, frame.key[0].dtype, frame.value[0].dtype}) == 1


def _same_axes(a: Roles, b: Roles) -> bool:
    names = ("batch", "kv_heads", "group", "queries")
    return all(refined(getattr(a, name)) == refined(getattr(b, name)) == getattr(a, name) for name in names)


def _lift(frame: Frame, roles: Roles) -> tuple[Lifter, Value]:
    positions = Positions({"b": roles.batch, "h": roles.heads, "m": roles.queries, "n": frame.keys})
    lifter = Lifter(positions, frame.product, frame.carriers)
    call = frame.operands

    def product_value(index: Index) -> Value:
        value = lifter.builder.leaf("score")
        for name, factor in (*roles.query.scales, *roles.key.scales):
            value = lifter.builder.op(name, value, lifter.as_kind(lifter.operand(factor, ()), Kind.FLOAT))
        if value_of(call.alpha) != 1:
            value = value * lifter.as_kind(lifter.operand(call.alpha, ()), Kind.FLOAT)
        if call.added is not None and value_of(call.beta) != 0:
            added = lifter.as_kind(lifter.operand(call.added, index), Kind.FLOAT)
            beta = value_of(call.beta)
            value = value + (added if beta == 1 else added * float(beta))
        return value

    lifter.score = product_value
    scores = frame.anchor.args[0]
    assert isinstance(scores, fx.Node)
    value = lifter.lift(scores, frame.score_index)
    for node in frame.path:
        if node.target is aten.dropout.default:
            lifter.check_dropout(bind(node, ROWS[node.target].reads))
    return lifter, value


def check_region(frame: Frame) -> None:
    """Refuse (FF301, FF302) if a value inside the region is used outside."""
    inside = {frame.product, *frame.carriers, frame.anchor, *frame.path}
    for node in inside:
        for user in node.users:
            if user in inside or user is frame.output or reads_only_metadata(user, node):
                continue
            after = node is frame.anchor or node in frame.path
            raise Refused("FF301" if after else "FF302", node, f"also used by {describe(user)}")


def make_spec(lifter: Lifter, score: Value, frame: Frame, roles: Roles) -> AttentionSpec:
    """The spec with its captures and what its empty rows give. Refuses (FF404) a scale over queries and keys."""
    _check_scales(lifter, score, frame)
    program = folded(lifter.builder.program(lifter.as_kind(score, Kind.FLOAT)))
    captures = tuple(
        Capture(_name(node, place), lifter.kind(node), len(shape(node)) if is_tensor(node) else 0)
        for place, node in enumerate(lifter.captures)
    )
    spec = AttentionSpec(program, captures, EmptyRows.EXACT)
    square = axes.same_size(
        axes.product([axis.size for axis in refined(roles.queries)]), axes.product([a.size for a in refined(frame.keys)])
    )
    return AttentionSpec(program, captures, empty_rows(spec, square=square))


def empty_rows(spec: AttentionSpec, *, square: bool) -> EmptyRows:
    kept = spec.split.kept
    lows = any(
        (s.op == "load" and s.kind is Kind.FLOAT)
        or (s.op == "const" and s.kind is Kind.FLOAT and float(s.attribute) <= LOW_SCORE)  # type: ignore[arg-type]
        for s in kept.statements
    )
    if lows or (spec.split.keep is not None and not rows_never_empty(spec.split.keep, square=square)):
        return EmptyRows.EXACT
    return EmptyRows.IMPOSSIBLE


def _check_scales(lifter: Lifter, score: Value, frame: Frame) -> None:
    program = lifter.builder.program(score)
    full = {"m", "n"}
    for statement in program.statements:
        if statement.op not in ("mul", "div"):
            continue
        for operand in statement.operands:
            load = program.statements[operand]
            letters = {str(program.statements[i].attribute) for i in load.operands if program.statements[i].op == "index"}
            others = [o for o in statement.operands if o != operand]
            if load.op == "load" and full <= letters and any(_has_score(program, o) for o in others):
                raise Refused("FF404", frame.product, f"the scores are multiplied by {load.op}[{load.attribute}] over m, n")


def _has_score(program: Any, number: int) -> bool:
    statement = program.statements[number]
    return statement.op == "score" or any(_has_score(program, operand) for operand in statement.operands)


def _name(node: fx.Node, place: int) -> str:
    del node
    return f"c{place}"


def check_gradients(spec: AttentionSpec, lifter: Lifter, requires_grad: Any) -> None:
    """Refuse (FF405) a capture that needs a gradient and is not read plainly."""
    for place, node in enumerate(lifter.captures):
        if spec.captures[place].kind is Kind.FLOAT and requires_grad(node) and plain_load_letters(spec, place) is None:
            raise Refused("FF405", node, "needs a gradient and is read at computed positions")


def assemble(
    frame: Frame, roles: Roles, views: dict[str, View], copies: dict[str, bool], lifter: Lifter, spec: AttentionSpec
) -> Match:
    product_dtype, out_dtype = frame.score_dtype, value_of(frame.output).dtype
    # under autocast the operands as given differ from the product in dtype: cast them as the product would
    autocast = {frame.query[0].dtype, frame.key[0].dtype} != {product_dtype}
    cast = product_dtype if autocast or roles.query.dtype != roles.key.dtype else None
    inputs = {
        "query": Input(roles.query.node, views["query"], cast, copies["query"]),
        "key": Input(roles.key.node, views["key"], cast, copies["key"]),
        "value": Input(roles.value.node, views["value"],
                       out_dtype if roles.value.dtype != out_dtype else None, copies["value"]),
    }  # fmt: skip
    value_dim = tuple(a for a in roles.value.axes() if a not in (*roles.batch, *roles.kv_heads, *refined(frame.keys)))
    layout, out_view = out_layout(frame, roles, value_dim)
    return Match(
        frame.anchor, frame.output, spec, inputs["query"], inputs["key"], inputs["value"],
        tuple(Input(node) for node in lifter.captures), tuple(lifter.sizes), out_view, layout,
        frozenset({frame.product, *frame.carriers, frame.anchor, *frame.path}),
        dims=_dims(views["query"], views["key"], views["value"]),
    )  # fmt: skip


def _dims(query: View, key: View, value: View) -> dict[str, Any]:
    b, h, m, d = query.merge
    _b, g, n, e = (*key.merge[:3], value.merge[3])
    return {"B": b, "H": h, "G": g, "M": m, "N": n, "D": d, "E": e}


def out_layout(frame: Frame, roles: Roles, value_dim: tuple[Axis, ...]) -> tuple[str, View]:
    """In which order the op should lay out its result, and the view from there to the output's own dimensions."""
    canonical = (*roles.batch, *roles.heads, *roles.queries, *value_dim)
    own = [axis for dim in frame.out_index for axis in refined(dim)]  # type: ignore[arg-type]
    if set(own) != set(canonical):
        raise Refused("FF204", frame.output, "the output lacks an axis of the scores")
    view = View(
        split=tuple(axis.size for axis in canonical),
        order=tuple(canonical.index(axis) for axis in own),
        insert=(),
        expand=tuple(-1 for _ in own),
        merge=shape(frame.output),
    )
    heads_first = not (roles.heads and roles.queries) or own.index(roles.heads[-1]) < own.index(roles.queries[0])
    return ("bhme" if heads_first and not _is_transposed_at_once(frame.output) else "bmhe"), view


def _is_transposed_at_once(output: fx.Node) -> bool:
    """Whether every user swaps heads and queries and then copies: then that copy can be saved."""
    if len(shape(output)) != 4 or not output.users:
        return False
    for user in output.users:
        swaps = (user.target is aten.transpose.int and {d % 4 for d in user.args[1:3]} == {1, 2}) or (  # type: ignore[operator]
            user.target is aten.permute.default and list(user.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
        )
        if not swaps or not user.users or any(u.target not in _COPIES for u in user.users):
            return False
    return True


_COPIES = frozenset({aten.contiguous.default, aten.reshape.default, aten.clone.default, aten.flatten.using_ints})


def check_capabilities(match: Match, frame: Frame, lifter: Lifter) -> None:
    """Refuse what is understood but has no kernel: FF206 to FF208, FF406."""
    dtypes = {value_of(side.node).dtype if side.cast is None else side.cast for side in (match.query, match.key)}
    dtypes.add(value_of(frame.output).dtype)
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise Refused("FF206", frame.product, f"computed in {str(dtype).removeprefix('torch.')}")
    for letter in ("D", "E"):
        size = match.dims[letter]  # a symbolic one is checked by the op at run time
        if isinstance(size, int) and not 1 <= size <= MAX_HEAD_DIM:
            raise Refused("FF207", frame.product, f"head dim {size}")
    device = value_of(frame.output).device.type
    if device not in ("cuda", "cpu"):
        raise Refused("FF208", frame.product, f"device {device}")
    if lifter.dropout is not None:
        raise Refused("FF406", lifter.dropout, f"p={lifter.dropout.args[1]}")
