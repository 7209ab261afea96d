"""Compile a spec's kernels for a device that need not be there, and say what ptxas made of them.

Run as a script in a process without TRITON_INTERPRET: `python compile_report.py sm_90 fp16 128 causal [--tma] [kernel]`.
Prints one JSON line a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashfuse.codegen import ptxas
from flashfuse.codegen.load import kernel_module
from flashfuse.codegen.plan import Tile, kernel_plan
from flashfuse.ir import block_table
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parent))
from specs import LOWEST, Program

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a program can have
KERNELS = {
    "forward": "flashfuse_forward",
    "grad_query": "flashfuse_grad_query",
    "grad_key_value": "flashfuse_grad_key_value",
    "grad_key": "flashfuse_grad_key_value",
    "grad_value": "flashfuse_grad_key_value",
    "grad_capture": "flashfuse_grad_capture",
    "forward_low": "flashfuse_forward",
    "grad_query_low": "flashfuse_grad_query",
    "grad_key_value_low": "flashfuse_add_low_queries",
    "decode": "flashfuse_decode",
    "grad_diagonals": "flashfuse_grad_diagonals",
}
TMA = {  # which tensors of a kernel are descriptors, if its tile asks for them
    **dict.fromkeys(("forward", "grad_query"), ("key", "value")),
    **dict.fromkeys(("grad_key_value", "grad_key", "grad_value"), ("query", "grad_out")),
}
_POINTERS = {
    **dict.fromkeys(("parts", "part_stats", "stats", "grad_stats", "delta", "partial", "grad"), "*fp32"),
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
    if name == "window_sinks":
        return p.spec(p.masked((p.n <= p.m) & ((p.n < 4) | (p.m - p.n < 256)), scaled, never), EmptyRows.IMPOSSIBLE)
    if name == "softcap":
        capped = (p.s * 0.02).apply("tanh", p.s * 0.02) * 50.0
        return p.spec(p.masked(p.n <= p.m, capped, never), EmptyRows.IMPOSSIBLE)
    if name == "alibi":
        slope = p.capture("slopes", Kind.FLOAT, p.h)
        distance = (p.n - p.m).apply("to_float", p.n - p.m)
        return p.spec(p.masked(p.n <= p.m, scaled + slope * distance, never), EmptyRows.IMPOSSIBLE)
    if name == "bias":
        return p.spec(scaled + p.capture("bias", Kind.FLOAT, p.zero, p.h, p.m, p.n), EmptyRows.IMPOSSIBLE)
    if name == "diagonals":
        return p.spec(scaled + p.capture("table", Kind.FLOAT, p.h, (p.n - p.m) + (p.M - 1)), EmptyRows.IMPOSSIBLE)
    if name == "documents":
        d = p.declare("document", Kind.INT, 2)
        return p.spec(p.masked(p.load(d, p.b, p.m).eq(p.load(d, p.b, p.n)), scaled, never), EmptyRows.IMPOSSIBLE)
    if name == "dropout":
        return p.spec(p.masked(p.n <= p.m, scaled, never), EmptyRows.IMPOSSIBLE, weight=p.dropped(p.p, 0.1))
    if name == "sinks":
        return p.spec(p.masked(p.n <= p.m, scaled, never), EmptyRows.IMPOSSIBLE, sink=p.capture("sinks", Kind.FLOAT, p.h))
    raise ValueError(name)


def settled(
    spec: AttentionSpec, kernel: str, target: int, dtype: str, head_dim: int, even: bool, tma: bool = False
) -> dict[str, object]:
    """The report of the tile that the launcher settles on: the first of the plan that does not spill, or spills least.

    `allowed`: the bytes that a thread may spill on this device. `tma`: as if the plan's tiles all asked for descriptors.
    """
    plan = kernel_plan(divmod(target, 10), 4 if dtype == "fp32" else 2, head_dim, spec.reads_elements, spec.ranged_by_vectors)
    best: dict[str, object] | None = None
    plans = {"grad_diagonals": "grad_capture"}
    for tile in getattr(plan, plans.get(kernel, kernel.removesuffix("_low"))):
        if best is not None and best["spill"] <= 4 * plan.bearable(tile):  # type: ignore[operator]
            break
        report = compile_kernel(spec, kernel, target, dtype, head_dim, replace(tile, tma=True) if tma else tile, even)
        if report["shared"] <= SHARED_MEMORY[target]:  # type: ignore[operator]
            best = min(best or report, report, key=lambda each: each["spill"])  # type: ignore[arg-type, return-value]
    assert best is not None, f"no tile of {kernel} fits sm_{target}"
    return {**best, "allowed": 4 * plan.spills}


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
    tabled = spec.certainty is not None and not kernel.endswith("_low")
    padded = max(16, 1 << (head_dim - 1).bit_length())
    constants = {
        "D": head_dim, "E": head_dim, "D_PAD": padded, "E_PAD": padded,
        "BLOCK": tile.block_m, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "TABLE_ROWS": block_table.BLOCK if tabled else 0,
        "HAS_MASK": spec.split.keep is not None, "PLANES": spec.planes, "EMPTY_ZERO": spec.empty_rows is EmptyRows.ZERO,
        "SHIFTED": dtype == "fp32" or (spec.planes == 2 and spec.split.keep is None),
        "SUMS": False, "GRAD_STATS": False, "EXACT_DELTA": False,
        "BRANCH": tile.branch, "LOW": kernel.endswith("_low"), "EVEN": even, "CAPTURE": 0, "PRECISION": "bf16x6",
        "KEY": kernel != "grad_value", "VALUE": kernel != "grad_key", "SWAPPED": False, "section": 1,
        "TMA": tile.tma and kernel in TMA,
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
        elif tile.tma and name in TMA.get(kernel, ()):
            rows = tile.block_m if name in ("query", "grad_out") else tile.block_n
            signature[name] = f"tensordesc<{dtype}[1, 1, {rows}, {padded}]>"
        elif name in ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i32"
    aligned = [["tt.divisibility", 16]]
    unaligned = {"H", "GROUP", "kept_h", "summed_b", "summed_h", "flag_blocks", "splits", "pack", "rows"}
    attributes = {
        (place,): aligned
        for place, name in enumerate(function.arg_names)
        if not str(signature[name]).startswith(("constexpr", "tensordesc")) and name != "inputs" and name not in unaligned
    }
    place = function.arg_names.index("inputs")
    attributes.update({(place, i): aligned for i in range(len(inputs))})
    source = ASTSource(function, signature, {n: v for n, v in constants.items() if n in function.arg_names}, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        "kernel": kernel,
        "name": compiled.metadata.name,
        "tile": tile,
        "shared": compiled.metadata.shared,
        **_assembled(compiled, target),
    }


def _assembled(compiled: Any, target: int) -> dict[str, object]:
    ptx = compiled.asm["ptx"]
    found = ptxas.report(ptx, f"sm_{target}a" if target == 90 else f"sm_{target}")
    return {
        "registers": found.registers,
        "spill": found.spilled,
        "advisories": sorted({code for words in found.advisories for code in re.findall(r"C75\d\d", words)}),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "copies": ptx.count("cp.async.cg.shared.global"),
        **_main_loop(machine_code(compiled)),
    }


def machine_code(compiled: Any) -> str:
    """SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(Path(ptxas.assembler()).with_name("nvdisasm")), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _main_loop(machine_code: str) -> dict[str, object]:
    """Instructions between the ends of the innermost loop with the most matrix instructions, what those are called, and how
    many instructions store to shared memory."""
    place: dict[str, int] = {}
    operations: list[str] = []
    jumps: list[tuple[int, int]] = []
    for line in machine_code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            place[label[1]] = len(operations)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if code is None:
            continue
        back = re.search(r"\.L_x_\d+", code[2]) if code[1].startswith("BRA") else None
        if back and back[0] in place:
            jumps.append((place[back[0]], len(operations)))
        operations.append(code[1].split(".")[0])
    loops = [operations[first : last + 1] for first, last in jumps]
    matrix = [sum(name in ("HGMMA", "HMMA") for name in loop) for loop in loops]
    most = max(matrix, default=0)
    inner = min((loop for loop, count in zip(loops, matrix, strict=True) if count == most), key=len, default=[])
    name = "HGMMA" if "HGMMA" in inner else "HMMA" if "HMMA" in inner else "none"
    stores = sum(operation in ("STS", "STSM") for operation in inner)
    return {"loop": len(inner), "matrix": most, "matrix_name": name, "stores": stores}


def main() -> None:
    target, dtype, head_dim, name = int(sys.argv[1].removeprefix("sm_")), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    tma = "--tma" in sys.argv
    kernels = [word for word in sys.argv[5:] if word != "--tma"] or ["forward", "grad_query", "grad_key_value"]
    for kernel in kernels:
        for even in (True, False):
            report = settled(named_spec(name), kernel, target, dtype, head_dim, even, tma)
            print(json.dumps({"spec": name, "even": even, **report, "tile": str(report["tile"])}), flush=True)


if __name__ == "__main__":
    main()
