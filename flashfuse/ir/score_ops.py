"""The table of score operations: one row holds all that is known of one operation.

A row says what the operation computes (`torch`, for `evaluate` and the CPU path), how a kernel writes it
(`triton`, a template over the operands' names), what its derivative is (`grad`) and how it moves intervals
(`interval`). `grad` and `interval` are written over anything with arithmetic: a builder's `Value` when a program is
differentiated, a sympy symbol when a test proves the row.

To add an operation: add one row. Nothing else in the project lists operations by name to decide what they mean.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashfuse.ir.philox import random_bits


class Kind(enum.Enum):
    """What a value of a score program is inside a kernel."""

    FLOAT = "float"  # float32 in kernels, whatever precision the caller evaluates in on the CPU
    INT = "int"
    BOOL = "bool"


@dataclass(frozen=True)
class ScoreOp:
    """One elementwise operation of the score program.

    `result` is the kind of the result, or None where it is the operands' common kind.
    `grad(g, out, *operands)` gives the gradient of each operand (None: no gradient flows there).
    `interval(*intervals)` maps the operands' (low, high) pairs to the result's; for BOOL, low is "certainly" and
    high is "possibly".
    """

    name: str
    arity: int
    triton: str
    torch: Callable[..., Any]
    operands: tuple[Kind | None, ...]
    result: Kind | None = None
    grad: Callable[..., tuple[Any, ...]] | None = None
    interval: Callable[..., tuple[Any, Any]] | None = None
    infix: str | None = None  # how people write it, for reports


class Maths:
    """Functions that rows need beyond operators. A test swaps in sympy's; programs use `Value`'s methods."""

    @staticmethod
    def call(name: str, *operands: Any) -> Any:
        """`name` applied to operands, at least one of which knows how to apply rows (a `Value`)."""
        carrier = next(operand for operand in operands if hasattr(operand, "apply"))
        return carrier.apply(name, *operands)


def _min(*values: Any) -> Any:
    low = values[0]
    for value in values[1:]:
        low = Maths.call("minimum", low, value)
    return low


def _max(*values: Any) -> Any:
    high = values[0]
    for value in values[1:]:
        high = Maths.call("maximum", high, value)
    return high


def _where(condition: Any, a: Any, b: Any) -> Any:
    return Maths.call("where", condition, a, b)


def _not(a: Any) -> Any:
    return Maths.call("not", a)


def _mul_interval(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    products = (a[0] * b[0], a[0] * b[1], a[1] * b[0], a[1] * b[1])
    return _min(*products), _max(*products)


def _monotone(name: str) -> Callable[..., tuple[Any, Any]]:
    return lambda a: (Maths.call(name, a[0]), Maths.call(name, a[1]))


def _abs_interval(a: tuple[Any, Any]) -> tuple[Any, Any]:
    return _max(a[0], -a[1], 0), _max(-a[0], a[1])


def _eq_interval(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    certain = a[0].eq(a[1]) & b[0].eq(b[1]) & a[0].eq(b[0])
    possible = (a[0] <= b[1]) & (b[0] <= a[1])
    return certain, possible


def _ne_interval(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    certain, possible = _eq_interval(a, b)
    return _not(possible), _not(certain)


def _where_interval(c: tuple[Any, Any], a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    low = _where(c[0], a[0], _where(c[1], _min(a[0], b[0]), b[0]))
    high = _where(c[0], a[1], _where(c[1], _max(a[1], b[1]), b[1]))
    return low, high


def _where_bool_interval(c: tuple[Any, Any], a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    certain = (c[0] & a[0]) | (_not(c[1]) & b[0]) | (a[0] & b[0])
    possible = (c[1] & a[1]) | (_not(c[0]) & b[1])
    return certain, possible


F, I, Bo = Kind.FLOAT, Kind.INT, Kind.BOOL  # noqa: E741

# One line a row where it fits. `operands` None: any kind, but all Nones of a row must agree.
_ROWS = (
    # arithmetic
    ScoreOp("add", 2, "{0} + {1}", torch.add, (None, None), infix="{0} + {1}",
            grad=lambda g, out, a, b: (g, g),
            interval=lambda a, b: (a[0] + b[0], a[1] + b[1])),
    ScoreOp("sub", 2, "{0} - {1}", torch.sub, (None, None), infix="{0} - {1}",
            grad=lambda g, out, a, b: (g, -g),
            interval=lambda a, b: (a[0] - b[1], a[1] - b[0])),
    ScoreOp("mul", 2, "{0} * {1}", torch.mul, (None, None), infix="{0} * {1}",
            grad=lambda g, out, a, b: (g * b, g * a),
            interval=_mul_interval),
    ScoreOp("div", 2, "{0} / {1}", torch.div, (F, F), infix="{0} / {1}",
            grad=lambda g, out, a, b: (g / b, -(g * out) / b)),
    ScoreOp("neg", 1, "-{0}", torch.neg, (None,), infix="-{0}",
            grad=lambda g, out, a: (-g,),
            interval=lambda a: (-a[1], -a[0])),
    ScoreOp("abs", 1, "tl.abs({0})", torch.abs, (None,), infix="|{0}|",
            grad=lambda g, out, a: (_where(a < 0.0, -g, _where(a > 0.0, g, 0.0)),),
            interval=_abs_interval),
    ScoreOp("minimum", 2, "minimum({0}, {1})", torch.minimum, (None, None), infix="min({0}, {1})",
            grad=lambda g, out, a, b: (
                _where(a < b, g, _where(a > b, 0.0, g * 0.5)),
                _where(b < a, g, _where(b > a, 0.0, g * 0.5))),
            interval=lambda a, b: (_min(a[0], b[0]), _min(a[1], b[1]))),
    ScoreOp("maximum", 2, "maximum({0}, {1})", torch.maximum, (None, None), infix="max({0}, {1})",
            grad=lambda g, out, a, b: (
                _where(a > b, g, _where(a < b, 0.0, g * 0.5)),
                _where(b > a, g, _where(b < a, 0.0, g * 0.5))),
            interval=lambda a, b: (_max(a[0], b[0]), _max(a[1], b[1]))),
    # clamp differs from min and max at the border: torch lets the whole gradient through there
    ScoreOp("clamp_min", 2, "maximum({0}, {1})", torch.clamp_min, (F, F), infix="max({0}, {1})",
            grad=lambda g, out, a, b: (_where(a >= b, g, 0.0), _where(a >= b, 0.0, g))),
    ScoreOp("clamp_max", 2, "minimum({0}, {1})", torch.clamp_max, (F, F), infix="min({0}, {1})",
            grad=lambda g, out, a, b: (_where(a <= b, g, 0.0), _where(a <= b, 0.0, g))),
    # functions of one real variable
    ScoreOp("exp", 1, "tl.exp({0})", torch.exp, (F,), grad=lambda g, out, a: (g * out,), interval=_monotone("exp")),
    ScoreOp("log", 1, "tl.log({0})", torch.log, (F,), grad=lambda g, out, a: (g / a,)),
    ScoreOp("sqrt", 1, "tl.sqrt({0})", torch.sqrt, (F,), grad=lambda g, out, a: (g * 0.5 / out,)),
    ScoreOp("rsqrt", 1, "tl.rsqrt({0})", torch.rsqrt, (F,), grad=lambda g, out, a: (-(g * 0.5) * out / a,)),
    ScoreOp("tanh", 1, "tanh({0})", torch.tanh, (F,), grad=lambda g, out, a: (g * (1.0 - out * out),),
            interval=_monotone("tanh")),
    ScoreOp("sigmoid", 1, "tl.sigmoid({0})", torch.sigmoid, (F,),
            grad=lambda g, out, a: (g * out * (1.0 - out),), interval=_monotone("sigmoid")),
    ScoreOp("sin", 1, "tl.sin({0})", torch.sin, (F,), grad=lambda g, out, a: (g * Maths.call("cos", a),)),
    ScoreOp("cos", 1, "tl.cos({0})", torch.cos, (F,), grad=lambda g, out, a: (-g * Maths.call("sin", a),)),
    ScoreOp("erf", 1, "tl.erf({0})", torch.erf, (F,),
            grad=lambda g, out, a: (g * 1.1283791670955126 * Maths.call("exp", -(a * a)),), interval=_monotone("erf")),
    # integers; both round towards minus infinity as torch's floor_divide and remainder do
    ScoreOp("floordiv", 2, "floordiv({0}, {1})", lambda a, b: torch.div(a, b, rounding_mode="floor"), (I, I),
            infix="{0} // {1}"),
    ScoreOp("mod", 2, "floormod({0}, {1})", torch.remainder, (I, I), infix="{0} % {1}"),
    # comparisons and logic
    ScoreOp("lt", 2, "{0} < {1}", torch.lt, (None, None), Bo, infix="{0} < {1}",
            interval=lambda a, b: (a[1] < b[0], a[0] < b[1])),
    ScoreOp("le", 2, "{0} <= {1}", torch.le, (None, None), Bo, infix="{0} <= {1}",
            interval=lambda a, b: (a[1] <= b[0], a[0] <= b[1])),
    ScoreOp("gt", 2, "{0} > {1}", torch.gt, (None, None), Bo, infix="{0} > {1}",
            interval=lambda a, b: (a[0] > b[1], a[1] > b[0])),
    ScoreOp("ge", 2, "{0} >= {1}", torch.ge, (None, None), Bo, infix="{0} >= {1}",
            interval=lambda a, b: (a[0] >= b[1], a[1] >= b[0])),
    ScoreOp("eq", 2, "{0} == {1}", torch.eq, (None, None), Bo, infix="{0} == {1}", interval=_eq_interval),
    ScoreOp("ne", 2, "{0} != {1}", torch.ne, (None, None), Bo, infix="{0} != {1}", interval=_ne_interval),
    ScoreOp("and", 2, "{0} & {1}", torch.logical_and, (Bo, Bo), Bo, infix="{0} and {1}",
            interval=lambda a, b: (a[0] & b[0], a[1] & b[1])),
    ScoreOp("or", 2, "{0} | {1}", torch.logical_or, (Bo, Bo), Bo, infix="{0} or {1}",
            interval=lambda a, b: (a[0] | b[0], a[1] | b[1])),
    ScoreOp("xor", 2, "{0} ^ {1}", torch.logical_xor, (Bo, Bo), Bo, infix="{0} xor {1}",
            interval=lambda a, b: (
                (a[0] & _not(b[1])) | (_not(a[1]) & b[0]), (a[1] & _not(b[0])) | (_not(a[0]) & b[1]))),
    ScoreOp("not", 1, "not_({0})", torch.logical_not, (Bo,), Bo, infix="not {0}",
            interval=lambda a: (_not(a[1]), _not(a[0]))),
    # random numbers: seed, b, h, m, n
    ScoreOp("random_bits", 5, "random_bits({0}, {1}, {2}, {3}, {4})", random_bits, (I, I, I, I, I), I,
            infix="random_bits({0})"),
    # choice and conversion
    ScoreOp("where", 3, "tl.where({0}, {1}, {2})", torch.where, (Bo, None, None), infix="({1} if {0} else {2})",
            grad=lambda g, out, c, a, b: (None, _where(c, g, 0.0), _where(c, 0.0, g)),
            interval=_where_interval),
    ScoreOp("where_bool", 3, "({0} & {1}) | (not_({0}) & {2})",
            lambda c, a, b: (c & a) | (~c & b), (Bo, Bo, Bo), Bo,
            infix="({1} if {0} else {2})", interval=_where_bool_interval),
    ScoreOp("to_float", 1, "to_float({0})", lambda a: a.to(torch.get_default_dtype()), (None,), F, infix="{0}",
            grad=lambda g, out, a: (g,), interval=_monotone("to_float")),
    ScoreOp("to_int", 1, "to_int({0})", lambda a: a.to(torch.int64), (None,), I, infix="int({0})",
            interval=_monotone("to_int")),
    ScoreOp("to_bool", 1, "{0} != 0", lambda a: a != 0, (None,), Bo, infix="{0} != 0"),
)  # fmt: skip

SCORE_OPS: dict[str, ScoreOp] = {row.name: row for row in _ROWS}
