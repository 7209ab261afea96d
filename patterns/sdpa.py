"""`F.scaled_dot_product_attention` itself: its arguments as a spec.

Its empty rows give zero. Without a mask PyTorch's own kernels are hard to beat, so such a call is normally left to them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.scales import folded
from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.patterns import axes, contraction
from flashfuse.patterns.attention import Match, assemble, check_capabilities, check_gradients, declared
from flashfuse.patterns.calls import Call, bind, shape, value_of
from flashfuse.patterns.frame import Frame
from flashfuse.patterns.gradient_flow import GradientFlow
from flashfuse.patterns.operands import peel
from flashfuse.patterns.positions import Positions
from flashfuse.patterns.roles import Roles, solve_roles
from flashfuse.patterns.score_cone import Lifter
from flashfuse.patterns.weights import weight_program, with_dropout
from flashfuse.refusal import Refused

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_READS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def read_sdpa(anchor: fx.Node, flow: GradientFlow, *, always: bool) -> Match:
    """The attention that a call of SDPA is. Refuses FF102 where PyTorch's own kernel should run, unless `always`."""
    call = bind(anchor, _READS)
    if call["attn_mask"] is None and not always:
        raise Refused("FF102", anchor, "no attn_mask")
    frame = _frame(call, flow)
    roles, views, copies = solve_roles(frame)
    lifter, spec = _spec(call, frame, roles, flow)
    reads_scores = any({"m", "n"} <= _letters(spec, place) for place in range(len(spec.captures)))
    if reads_scores and not always:
        raise Refused("FF102", anchor, "attn_mask is a tensor over queries and keys")
    if any(capture.kind is Kind.FLOAT for capture in spec.captures):
        # rows that are -inf throughout give zero here, which no row semantics of ours expresses for data
        raise Refused("FF102", anchor, "attn_mask holds floats, which may be -inf for a whole row")
    check_gradients(spec, lifter, flow)
    match = assemble(frame, roles, views, copies, lifter, spec)
    check_capabilities(match, frame, lifter)
    return match


def _frame(call: Call, flow: GradientFlow) -> Frame:
    anchor = call.node
    query, key, value = call["query"], call["key"], call["value"]
    out_index = tuple(axes.fresh(f"o{place}_", size) for place, size in enumerate(shape(anchor)))
    batch, m, e = out_index[:-2], out_index[-2], out_index[-1]
    n, d = axes.fresh("n", shape(key)[-2]), axes.fresh("d", shape(query)[-1])
    kv_batch = [_kv_batch(call, batch, shape(operand)[:-2]) for operand in (key, value)]
    query_index = (*axes.broadcast(batch, shape(query)[:-2]), m, d)
    key_index, value_index = (*kv_batch[0], n, d), (*kv_batch[1], n, e)
    return Frame(
        None, anchor, anchor, (), (), frozenset(), False, anchor, frozenset(), out_index, rows=(*batch, m), keys=n,
        query=tuple(peel(query, query_index, flow, linear=True)),
        key=tuple(peel(key, key_index, flow, linear=True)),
        value=tuple(peel(value, value_index, flow, linear=False)),
        scores=anchor, sink=None, score_index=(*batch, m, n), shifts={},
        operands=contraction.Operands(query, key, query_index, key_index, d),
        query_first=True, score_dtype=value_of(anchor).dtype,
    )  # fmt: skip


def _kv_batch(call: Call, batch: axes.Index, sizes: tuple[Any, ...]) -> axes.Index:
    if not call["enable_gqa"] or axes.same_size(shape(call["query"])[-3], sizes[-1]):
        return axes.broadcast(batch, sizes)
    heads = shape(call["query"])[-3]
    major, _minor = axes.reshape((batch[-1],), (heads,), (sizes[-1], heads // sizes[-1]))
    return (*axes.broadcast(batch[:-1], sizes[:-1]), major)


def _spec(call: Call, frame: Frame, roles: Roles, flow: GradientFlow) -> tuple[Lifter, AttentionSpec]:
    positions = Positions({"b": roles.batch, "h": roles.heads, "m": roles.queries, "n": frame.keys})
    lifter = Lifter(positions, call.node, frozenset(), flow)
    builder = lifter.builder
    score = builder.leaf("score")
    for name, factor in (*roles.query.scales, *roles.key.scales):
        score = builder.op(name, score, lifter.as_kind(lifter.operand(factor, ()), Kind.FLOAT))
    score = score * _scale(call, lifter)
    if call["is_causal"]:
        seen = builder.leaf("index", "n") <= builder.leaf("index", "m")
        score = builder.op("where", seen, score, float("-inf"))
    mask = call["attn_mask"]
    if mask is not None:
        value = lifter.operand(mask, frame.score_index)
        score = builder.op("where", value, score, float("-inf")) if value.kind is Kind.BOOL else score + value
    weight = with_dropout(lifter, (call.node,), call.node, builder.leaf("probability"), call["dropout_p"], frame.score_index)
    captures = declared(lifter)
    program = folded(builder.program(score))
    weighed = weight_program(weight) if weight.statement.op != "probability" else None
    spec = AttentionSpec(program, captures, EmptyRows.ZERO, weighed)
    finite = spec.split.keep is None or spec.split.fill == float("-inf")
    return lifter, spec if finite else AttentionSpec(program, captures, EmptyRows.EXACT, weighed)


def _scale(call: Call, lifter: Lifter) -> Value:
    """`scale`, or 1 / sqrt(head_dim)."""
    if call["scale"] is not None:
        return lifter.as_kind(lifter.operand(call["scale"], ()), Kind.FLOAT)
    head_dim = lifter.size(shape(call["query"])[-1])
    if head_dim.constant is not None:
        return lifter.builder.const(1.0 / math.sqrt(head_dim.constant))
    return lifter.builder.op("rsqrt", lifter.as_kind(head_dim, Kind.FLOAT))


def _letters(spec: AttentionSpec, capture: int) -> set[str]:
    return {
        letter
        for number, statement in enumerate(spec.score.statements)
        if statement.op == "load" and statement.attribute == capture
        for letter in index_letters(spec.score, number)
    }
