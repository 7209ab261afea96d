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
    unseen_writes: list[tuple[int, int]] = field(default_factory=list)  # those of `writes` that autograd does not see
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

    def hidden(self, node: fx.Node) -> bool:
        """Whether a captured value that equals `node` was read after a write into its storage that autograd did not see.

        Its gradient is then not that of what computed it.
        """
        return any(
            time <= origin.time and storage == origin.storage
            for origin in self.origins.get(node, ())
            for time, storage in self.unseen_writes
        )

    def unfit(self, node: fx.Node) -> bool:
        """Whether a backward cannot read `node` as the attention did, or whether its gradient is not one thing.

        The first where a write that autograd does not see follows (or any into an input of the graph), the second where after
        one a value with and a value without a gradient both equal `node`, or the node itself was made under `no_grad`.
        """
        origins = self.origins.get(node, ())
        for origin in origins:
            later = self.writes if origin.node.op in ("placeholder", "get_attr") else self.unseen_writes
            if any(origin.time < time and storage == origin.storage for time, storage in later):
                return True
        known = {_requires_grad(origin) for origin in origins}
        return self.hidden(node) and True in known and (False in known or node in self.without_grad)

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


def _requires_grad(origin: Origin) -> bool:
    value = captured_value(origin)
    return value is not None and value.requires_grad


def captured_value(origin: Origin) -> torch.Tensor | None:
    """Dynamo's fake tensor of an origin, if it has one."""
    found = origin.node.meta.get("example_value")
    for place in origin.path:
        found = found[place] if isinstance(found, (tuple, list)) and place < len(found) else None
    return found if isinstance(found, torch.Tensor) else None


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
