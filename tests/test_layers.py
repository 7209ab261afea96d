"""Imports go one way: every import of the project is parsed and its direction checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"flashfuse": ROOT / "flashfuse", "flashfuse.patterns": ROOT / "patterns", "flashfuse.codegen": ROOT / "codegen"}
PACKAGES = {"flashfuse", "flashfuse.ir", "flashfuse.patterns", "flashfuse.codegen", "flashfuse.codegen.kernels"}

# A module may import modules of lower layers, and others of its own. Packages stand for all their modules.
LAYERS = (
    ("flashfuse.errors", "flashfuse.refusal", "flashfuse.options"),
    ("flashfuse.ir",),
    ("flashfuse.chunk_ranges", "flashfuse.chunks", "flashfuse.chunk_scores", "flashfuse.chunk_probabilities",
     "flashfuse.chunked_attention", "flashfuse.aten_flash"),
    ("flashfuse.patterns", "flashfuse.codegen", "flashfuse.block_map"),
    ("flashfuse.records", "flashfuse.rewrite", "flashfuse.graph_calls", "flashfuse.attention_op", "flashfuse.block_ranges",
     "flashfuse.diagonals",
     "flashfuse.report_text", "flashfuse.stages"),
    ("flashfuse.inductor_lowerings", "flashfuse.graph_source", "flashfuse.reproduce", "flashfuse.dump",
     "flashfuse.commentary"),
    ("flashfuse.backend",),
    ("flashfuse.drawing",),
    ("flashfuse.report", "flashfuse.page"),
    ("flashfuse.bench_variants", "flashfuse.bench_peers", "flashfuse.bench", "flashfuse.doctor",
     "flashfuse.command_line", "flashfuse.__main__"),
    ("flashfuse",),
)
SIBLINGS = ({"flashfuse.patterns", "flashfuse.codegen"},)
IR_MAY_IMPORT = ("flashfuse.ir", "flashfuse.errors", "flashfuse.refusal", "flashfuse.options")


def modules() -> dict[str, Path]:
    """Every module's import name and file."""
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports(name: str, *, eager: bool = False) -> set[str]:
    """The project's modules that a module imports, anywhere in its text, or only those imported with it (`eager`)."""
    found: set[str] = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in tree.body if eager else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else str(node.module) for module in whole}
    own = {module for module in found if module.split(".")[0] == "flashfuse"}
    return own - {name, "flashfuse"}  # the package itself imports nothing


def unit(name: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    for layer in LAYERS[:-1]:
        for entry in layer:
            if name == entry or (entry in PACKAGES and name.startswith(entry + ".")):
                return entry
    return name


def level(name: str) -> int:
    return next((place for place, layer in enumerate(LAYERS) if unit(name) in layer), -1)


def test_every_module_has_a_layer() -> None:
    assert not [name for name in MODULES if level(name) < 0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    for imported in imports(name):
        assert level(imported) <= level(name), f"{name} imports {imported}, which lies above it"
        if unit(name) != unit(imported):
            assert not any({unit(name), unit(imported)} == pair for pair in SIBLINGS), f"{name} imports {imported}"
        if unit(name) == "flashfuse.ir":
            assert imported.startswith(IR_MAY_IMPORT), f"{name} imports {imported}"


def test_a_wrong_import_would_be_found() -> None:
    assert level("flashfuse.backend") > level("flashfuse.patterns.search") > level("flashfuse.ir.mask")
    assert unit("flashfuse.codegen.kernels.forward") == "flashfuse.codegen"
    assert "flashfuse.ir.attention_spec" in imports("flashfuse.attention_op")


def test_no_cycles_when_importing() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for imported in imports(name, eager=True) & set(MODULES):
            if imported not in PACKAGES:  # a package's own file is run before its modules, whatever they import
                visit(imported, (*path, name))
        done.add(name)

    for name in MODULES:
        if name not in PACKAGES:
            visit(name, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flashfuse", ("triton", "sympy", "flashfuse.codegen", "flashfuse.patterns", "torch")),
        ("flashfuse.attention_op", ("flashfuse.codegen", "flashfuse.patterns", "transformers")),
    ],
)
def test_import_is_light(module: str, absent: tuple[str, ...]) -> None:
    script = f"import sys, torch; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"
    if "torch" in absent:
        script = f"import sys; import {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.startswith(tuple(f"{word}." for word in absent)) or name in absent]
