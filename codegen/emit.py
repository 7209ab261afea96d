"""From an `AttentionSpec` to the text of one standalone module: its formula, the generated functions, the kernel files.

Kernel files are ordinary Triton that imports plain attention's functions on a line marked SPLICE. Emission leaves out
the imports within the package and puts the generated functions before the kernels, so that the emitted file needs
nothing but Triton and the kernel text in it is, line for line, the text in `kernels/`.
"""

from __future__ import annotations

import ast
from functools import cache, lru_cache
from pathlib import Path

from flashfuse.codegen.score_functions import splice_text
from flashfuse.ir.attention_spec import AttentionSpec

KERNELS = Path(__file__).parent / "kernels"
_PACKAGE = "flashfuse.codegen.kernels"
_BEFORE = ("maths",)
_BEFORE_HOPPER = ("maths", "hopper_api", "hopper_maths")
_AFTER = ("tiles", "forward", "decode", "backward", "capture_gradient", "block_table")


_HOPPER = ("tiles", "hopper_forward", "hopper_backward")


@lru_cache(maxsize=256)
def module_text(spec: AttentionSpec, fast_tanh: bool = False, hopper: bool = False) -> str:
    """The whole module. `fast_tanh`: take tanh by one 16-bit-precise instruction (see `maths.tanh_approximate`).

    `hopper`: the module of the Hopper kernels, which need Gluon, instead of that of the portable ones.
    """
    before = _BEFORE_HOPPER if hopper else _BEFORE
    parts = [_header(spec), "import triton\nimport triton.language as tl", *(_kernel_text(name) for name in before)]
    if fast_tanh and spec.score.uses("tanh"):
        parts.append("tanh = tanh_approximate  # query and key have 16 bits")
    parts.append("# " + "-" * 98 + " generated from the score program")
    parts.append(splice_text(spec, apart=hopper).strip("\n"))
    parts.append("# " + "-" * 98 + " the kernel files")
    parts += [_kernel_text(name) for name in (_HOPPER if hopper else _AFTER)]
    return "\n\n\n".join(parts) + "\n"


def _header(spec: AttentionSpec) -> str:
    lines = [f'"""flashfuse attention {spec.key}', ""]
    lines += [f"    {word:<6} {formula}" for word, formula in spec.describe()]
    lines += [f"    rows without a kept key: {spec.empty_rows.value}", '"""']
    return "\n".join(line.replace("\\", "/") for line in lines)


@cache
def _kernel_text(name: str) -> str:
    """A kernel file without its imports, except of Gluon; its docstring becomes a comment."""
    text = (KERNELS / f"{name}.py").read_text()
    lines = text.splitlines()
    dropped: set[int] = set()
    comment: list[str] = []
    for node in ast.parse(text).body:
        span = range(node.lineno - 1, (node.end_lineno or node.lineno))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("triton.experimental"):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            dropped.update(span)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            dropped.update(span)
            comment = [f"# {line}".rstrip() for line in str(node.value.value).strip().splitlines()]
    kept = [line for number, line in enumerate(lines) if number not in dropped and not line.startswith("# ruff:")]
    body = "\n".join(kept).strip("\n")
    return "\n".join([*comment, "", body]) if comment else body
