"""Elementwise functions of one score that are made of score operations: one row a function.

A row gives the target, the arguments that it reads, and the function on a float value. Where a choice leaves a branch
unused, the branch is given an argument at which it is finite, so that its gradient is an ordinary zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashfuse.ir.score_builder import Value
from flashfuse.patterns.calls import Call, value_of
from flashfuse.refusal import Refused

aten = torch.ops.aten
Function = Callable[[Value, Call], Value]


def _where(condition: Value, a: Value | float, b: Value | float) -> Value:
    return condition.apply("where", condition, a, b)


def _relu(x: Value, _call: Call) -> Value:
    return _where(x > 0.0, x, 0.0)


def _hardtanh(x: Value, call: Call) -> Value:
    low, high = (call["min_val"], call["max_val"]) if "min_val" in call.arguments else (0.0, 6.0)
    return _where(x <= float(low), float(low), _where(x >= float(high), float(high), x))


def _leaky_relu(x: Value, call: Call) -> Value:
    return _where(x > 0.0, x, x * float(call["negative_slope"]))


def _elu(x: Value, call: Call) -> Value:
    alpha, scale, inner = (float(call[name]) for name in ("alpha", "scale", "input_scale"))
    below = _where(x > 0.0, 0.0, x)
    return _where(x > 0.0, x * scale, ((below * inner).apply("exp", below * inner) - 1.0) * (alpha * scale))


def _sigmoid(x: Value) -> Value:
    return x.apply("sigmoid", x)


def _silu(x: Value, _call: Call) -> Value:
    return x * _sigmoid(x)


def _gelu(x: Value, call: Call) -> Value:
    if call["approximate"] == "none":
        bell = x * math.sqrt(0.5)
        return x * 0.5 * (bell.apply("erf", bell) + 1.0)
    inner = (x + x * x * x * 0.044715) * math.sqrt(2.0 / math.pi)
    return x * 0.5 * (inner.apply("tanh", inner) + 1.0)


def _log_one_plus_exp(x: Value) -> Value:
    """log(1 + e^x) that does not overflow."""
    size = x.apply("abs", x)
    rest = (-size).apply("exp", -size) + 1.0
    return x.apply("maximum", x, 0.0) + rest.apply("log", rest)


def _softplus(x: Value, call: Call) -> Value:
    """The threshold above which torch returns x itself is passed over: there both agree in float32."""
    beta, threshold = float(call["beta"]), float(call["threshold"])
    if threshold < 20.0:
        raise Refused("FF402", call.node, f"softplus with threshold={threshold}")
    return _log_one_plus_exp(x * beta) * (1.0 / beta)


def _log_sigmoid(x: Value, _call: Call) -> Value:
    return -_log_one_plus_exp(-x)


def _power(x: Value, call: Call) -> Value:
    exponent = value_of(call["exponent"])
    if not isinstance(exponent, (int, float)) or exponent not in _POWERS:
        raise Refused("FF402", call.node, f"power {exponent!r}")
    return _POWERS[exponent](x)


_POWERS: Mapping[float, Callable[[Value], Value]] = {
    1: lambda x: x,
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    4: lambda x: (x * x) * (x * x),
    0.5: lambda x: x.apply("sqrt", x),
    -0.5: lambda x: x.apply("rsqrt", x),
    -1: lambda x: 1.0 / x,
    -2: lambda x: 1.0 / (x * x),
}


def _sign(x: Value, _call: Call) -> Value:
    return _where(x > 0.0, 1.0, _where(x < 0.0, -1.0, 0.0))


def _plain(name: str) -> Function:
    return lambda x, _call: x.apply(name, x)


def _scaled(name: str, factor: float) -> Function:
    """A function of a multiple of x."""
    return lambda x, _call: (x * factor).apply(name, x * factor)


def _logarithm(base: float, shift: float = 0.0) -> Function:
    def function(x: Value, _call: Call) -> Value:
        moved = x + shift if shift else x
        found = moved.apply("log", moved)
        return found * (1.0 / math.log(base)) if base != math.e else found

    return function


# target, arguments read besides `self`, the function
FUNCTIONS: tuple[tuple[Any, tuple[str, ...], Function], ...] = (
    (aten.relu.default, (), _relu),
    (aten.relu6.default, (), _hardtanh),
    (aten.hardtanh.default, ("min_val", "max_val"), _hardtanh),
    (aten.leaky_relu.default, ("negative_slope",), _leaky_relu),
    (aten.elu.default, ("alpha", "scale", "input_scale"), _elu),
    (aten.silu.default, (), _silu),
    (aten.gelu.default, ("approximate",), _gelu),
    (aten.softplus.default, ("beta", "threshold"), _softplus),
    (aten.log_sigmoid.default, (), _log_sigmoid),
    (aten.pow.Tensor_Scalar, ("exponent",), _power),
    (aten.square.default, (), lambda x, _call: x * x),
    (aten.sign.default, (), _sign),
    (aten.exp2.default, (), _scaled("exp", math.log(2.0))),
    (aten.expm1.default, (), lambda x, _call: x.apply("exp", x) - 1.0),
    (aten.log1p.default, (), _logarithm(math.e, 1.0)),
    (aten.log2.default, (), _logarithm(2.0)),
    (aten.log10.default, (), _logarithm(10.0)),
    *((getattr(aten, name).default, (), _plain(name)) for name in ("sin", "cos", "erf")),
)
