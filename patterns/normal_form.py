"""The normal form: one spelling per meaning, for reading only.

Dynamo's graph as pre-dispatch ATen (one node per user operation; `@`, `torch.matmul` and `.matmul` are one), functional,
with the user's file and line on every node. Since functionalising hides writes, the normal form is never handed on. Instead
`NormalForm` remembers which value of the captured graph each of its nodes stands for, and when tensors were written, so that
a match can be mapped back to the captured graph exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@dataclass(frozen=True)
class Origin:
    """A value of the captured graph: result `path` of `node`, as it was at `time`.

    The captured node number t reads its arguments at time 2t - 1 and writes and gives its result at time 2t.
    """

    node: fx.Node
    path: tuple[int, ...]
    time: int
    storage: int


@dataclass
class NormalForm:
    """`graph` is functional ATen. `origins[node]` are the captured values equal to a node, oldest first."""

    graph: fx.Graph
    origins: dict[fx.Node, list[Origin]] = field(default_factory=dict)
    produced: dict[fx.Node, fx.Node] = field(default_factory=dict)  # node -> captured node that ran when it was made
    times: dict[fx.Node, int] = field(default_factory=dict)  # captured node -> time of its result
    writes: list[tuple[int, int]] = field(default_factory=list)  # (time, storage)
    written_inputs: set[fx.Node] = field(default_factory=set)  # captured placeholders written in place
    without_grad: set[fx.Node] = field(default_factory=set)  # nodes made while grad mode was off
    gradients: bool = True  # whether grad mode is on anywhere

    def origin(self, node: fx.Node, at: int) -> Origin | None:
        """A captured value that equals `node` and still does at time `at`; None if there is none."""
        for origin in self.origins.get(node, ()):
            if origin.time <= at and not self.written(origin.storage, origin.time, at):
                return origin
        return None

    def overwritten(self, node: fx.Node) -> bool:
        """Whether every captured value that equals `node` is overwritten at some time."""
        origins = self.origins.get(node, ())
        return bool(origins) and all(self.written(o.storage, o.time, self.end) for o in origins)

    @property
    def end(self) -> int:
        """A time after which nothing is written."""
        return max((time for time, _storage in self.writes), default=0)

    def captured_names(self, *names: str) -> tuple[str, ...]:
        """The captured nodes that ran when the nodes of these names were made."""
        found = [self.produced.get(node) for node in self.graph.nodes if str(node) in names]
        return tuple(dict.fromkeys(str(node) for node in found if node is not None))

    def written(self, storage: int, after: int, until: int) -> bool:
        """Whether a storage is written at a time t with after < t <= until."""
        return any(after < time <= until for time, written in self.writes if written == storage)


def is_opaque(node: fx.Node) -> bool:
    """Whether a captured node is kept as a leaf."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode of the captured values. (The tracing context's may be another one, made for the backend.)"""
    examples = (node.meta.get("example_value") for node in graph.nodes)
    return next((example.fake_mode for example in examples if isinstance(example, FakeTensor)), None)


def is_leaf(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a captured node's result enters the normal form as an input."""
    if node.op == "placeholder" or is_opaque(node):
        return True
    return node.op == "get_attr" and isinstance(attribute(module, node), torch.Tensor)


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a get_attr node gets."""
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found


def leaf_value(module: fx.GraphModule, node: fx.Node, fake_mode: FakeTensorMode | None) -> Any:
    """The fake value of a leaf."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    if node.op == "get_attr":
        found = attribute(module, node)
        return found if fake_mode is None else fake_mode.from_tensor(found)
    raise RuntimeError(f"captured node {node} carries no example value")
