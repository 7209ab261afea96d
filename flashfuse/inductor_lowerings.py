"""How Inductor compiles flashfuse's operators: the attention as a direct call, the fence as a copy that fuses away.

Without these every operator would still run, through torch's dispatcher, some 10 to 30 microseconds later at each call.
Inductor's lowerings are no public interface, so whatever is not as expected leaves Inductor's own way in place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

DIRECT_CALLS = {  # operator -> the module and the function that implement it
    "attention_forward": ("attention_op", "run_forward"),
    "attention_backward": ("attention_op", "run_backward"),
    "block_ranges": ("block_ranges", "run_block_ranges"),
}


@cache
def register_lowerings() -> bool:
    """Tell Inductor about the operators; False if it cannot be told of the fence."""
    import flashfuse.attention_op
    import flashfuse.block_ranges  # noqa: F401 -- they define the operators

    try:
        from torch._inductor.lowering import lowerings, register_lowering
    except ImportError:
        return False
    # A copy that fuses into what made x. Not x itself: a graph may return x and save the fenced one, whose memory the
    # backward then takes for its own and overwrites.
    clone = lowerings[torch.ops.aten.clone.default]
    register_lowering(torch.ops.flashfuse.fence.default, type_promotion_kind=None)(lambda x: clone(x))
    for name, (module, function) in DIRECT_CALLS.items():
        _register_direct_call(getattr(torch.ops.flashfuse, name).default, module, function)
    return True


def _register_direct_call(operator: Any, module: str, function: str) -> None:
    """Let the compiled code call a module's `function` instead of the operator that it implements."""
    try:
        from torch._inductor.ir import FallbackKernel, IRNode, TensorBox
        from torch._inductor.lowering import add_needs_realized_inputs, fallback_handler, fallbacks, register_lowering
        from torch._inductor.virtualized import V
        from torch.utils._pytree import tree_map
    except ImportError:
        return

    class DirectCall(FallbackKernel):  # type: ignore[misc]
        def codegen(self, wrapper: Any) -> None:
            name = f"flashfuse_{function}"
            wrapper.add_import_once(f"from flashfuse.{module} import {function} as {name}")
            self.python_kernel_name = name
            super().codegen(wrapper)

    def boxed(x: Any) -> Any:
        if hasattr(x, "wrap_for_lowering"):
            return x.wrap_for_lowering()
        return TensorBox.create(x) if isinstance(x, IRNode) else x

    through_dispatcher = fallback_handler(operator)

    def lower(*arguments: Any, **named: Any) -> Any:
        if V.graph.cpp_wrapper or not hasattr(V.graph, "fake_mode"):
            return through_dispatcher(*arguments, **named)
        return tree_map(boxed, DirectCall.create(operator, *arguments, **named))

    add_needs_realized_inputs(operator)
    fallbacks.add(operator)
    register_lowering(operator, type_promotion_kind=None)(lower)
