"""Compile a spec's kernels for a device that need not be there, and say what ptxas made of them.

Run as a script in a process without TRITON_INTERPRET: `python compile_report.py sm_90 fp16 128 causal [kernel]`.
Prints one JSON line a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashfuse.codegen import launch
from flashfuse.codegen.load import kernel_module
from flashfuse.codegen.plan import Tile, kernel_plan
from flashfuse.codegen.range_tables import tells_something
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parent))
from specs import LOWEST, Program

MAX_SPILL = 4 * launch._MAX_SPILLS  # bytes a thread
KERNELS = {
    "forward": "flashfuse_forward",
    "grad_query": "flashfuse_grad_query",
    "grad_key_value": "flashfuse_grad_key_value",
    "grad_capture": "flashfuse_grad_capture",
    "forward_low": "flashfuse_forward",
    "grad_query_low": "flashfuse_grad_query",
    "grad_key_value_low": "flashfuse_add_low_queries",
    "decode": "flashfuse_decode",
}
_POINTERS = {
    **dict.fromkeys(("parts", "part_stats", "stats", "delta", "partial", "grad"), "*fp32"),
    **dict.fromkeys(("flags", "table"), "*i32"),
}
_TYPES = {Kind.FLOAT: "*fp32", Kind.INT: "*i64", Kind.BOOL: "*i8"}


def named_spec(name: str) -> AttentionSpec:
    """A few specs by name."""
    p = Program()
    scaled = p.s * 0.125
    never = float("-inf")
    if name == "plain":
        return p.spec(scaled, EmptyRows.IMPOSSIBLE)
    if name == "causal":
        return p.spec(p.masked(p.n <= p.m, scaled, never), EmptyRows.IMPOSSIBLE)
    if name == "causal_low":
        return p.spec(p.masked(p.n <= p.m, scaled, LOWEST))
    if name == "window":
        return p.spec(p.masked((p.n <= p.m) & (p.m - p.n < 256), scaled, never), EmptyRows.IMPOSSIBLE)
    if name == "softcap":
        capped = (p.s * 0.02).apply("tanh", p.s * 0.02) * 50.0
        return p.spec(p.masked(p.n <= p.m, capped, never), EmptyRows.IMPOSSIBLE)
    if name == "alibi":
        slope = p.capture("slopes", Kind.FLOAT, p.h)
        distance = (p.n - p.m).apply("to_float", p.n - p.m)
        return p.spec(p.masked(p.n <= p.m, scaled + slope * distance, never), EmptyRows.IMPOSSIBLE)
    if name == "bias":
        return p.spec(scaled + p.capture("bias", Kind.FLOAT, p.zero, p.h, p.m, p.n), EmptyRows.IMPOSSIBLE)
    if name == "documents":
        d = p.declare("document", Kind.INT, 2)
        return p.spec(p.masked(p.load(d, p.b, p.m).eq(p.load(d, p.b, p.n)), scaled, never), EmptyRows.IMPOSSIBLE)
    if name == "dropout":
        return p.spec(p.masked(p.n <= p.m, scaled, never), EmptyRows.IMPOSSIBLE, weight=p.dropped(p.p, 0.1))
    if name == "sinks":
        return p.spec(p.masked(p.n <= p.m, scaled, never), EmptyRows.IMPOSSIBLE, sink=p.capture("sinks", Kind.FLOAT, p.h))
    raise ValueError(name)


def settled(spec: AttentionSpec, kernel: str, target: int, dtype: str, head_dim: int, even: bool) -> dict[str, object]:
    """The report of the tile that the launcher settles on: the first of the plan that does not spill, or spills least."""
    itemsize = 4 if dtype == "fp32" else 2
    plan = kernel_plan(divmod(target, 10), itemsize, head_dim)
    reports: list[dict[str, object]] = []
    for tile in getattr(plan, kernel.removesuffix("_low")):
        reports.append(compile_kernel(spec, kernel, target, dtype, head_dim, tile, even))
        if reports[-1]["spill"] <= MAX_SPILL:  # type: ignore[operator]
            break
    return {**min(reports, key=lambda report: report["spill"]), "passed_over": len(reports) - 1}  # type: ignore[arg-type, return-value]


def compile_kernel(
    spec: AttentionSpec,
    kernel: str,
    target: int,
    dtype: str,
    head_dim: int,
    tile: Tile,
    even: bool,
) -> dict[str, object]:
    """Registers, spills, shared memory and advisories of one kernel."""
    module = kernel_module(spec, fast_tanh=dtype != "fp32")
    function = getattr(module, KERNELS[kernel])
    tabled = tells_something(spec) and not kernel.endswith("_low")
    table_rows = (tile.block_n if kernel == "grad_key_value" else tile.block_m) if tabled else 0
    padded = max(16, 1 << (head_dim - 1).bit_length())
    constants = {
        "D": head_dim, "E": head_dim, "D_PAD": padded, "E_PAD": padded,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "TABLE_ROWS": table_rows,
        "HAS_MASK": spec.split.keep is not None, "PLANES": spec.planes, "EMPTY_ZERO": spec.empty_rows is EmptyRows.ZERO,
        "SUMS": False, "SHIFTED": spec.planes == 2 and spec.split.keep is None, "EXACT_DELTA": False,
        "BRANCH": tile.branch, "LOW": kernel.endswith("_low"), "EVEN": even, "CAPTURE": 0, "PRECISION": "bf16x6",
    }  # fmt: skip
    inputs: list[str] = []
    for capture in spec.captures:
        inputs += [_TYPES[capture.kind], *["i32"] * capture.rank]
    signature: dict[str, object] = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "inputs":
            signature[name] = tuple(inputs)
        elif name in _POINTERS:
            signature[name] = _POINTERS[name]
        elif name in ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i32"
    aligned = [["tt.divisibility", 16]]
    unaligned = {"H", "GROUP", "kept_h", "summed_b", "summed_h", "flag_blocks", "splits", "pack", "rows"}
    attributes = {
        (place,): aligned
        for place, name in enumerate(function.arg_names)
        if signature[name] != "constexpr" and name != "inputs" and name not in unaligned
    }
    place = function.arg_names.index("inputs")
    attributes.update({(place, i): aligned for i in range(len(inputs))})
    source = ASTSource(function, signature, {n: v for n, v in constants.items() if n in function.arg_names}, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        "kernel": kernel,
        "name": compiled.metadata.name,
        "tile": str(tile),
        "shared": compiled.metadata.shared,
        **_assembled(compiled.asm["ptx"], target),
    }


def _assembled(ptx: str, target: int) -> dict[str, object]:
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = f"sm_{target}a" if target == 90 else f"sm_{target}"
        command = [str(ptxas), "-v", f"-arch={arch}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    advisories = sorted(set(re.findall(r"C75\d\d", done.stderr)))
    return {
        "registers": max(registers),
        "spill": max(spills),
        "advisories": advisories,
        "wgmma": ptx.count("wgmma.mma_async"),
    }


def main() -> None:
    target, dtype, head_dim, name = int(sys.argv[1].removeprefix("sm_")), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    kernels = sys.argv[5:] or ["forward", "grad_query", "grad_key_value"]
    for kernel in kernels:
        for even in (True, False):
            report = settled(named_spec(name), kernel, target, dtype, head_dim, even)
            print(json.dumps({"spec": name, "even": even, **report}), flush=True)


if __name__ == "__main__":
    main()
