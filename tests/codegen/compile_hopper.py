"""Compile the Hopper forward of a spec without a GPU, and say what ptxas made of it and in what order its instructions stand.

Run as a script in a process without TRITON_INTERPRET: `python compile_hopper.py bf16 64:causal 128:plain`.
Prints one JSON line for each head dim and spec.
"""

from __future__ import annotations

import json
import re
import sys

import triton
from compile_report import _TYPES, machine_code, named_spec
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashfuse.codegen import hopper, ptxas
from flashfuse.codegen.load import kernel_module
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.block_table import BLOCK


def compile_forward(spec: AttentionSpec, dtype: str, head_dim: int, *, even: bool) -> object:
    """The compiled kernel for aligned tensors."""
    padded = max(64, 1 << (head_dim - 1).bit_length())
    tile = hopper.TILES[padded][0]
    function = kernel_module(spec, fast_tanh=True, hopper=True).flashfuse_hopper_forward
    constants = {
        "D": head_dim, "E": head_dim, "BLOCK_N": tile.block_n, "CONSUMERS": tile.consumers, "STAGES": tile.stages,
        "REGISTERS": tile.registers, "TABLE_ROWS": BLOCK if spec.certainty is not None else 0, "EVEN": even,
        "HAS_MASK": spec.split.keep is not None, "PLANES": spec.planes,
        "SHIFTED": spec.planes == 2 and spec.split.keep is None, "EMPTY_ZERO": spec.empty_rows is EmptyRows.ZERO,
        "STAGED": tile.staged,
    }  # fmt: skip
    inputs: list[str] = []
    for capture in spec.captures:
        inputs += [_TYPES[capture.kind], *["i32"] * capture.rank]

    def described(rows: int) -> str:
        box = [1, 1, rows, padded]
        layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if dtype == "bf16" else gl.float16)
        return f"tensordesc<{dtype}{box},{layout!r}>".replace(" ", "")

    types = {
        "query": described(hopper.ROWS), "key": described(tile.block_n), "value": described(tile.block_n),
        "out": described(hopper.ROWS) if tile.staged else f"*{dtype}", "stats": "*fp32", "table": "*i32",
        "inputs": tuple(inputs), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    source = GluonASTSource(function, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def overlapping_loops(sass: str) -> int:
    """How often products, a wait, a tile's exponentials and a further wait follow each other: softmax under a product."""
    letters = {"HGMMA": "h", "MUFU.EX2": "e", "WARPGROUP.DEPBAR": "w"}
    text = "".join(letters[word] for word in re.findall(r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR", sass))
    return len(re.findall(r"h+we{32,}w", text))


def main() -> None:
    for head_dim, name in (words.split(":") for words in sys.argv[2:]):
        compiled = compile_forward(named_spec(name), sys.argv[1], int(head_dim), even=name == "plain")
        found = ptxas.report(compiled.asm["ptx"], "sm_90a")  # type: ignore[attr-defined]
        facts = {
            "name": compiled.metadata.name, "shared": compiled.metadata.shared,  # type: ignore[attr-defined]
            "spilled": found.spilled, "advisories": found.advisories, "overlaps": overlapping_loops(machine_code(compiled)),
        }  # fmt: skip
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
