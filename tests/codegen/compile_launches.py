"""Launch cases with a device that is not there: every kernel that a launch would start is compiled instead, as it would be.

This goes through the real launcher and Triton's own specialisation of arguments (a stride or length of 1 becomes a
constant), which ahead-of-time signatures do not. Run as a script in a process without TRITON_INTERPRET:
`python compile_launches.py sm_90 bf16 plain_gqa causal ...`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from flashfuse.codegen import launch
from flashfuse.codegen.plan import KernelPlan, kernel_plan

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from decode_cases import DECODE_CASES
from specs import make_inputs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_instead(target: GPUTarget, compiled: list[str]) -> Any:
    """A replacement for `JITFunction.run` that compiles and starts nothing."""
    backend = make_backend(target)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        binder = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constants, attributes)
        triton.compile(source, target=target, options=options.__dict__)
        compiled.append(self.__name__)

    return run


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1].removeprefix("sm_")), 32)
    dtype = DTYPES[sys.argv[2]]
    compiled: list[str] = []
    jit.JITFunction.run = compile_instead(target, compiled)

    def plan(_capability: object, *facts: int) -> KernelPlan:
        return kernel_plan(divmod(target.arch, 10), *facts)

    launch.kernel_plan = plan  # type: ignore[assignment]
    launch.interpreting = lambda: False
    launch.unsupported = lambda *tensors: None
    for case in [*CASES, *DECODE_CASES]:
        if case.name not in sys.argv[3:] and sys.argv[3:] != ["all"]:
            continue
        inputs = make_inputs(case, dtype)
        tensors = (inputs.query, inputs.key, inputs.value)
        needs = case.needs or (False,) * len(inputs.captures)
        compiled.clear()
        out, stats = launch.forward(case.spec, *tensors, inputs.captures, case.sizes)
        launch.backward(case.spec, inputs.grad_out, *tensors, out, stats, inputs.captures, case.sizes, needs)
        print(case.name, *compiled, flush=True)


if __name__ == "__main__":
    main()
