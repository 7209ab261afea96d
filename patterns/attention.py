"""Reading one softmax: the frame, the roles and the score program together give a `Match`, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from flashfuse.ir.attention_spec import MAX_HEAD_DIM, MAX_HEAD_DIM_FLOAT32, AttentionSpec, Capture, EmptyRows, plain_load_letters
from flashfuse.ir.scales import folded
from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.patterns import axes
from flashfuse.patterns.axes import Index, refined
from flashfuse.patterns.calls import value_of
from flashfuse.patterns.captured import Diagonals
from flashfuse.patterns.empty_rows import empty_rows
from flashfuse.patterns.exponential import logarithm
from flashfuse.patterns.frame import Frame, read_frame
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.operands import View, canonical_view
from flashfuse.patterns.output_layout import out_layout
from flashfuse.patterns.positions import Positions
from flashfuse.patterns.roles import Roles, check_layouts, solve_roles
from flashfuse.patterns.row_statistics import Statistic, find_statistic
from flashfuse.patterns.score_cone import Lifter
from flashfuse.patterns.sinks import lift_sink, sink_program
from flashfuse.patterns.softmax import Softmax
from flashfuse.patterns.sums import Edge
from flashfuse.patterns.user_code import describe
from flashfuse.patterns.ways import Way
from flashfuse.patterns.weights import check_dropout_is_private, lift_weight, weight_program, with_dropout
from flashfuse.refusal import Refused

aten = torch.ops.aten
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Input:
    """One tensor of the call: the normal form's node, the view to canonical form, and a cast to make first.

    `seed`: a seed to be drawn in the place of the random numbers that the node draws. `more`: what is joined to it along the
    last dimension. `diagonals`: the node's elements by the distance n - m.
    """

    node: fx.Node
    view: View | None = None
    cast: torch.dtype | None = None
    copy: bool = False
    seed: bool = False
    more: tuple[Input, ...] = ()
    diagonals: Diagonals | None = None


@dataclass(frozen=True)
class OutputFactor:
    """A tensor that an output `[B, H, M, E]` is multiplied (`name` "mul") or divided by; `view` gives it four dimensions."""

    name: str
    node: fx.Node
    view: View


@dataclass
class Match:
    """An attention: `output` (in the normal form) may be replaced by the spec's op on these inputs.

    `anchor` holds the probabilities and `product` the raw scores, in the original code.

    `out_view` leads from the op's [B, H, M, E] result, in memory in the order of `layout`, to the output's own dimensions;
    `out_order`: the order in memory in which they are to be copied, if no layout of the op is eager's.

    `edges`: the sums between the softmax and the product. Then the output is the sum of several attentions, `terms`, of which
    this is one: its own result times `scale` and `factors`.

    `statistic`: the logsumexp of the same scores, if the graph takes it.
    """

    anchor: fx.Node
    product: fx.Node
    output: fx.Node
    spec: AttentionSpec
    query: Input
    key: Input
    value: Input
    captures: tuple[Input, ...]
    sizes: tuple[Any, ...]
    out_view: View
    layout: str
    out_order: tuple[int, ...] | None = None
    dims: dict[str, Any] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    factors: tuple[OutputFactor, ...] = ()
    statistic: Statistic | None = None
    terms: tuple[Match, ...] = field(default=(), repr=False, compare=False)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All tensors that the op reads, seeds left out."""
        sides = (self.query, *self.query.more, self.key, *self.key.more, self.value)
        return (*sides, *(each for each in self.captures if not each.seed))

    @property
    def scale(self) -> float:
        """The number that this term of a sum is multiplied by."""
        return math.prod(edge.scale for edge in self.edges)


def read_softmax(softmax: Softmax, way: Way, flow: GradientFlow) -> Match:
    """The attention around a softmax on its way to one output.

    Raises Refused, or LayoutError where a view on the way has no named-axes meaning.
    """
    frame = read_frame(softmax, way, flow, join=True)
    if not frame.more:
        return _read_frame(frame, flow)
    try:
        return _read_frame(frame, flow)
    except (Refused, axes.LayoutError):  # one product, then, and the others as captured tensors
        return _read_frame(read_frame(softmax, way, flow), flow)


def _read_frame(frame: Frame, flow: GradientFlow) -> Match:
    for _attempt in range(4):
        roles, views, copies = solve_roles(frame)
        lifter, score, sink, weight = _lift(frame, roles, flow)
        again, _views, _copies = solve_roles(frame)
        if _same_axes(roles, again):
            break
    check_region(frame, flow)
    check_layouts(frame, roles)
    check_dropout_is_private(lifter, frame)
    spec = make_spec(lifter, (score, sink, weight), frame, roles)
    check_gradients(spec, lifter, flow)
    statistic = find_statistic(frame, roles, spec, flow)
    match = assemble(frame, roles, views, copies, lifter, replace(spec, logsumexp=statistic is not None))
    match.statistic = statistic
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


def _lift(frame: Frame, roles: Roles, flow: GradientFlow) -> tuple[Lifter, Value, Value | None, Value | None]:
    """The final score, the sink and the weighted probability (None where there is none) as values of one lifter."""
    positions = Positions({"b": roles.batch, "h": roles.heads, "m": roles.queries, "n": frame.keys})
    lifter = Lifter(positions, frame.product, frame.carriers, flow, frame.shifts)
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
    lifter.dropped = partial(with_dropout, lifter, frame.path)
    assert frame.softmax is not None
    lift = partial(logarithm, lifter) if frame.softmax.exponential else lifter.lift
    value = lift(frame.scores, frame.score_index)
    return lifter, value, lift_sink(lifter, frame.sink), lift_weight(lifter, frame)


def check_region(frame: Frame, flow: GradientFlow) -> None:
    """Refuse (FF408) a region with a value that stops the gradient."""
    assert frame.softmax is not None
    joining = () if frame.sink is None else frame.sink.nodes
    around = (*frame.carriers, *joining, *frame.softmax.inside, frame.softmax.anchor, *frame.path)
    for node in (frame.product, *around, frame.output):
        if flow.stops_at(node):
            raise Refused("FF408", node, f"the gradient stops at {describe(node)}")


def make_spec(
    lifter: Lifter, values: tuple[Value, Value | None, Value | None], frame: Frame, roles: Roles
) -> AttentionSpec:
    """The spec with its captures and what its empty rows give."""
    score, sink, weight = values
    program = folded(lifter.builder.program(lifter.as_kind(score, Kind.FLOAT)))
    weighted, sinking = weight_program(weight), sink_program(sink)
    program, weighted, sinking = _with_captures_that_are_read(lifter, program, weighted, sinking)
    captures = declared(lifter)
    narrow = value_of(frame.output).dtype in (torch.float16, torch.bfloat16)
    spec = AttentionSpec(
        program, captures, EmptyRows.EXACT, weighted, sinking, wide=bool(frame.edges) and narrow
    )
    square = axes.same_size(
        axes.product([axis.size for axis in refined(roles.queries)]),
        axes.product([a.size for a in refined(frame.keys)]),
    )
    return replace(spec, empty_rows=empty_rows(spec, frame, square=square))


def _with_captures_that_are_read(
    lifter: Lifter, score: ScoreProgram, *others: ScoreProgram | None
) -> tuple[ScoreProgram, ScoreProgram | None, ScoreProgram | None]:
    """The programs once captures are gone that none reads any more: a choice may have folded to its other side."""
    programs = (score, *others)
    used = sorted({place for each in programs if each is not None for place in each.loads()})
    lifter.captures = [lifter.captures[place] for place in used]
    first, second, third = (None if each is None else each.with_only(used) for each in programs)
    assert first is not None
    return first, second, third


def declared(lifter: Lifter) -> tuple[Capture, ...]:
    """The declarations of the captured tensors."""
    return tuple(
        Capture(f"c{place}", Kind.INT if each.seed else lifter.kind(each.node), each.rank)
        for place, each in enumerate(lifter.captures)
    )


def check_gradients(spec: AttentionSpec, lifter: Lifter, flow: GradientFlow) -> None:
    """Refuse (FF405) a capture that needs a gradient and is not read plainly."""
    for place, each in enumerate(lifter.captures):
        needed = spec.captures[place].kind is Kind.FLOAT and flow.needed(each.node)
        if needed and plain_load_letters(spec, place) is None:
            raise Refused("FF405", each.node, "needs a gradient and is read at computed positions, or in two ways")


def assemble(
    frame: Frame, roles: Roles, views: dict[str, View], copies: dict[str, bool], lifter: Lifter, spec: AttentionSpec
) -> Match:
    product_dtype, out_dtype = frame.score_dtype, value_of(frame.output).dtype
    # under autocast the operands as given differ from the product in dtype: cast them as the product would
    given = {frame.query[0].dtype, frame.key[0].dtype, *(side.dtype for part in frame.more for side in (part.query, part.key))}
    autocast = given != {product_dtype}
    cast = product_dtype if autocast or roles.query.dtype != roles.key.dtype else None
    more_query, more_key = _joined_inputs(frame, roles, cast)
    inputs = {
        "query": Input(roles.query.node, views["query"], cast, copies["query"], more=more_query),
        "key": Input(roles.key.node, views["key"], cast, copies["key"], more=more_key),
        "value": Input(roles.value.node, views["value"],
                       out_dtype if roles.value.dtype != out_dtype else None, copies["value"]),
    }  # fmt: skip
    value_dim = tuple(a for a in roles.value.axes() if a not in (*roles.batch, *roles.kv_heads, *refined(frame.keys)))
    layout, out_view, out_order = out_layout(frame, roles, value_dim)
    anchor = frame.output if frame.softmax is None else frame.softmax.anchor
    return Match(
        anchor, frame.product, frame.output, spec, inputs["query"], inputs["key"], inputs["value"],
        tuple(Input(c.node, c.view, seed=c.seed, diagonals=c.diagonals) for c in lifter.captures),
        tuple(lifter.sizes), out_view, layout, out_order,
        dims=_dims(views["query"], views["key"], views["value"], more_query), edges=frame.edges,
        factors=tuple(OutputFactor(f.name, f.tensor, lifter.positions.canonical(f.index)[0]) for f in frame.factors),
    )  # fmt: skip


def _joined_inputs(frame: Frame, roles: Roles, cast: torch.dtype | None) -> tuple[tuple[Input, ...], tuple[Input, ...]]:
    """The queries and keys of further products. Raises LayoutError if one has an axis that the first does not have so."""
    queries, keys = [], []
    for part in frame.more:
        summed = refined(part.summed)
        query = canonical_view(part.query.index, (roles.batch, roles.heads, roles.queries, summed))
        key = canonical_view(part.key.index, (roles.batch, roles.kv_heads, frame.keys, summed))
        queries.append(Input(part.query.node, query, cast, copy=True))
        keys.append(Input(part.key.node, key, cast, copy=True))
    return tuple(queries), tuple(keys)


def _dims(query: View, key: View, value: View, more: tuple[Input, ...]) -> dict[str, Any]:
    b, h, m, d = query.merge
    d = d + sum(side.view.merge[3] for side in more if side.view is not None)
    _b, g, n, e = (*key.merge[:3], value.merge[3])
    return {"B": b, "H": h, "G": g, "M": m, "N": n, "D": d, "E": e}


def check_capabilities(match: Match, frame: Frame, lifter: Lifter) -> None:
    """Refuse what is understood but has no kernel: FF206 to FF208."""
    dtypes = {value_of(side.node).dtype if side.cast is None else side.cast for side in (match.query, match.key)}
    dtypes.add(value_of(frame.output).dtype)
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise Refused("FF206", frame.product, f"computed in {str(dtype).removeprefix('torch.')}")
    device = value_of(frame.output).device.type
    for letter in ("D", "E"):
        size = match.dims[letter]  # a symbolic one is checked by the op at run time
        if isinstance(size, int) and not 1 <= size <= MAX_HEAD_DIM:
            raise Refused("FF207", frame.product, f"head dim {size}")
        if isinstance(size, int) and size > MAX_HEAD_DIM_FLOAT32 and device == "cuda" and torch.float32 in dtypes:
            raise Refused("FF207", frame.product, f"head dim {size} in float32")
    if device not in ("cuda", "cpu"):
        raise Refused("FF208", frame.product, f"device {device}")


def check_seeds(terms: Sequence[Match]) -> None:
    """Refuse (FF401) terms of a sum that share random numbers but count elements differently."""
    drawn = [{side.node for side in term.captures if side.seed} for term in terms]
    for place, term in enumerate(terms):
        for other, own in zip(terms[:place], drawn, strict=False):
            if not own & drawn[place]:
                continue
            sizes = [axes.same_size(term.dims[letter], other.dims[letter]) for letter in "BHMN"]
            if not all(sizes) or (term.out_view.split, term.out_view.order) != (other.out_view.split, other.out_view.order):
                raise Refused("FF401", term.output, "dropout of a sum whose terms lie differently in memory")
