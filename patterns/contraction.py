"""Products of two tensors: which index of each operand an element of the result sums over. One row a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Dim, Index
from flashfuse.patterns.calls import Call, bind, is_tensor, shape
from flashfuse.refusal import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """`result[index] = alpha * sum over `summed` of left[left_index] * right[right_index] + beta * added[index]`."""

    left: fx.Node
    right: fx.Node
    left_index: Index
    right_index: Index
    summed: tuple[Axis, ...]
    alpha: Any = 1
    beta: Any = 0
    added: fx.Node | None = None


@dataclass(frozen=True)
class Row:
    """A product's target, the arguments that its row reads, which of them are the factors, and its index map."""

    target: Any
    reads: tuple[str, ...]
    factors: Callable[[Call], tuple[Any, Any]]
    operands: Callable[[Call, Index, str], Operands]


def _matmul(left: str, right: str) -> Callable[[Call, Index, str], Operands]:
    def operands(call: Call, index: Index, name: str) -> Operands:
        a, b = call[left], call[right]
        if len(shape(a)) < 2 or len(shape(b)) < 2:
            raise Refused("FF204", call.node, "a product with a vector")
        summed = axes.fresh(name, shape(a)[-1])
        batch = index[:-2]
        return Operands(
            a, b,
            (*axes.broadcast(batch, shape(a)[:-2]), index[-2], summed),
            (*axes.broadcast(batch, shape(b)[:-2]), summed, index[-1]),
            summed,
        )  # fmt: skip

    return operands


def _baddbmm(call: Call, index: Index, name: str) -> Operands:
    plain = _matmul(*(("batch1", "batch2") if "batch1" in call.arguments else ("mat1", "mat2")))(call, index, name)
    return Operands(
        plain.left, plain.right, plain.left_index, plain.right_index, plain.summed,
        alpha=call["alpha"], beta=call["beta"], added=call["self"],
    )  # fmt: skip


def _einsum(call: Call, index: Index, name: str) -> Operands:
    a, b = call["tensors"]
    left, right, result = _letters(call)
    sizes: dict[str, Any] = {}
    for letters, operand in ((left, a), (right, b)):
        for letter, size in zip(letters, shape(operand), strict=True):
            if letter not in sizes or axes.is_one(sizes[letter]):
                sizes[letter] = size
    dims: dict[str, Dim] = dict(zip(result, index, strict=True))
    summed: list[Axis] = []
    for letter in sizes:
        if letter in dims:
            continue
        if letter not in left or letter not in right:
            raise Refused("FF402", call.node, f"einsum {call['equation']!r} sums one operand alone")
        dims[letter] = axes.fresh(name, sizes[letter])
        summed.extend(dims[letter])  # type: ignore[arg-type]
    left_index = axes.broadcast(tuple(dims[letter] for letter in left), shape(a))
    right_index = axes.broadcast(tuple(dims[letter] for letter in right), shape(b))
    return Operands(a, b, left_index, right_index, tuple(summed))


def _letters(call: Call) -> tuple[str, str, str]:
    """Letters of both operands and the result, ellipses replaced by capital letters that the equation does not use."""
    equation = call["equation"].replace(" ", "")
    if "->" in equation:
        inputs, result = equation.split("->")
    else:
        inputs = equation
        result = "".join(sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1))
        result = ("..." if "..." in inputs else "") + result
    left, right = inputs.split(",")
    ranks = [len(shape(tensor)) for tensor in call["tensors"]]
    counts = [rank - len(letters.replace("...", "")) for letters, rank in zip((left, right), ranks, strict=True)]
    unused = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in equation]
    most = max([count for letters, count in zip((left, right), counts, strict=True) if "..." in letters], default=0)
    batch = "".join(unused[:most])
    left = left.replace("...", batch[most - counts[0] :] if "..." in left else "")
    right = right.replace("...", batch[most - counts[1] :] if "..." in right else "")
    result = result.replace("...", batch)
    for letters in (left, right, result):
        if len(set(letters)) != len(letters):
            raise Refused("FF402", call.node, f"einsum {equation!r} repeats a letter within one tensor")
    return left, right, result


_ROWS = (
    Row(aten.matmul.default, ("self", "other"), lambda c: (c["self"], c["other"]), _matmul("self", "other")),
    Row(aten.mm.default, ("self", "mat2"), lambda c: (c["self"], c["mat2"]), _matmul("self", "mat2")),
    Row(aten.bmm.default, ("self", "mat2"), lambda c: (c["self"], c["mat2"]), _matmul("self", "mat2")),
    Row(aten.baddbmm.default, ("self", "batch1", "batch2", "alpha", "beta"),
        lambda c: (c["batch1"], c["batch2"]), _baddbmm),
    Row(aten.addmm.default, ("self", "mat1", "mat2", "alpha", "beta"), lambda c: (c["mat1"], c["mat2"]), _baddbmm),
    Row(aten.einsum.default, ("equation", "tensors", "path"), lambda c: tuple(c["tensors"]), _einsum),
)  # fmt: skip

PRODUCTS: dict[Any, Row] = {row.target: row for row in _ROWS}


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of exactly two tensors, in any spelling."""
    row = PRODUCTS.get(node.target)
    if row is None:
        return False
    factors = row.factors(bind(node, row.reads))
    return len(factors) == 2 and all(is_tensor(factor) for factor in factors)


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two tensors that a product multiplies."""
    row = PRODUCTS[node.target]
    left, right = row.factors(bind(node, row.reads))
    return left, right


def operands(node: fx.Node, index: Index, name: str) -> Operands:
    """The operands of one element of a product; `name` names the summed axis."""
    row = PRODUCTS[node.target]
    return row.operands(bind(node, row.reads), index, name)
