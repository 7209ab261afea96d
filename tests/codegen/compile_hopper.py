"""Compile the Hopper kernels of a spec without a GPU, and say what ptxas made of it and in what order its instructions stand.

Run as a script in a process without TRITON_INTERPRET: `python compile_hopper.py bf16 64:causal 192x128:plain 128:window:0:1`
(head dims, spec, numbers of tiles in their row), `backward:128:causal` for the backward. Prints one JSON line for each.
"""

from __future__ import annotations

import json
import re
import sys
import time

import triton
from compile_report import _TYPES, machine_code, named_spec
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashfuse.codegen import hopper_backward, hopper_tiles, ptxas
from flashfuse.codegen.hopper_tiles import Dims, HopperTile
from flashfuse.codegen.load import kernel_module
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.block_table import BLOCK


def compile_forward(spec: AttentionSpec, dtype: str, dims: Dims, tile: HopperTile, even: bool) -> object:
    """The compiled kernel for aligned tensors of head dims D and E."""
    D, E = dims
    function = kernel_module(spec, fast_tanh=True, hopper=True).flashfuse_hopper_forward
    constants = {
        "D": D, "E": E, "BLOCK_N": tile.block_n, "CONSUMERS": tile.consumers, "STAGES": tile.stages, "QUERIES": tile.queries,
        "REGISTERS": tile.registers, "TABLE_ROWS": BLOCK if spec.certainty is not None else 0, "EVEN": even,
        "HAS_MASK": spec.split.keep is not None, "PLANES": spec.planes,
        "SHIFTED": spec.planes == 2 and spec.split.keep is None, "EMPTY_ZERO": spec.empty_rows is EmptyRows.ZERO,
        "STAGED": tile.staged, "SWAPPED": False,
    }  # fmt: skip
    types = {"stats": "*fp32", "table": "*i32", "inputs": inputs_of(spec), **dict.fromkeys(constants, "constexpr")}
    rows = {"query": (hopper_tiles.ROWS, D), "key": (tile.block_n, D), "value": (tile.block_n, E), "out": (hopper_tiles.ROWS, E)}
    for name, (length, dim) in rows.items():
        whole, *rest = hopper_tiles.parts(dim)
        if name == "out" and not tile.staged:
            whole, rest = 0, []
        types[name] = described(dtype, length, whole) if whole else f"*{dtype}"
        types[f"{name}_rest"] = described(dtype, length, rest[0]) if rest else "constexpr"
        if not rest:
            constants[f"{name}_rest"] = None
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    source = GluonASTSource(function, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def compile_backward(spec: AttentionSpec, dtype: str, head_dim: int, even: bool) -> object:
    """The compiled main kernel of the backward for aligned tensors."""
    function = kernel_module(spec, fast_tanh=True, hopper=True).flashfuse_hopper_backward
    constants = {
        "D": head_dim, "E": head_dim, "BLOCK_M": hopper_backward.BLOCK_M, "STAGES": hopper_backward.STAGES,
        "REGISTERS": hopper_backward.REGISTERS, "EVEN": even, "HAS_MASK": spec.split.keep is not None, "SWAPPED": False,
    }  # fmt: skip
    rows, keys = (described(dtype, length, head_dim) for length in (hopper_backward.BLOCK_M, hopper_backward.BLOCK_N))
    sums = [1, hopper_backward.BLOCK_M, hopper_backward.SUMMED]
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    types = {
        "query": rows, "grad_out": rows, "key": keys, "value": keys, "grad_key": f"*{dtype}", "grad_value": f"*{dtype}",
        "rows": _descriptor("fp32", [1, hopper_backward.BLOCK_M], flat),
        "grad_sum": _descriptor("fp32", sums, gl.NVMMASharedLayout.get_default_for(sums, gl.float32)),
        "inputs": inputs_of(spec), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    source = GluonASTSource(function, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def inputs_of(spec: AttentionSpec) -> tuple[str, ...]:
    """The types of a kernel's `inputs`."""
    return tuple(word for capture in spec.captures for word in (_TYPES[capture.kind], *["i32"] * capture.rank))


def described(dtype: str, rows: int, columns: int) -> str:
    """The type of a descriptor of `[1, 1, rows, columns]` tiles."""
    box = [1, 1, rows, columns]
    return _descriptor(dtype, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if dtype == "bf16" else gl.float16))


def _descriptor(dtype: str, box: list[int], layout: object) -> str:
    return f"tensordesc<{dtype}{box},{layout!r}>".replace(" ", "")


def overlapping_loops(sass: str) -> int:
    """How often products, a wait, a tile's exponentials and a further wait follow each other: softmax under a product."""
    letters = {"HGMMA": "h", "MUFU.EX2": "e", "WARPGROUP.DEPBAR": "w"}
    text = "".join(letters[word] for word in re.findall(r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR", sass))
    return len(re.findall(r"h+we{32,}w", text))


def loads_ahead(sass: str) -> int:
    """How often a tile's loads stand before the product, not between the wait for it and the exponentials."""
    letters = {"LDG": "g", "HGMMA": "h", "WARPGROUP.DEPBAR": "w"}
    text = "".join(letters[word] for word in re.findall(r"LDG|HGMMA|WARPGROUP\.DEPBAR", sass))
    return len(re.findall(r"g{32,}h+w(?!g)", text))


def facts_of(compiled: object, seconds: float) -> dict[str, object]:
    """What a line says of a compiled kernel."""
    found = ptxas.report(compiled.asm["ptx"], "sm_90a")  # type: ignore[attr-defined]
    return {
        "name": compiled.metadata.name, "shared": compiled.metadata.shared, "spilled": found.spilled,  # type: ignore[attr-defined]
        "advisories": found.advisories, "overlaps": overlapping_loops(machine_code(compiled)),
        "loads_ahead": loads_ahead(machine_code(compiled)), "slow_casts": len(re.findall(r"\bF2F\.", machine_code(compiled))),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    for words in sys.argv[2:]:
        dims, name, *numbers = words.removeprefix("backward:").split(":")
        D, E = (int(dim) for dim in (dims.split("x") * 2)[:2])
        spec = named_spec(name)
        for number in map(int, numbers or ["0"]):
            start = time.perf_counter()
            if words.startswith("backward:"):
                compiled, tile = compile_backward(spec, sys.argv[1], D, name == "plain"), None
            else:
                tile = hopper_tiles.tiles_of(spec, (D, E))[number]
                compiled = compile_forward(spec, sys.argv[1], (D, E), tile, name == "plain")
            print(json.dumps({"tile": str(tile), **facts_of(compiled, time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
