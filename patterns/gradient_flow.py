"""What values do not show: `detach` and `no_grad`, where a fused attention must stop the gradient too, and later writes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from flashfuse.patterns.calls import is_tensor, value_of
from flashfuse.refusal import Refused


class GradientFlow:
    """Asks `requires_grad(node)` once a node. Without gradients (inference) nothing is needed and nothing stops.

    `overwritten(node)`: whether the captured graph loses the value by a write in place. `hidden(node)`: whether autograd
    did not see the write that gave it this value. `unfit(node)`: whether it is no input for an attention with a backward.
    """

    def __init__(
        self,
        requires_grad: Callable[[fx.Node], bool],
        overwritten: Callable[[fx.Node], bool],
        hidden: Callable[[fx.Node], bool],
        unfit: Callable[[fx.Node], bool],
    ) -> None:
        self._requires_grad = requires_grad
        self.overwritten = overwritten
        self._hidden = hidden
        self._unfit = unfit
        self._known: dict[fx.Node, bool] = {}

    def needed(self, node: fx.Node) -> bool:
        """Whether autograd computes a gradient of this value."""
        if node not in self._known:
            self._known[node] = self._requires_grad(node)
        return self._known[node]

    def stops_at(self, node: fx.Node) -> bool:
        """Whether a value has another gradient than what it is computed from gives it.

        It has none (`detach`, `no_grad`), or it was written where autograd does not look (`x.data.mul_(2)`).
        """
        if not _is_float(node) or self.needed(node):
            return self.written_unseen(node)
        return any(_is_float(argument) and self.needed(argument) for argument in _tensors_of(node))

    def written_unseen(self, node: fx.Node) -> bool:
        """Whether a value has a gradient, and a write that autograd did not see gave it this value."""
        return _is_float(node) and self.needed(node) and self._hidden(node)

    def check_inputs(self, inputs: list[fx.Node]) -> None:
        """Refuse (FF408) an attention with a gradient whose inputs a backward could not read as they were."""
        if not any(_is_float(node) and self.needed(node) for node in inputs):
            return
        for node in inputs:
            if self._unfit(node):
                raise Refused("FF408", node, f"{node} is written where autograd does not see it")


def _tensors_of(node: fx.Node) -> list[fx.Node]:
    """What a node is computed from; behind a call with several results, what that is computed from."""
    found = [[each] if is_tensor(each) else each.all_input_nodes for each in node.all_input_nodes]
    return [tensor for each in found for tensor in each]


def _is_float(node: fx.Node) -> bool:
    return is_tensor(node) and bool(value_of(node).dtype.is_floating_point)
