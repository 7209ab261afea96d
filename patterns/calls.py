"""One ATen call with its arguments bound to the schema's names, and the check that a row accounts for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashfuse.refusal import Refused

# Arguments that say where or how a result is stored, never what it is.
_STORAGE = frozenset({"memory_format", "layout", "device", "pin_memory", "non_blocking", "copy"})


@dataclass(frozen=True)
class Call:
    """A node's bound arguments: `call["dim"]`. Missing ones have the schema's default."""

    node: fx.Node
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


def bind(node: fx.Node, reads: tuple[str, ...]) -> Call:
    """Bind a node's arguments; refuse (FF402) if one that the row does not read differs from its default."""
    schema = node.target._schema  # type: ignore[union-attr]
    arguments: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        given = place < len(node.args) and not argument.kwarg_only
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[place] if given else node.kwargs.get(argument.name, default)
        arguments[argument.name] = value
        if argument.name in reads or argument.name in _STORAGE or value == default:
            continue
        raise Refused("FF402", node, f"{schema.name} with {argument.name}={value!r}")
    return Call(node, arguments)


def value_of(x: Any) -> Any:
    """The fake value of a node, or the thing itself."""
    return x.meta.get("val") if isinstance(x, fx.Node) else x


def shape(x: Any) -> tuple[Any, ...]:
    """The shape of a node's tensor."""
    return tuple(value_of(x).shape)


def kind_of(value: Any) -> Any:
    """All that an operation can see of a fake tensor or a symbolic number, hashable."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr)
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return (type(value), value.dtype, value.device, value.requires_grad, value.ndim, sizes_key(sizes))


def sizes_key(sizes: Iterable[Any]) -> tuple[Any, ...]:
    """Sizes as integers and expressions: equal for equal sizes, hashable, and no guard is made."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def is_tensor(x: Any) -> bool:
    """Whether x is a node that holds one tensor."""
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)


def static_sizes(x: Any) -> Any:
    """A list of sizes with nodes replaced by the (symbolic) integers that they hold."""
    return [value_of(item) for item in x]


def normal_dim(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def draws_random(node: fx.Node) -> bool:
    """Whether an ATen call draws random numbers (dropout does not in eval mode, nor with p = 0)."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target is torch.ops.aten.dropout.default:
        return bool(node.args[2]) and node.args[1] != 0.0
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(value_of(rate) != 0.0)
    return True
