"""ATen operations that are another one under a second name: the normal form writes them under the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# alias: the name that the tables use
_NAMES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "special_expit": "sigmoid", "special_exp2": "exp2", "special_expm1": "expm1", "special_log1p": "log1p",
    "special_erf": "erf", "special_softmax": "softmax", "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp",
    "concat": "cat", "concatenate": "cat",
}  # fmt: skip


def _aliases() -> dict[Any, Any]:
    """{overload: the same overload under the other name}, where both take the same arguments."""
    found = {}
    for alias, name in _NAMES.items():
        for overload in getattr(aten, alias).overloads():
            one, other = getattr(getattr(aten, alias), overload), _overload(name, overload)
            if other is not None and _arguments(one) == _arguments(other):
                found[one] = other
    return found


def _arguments(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _overload(name: str, overload: str) -> Any:
    packet = getattr(aten, name)
    wanted = "int" if name in ("softmax", "log_softmax") and overload == "default" else overload
    return getattr(packet, wanted) if wanted in packet.overloads() else None


ALIASES = _aliases()


def rename(graph: fx.Graph) -> None:
    """Write every alias in a graph under its first name."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = ALIASES.get(node.target, node.target)
