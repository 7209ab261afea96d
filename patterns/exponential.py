"""The logarithm of `exp(x)`, possibly with elements set to zero: what a softmax written by hand is a softmax of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.patterns.axes import Index
from flashfuse.patterns.calls import Call, bind, is_tensor, value_of
from flashfuse.patterns.score_cone import Lifter
from flashfuse.patterns.spellings import CASTS, ROWS
from flashfuse.patterns.user_code import describe
from flashfuse.refusal import Refused

aten = torch.ops.aten
_FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_CHOICES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_KEEPING = CASTS | _FILLS | _CHOICES | {aten.mul.Tensor, aten.clone.default}


def exponent(node: fx.Node) -> fx.Node | None:
    """`x` of a tensor `exp(x)` of which only elements may have been set to zero or cast; None if it is none."""
    nodes = exponential_nodes(node)
    return nodes[-1].args[0] if nodes else None  # type: ignore[return-value]


def exponential_nodes(node: fx.Node, most: int = 6) -> tuple[fx.Node, ...]:
    """The nodes from a tensor of exponentials up to `exp` itself, both included; empty if it is none."""
    if node.target is aten.exp.default:
        return (node,)
    if node.op != "call_function" or node.target not in _KEEPING or most == 0:
        return ()
    for argument in node.args:
        if is_tensor(argument) and value_of(argument).dtype.is_floating_point:
            inner = exponential_nodes(argument, most - 1)  # type: ignore[arg-type]
            if inner:
                return (node, *inner)
    return ()


def logarithm(lifter: Lifter, node: fx.Node, index: Index) -> Value:
    """The element of log(node); -inf where an element was set to zero. Refuses (FF402) anything but zero."""
    if node.target is aten.exp.default:
        return lifter.lift(node.args[0], index)  # type: ignore[arg-type]
    row = ROWS[node.target]
    call = bind(node, row.reads)
    if node.target in _FILLS:
        return _chosen(lifter, call, index, call["mask"], call["value"], call["self"])
    if node.target in _CHOICES:
        return _chosen(lifter, call, index, call["condition"], call["self"], call["other"])
    inner = exponential_nodes(node)[1]
    if node.target is not aten.mul.Tensor:
        return logarithm(lifter, inner, index)
    factor = lifter.operand(call["other"] if inner is call["self"] else call["self"], index)
    keep = _predicate(factor)
    if keep is None:
        raise Refused("FF402", node, "exponentials times a tensor that is not known to be 0 or 1")
    return lifter.builder.op("where", keep, logarithm(lifter, inner, index), float("-inf"))


def _chosen(lifter: Lifter, call: Call, index: Index, condition: Any, first: Any, second: Any) -> Value:
    branches = []
    for branch in (first, second):
        if is_tensor(branch) and exponent(branch) is not None:
            branches.append(logarithm(lifter, branch, index))
            continue
        if lifter.operand(branch, index).constant != 0:
            raise Refused("FF402", call.node, f"{describe(call.node)} puts something else than zero among exponentials")
        branches.append(lifter.builder.const(float("-inf")))
    return lifter.builder.op("where", lifter.as_bool(lifter.operand(condition, index)), *branches)


def _predicate(factor: Value) -> Value | None:
    """A 0-or-1 factor as a predicate."""
    if factor.kind is Kind.BOOL:
        return factor
    if factor.statement.op != "where":
        return None
    condition, a, b = factor.operands
    if (a.constant, b.constant) == (1, 0):
        return condition
    return factor.apply("not", condition) if (a.constant, b.constant) == (0, 1) else None
