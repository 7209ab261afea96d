"""Emitted modules: what is in them, and how they come to disk and back."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashfuse.codegen import emit, load
from flashfuse.codegen.kernels import tiles
from flashfuse.ir.mask import LOW_SCORE

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES

CAUSAL = next(case.spec for case in CASES if case.name == "causal")
SOFTCAP = next(case.spec for case in CASES if case.name == "softcap")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_text_stands_alone(case) -> None:  # type: ignore[no-untyped-def]
    tree = ast.parse(emit.module_text(case.spec))
    imports = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert imports == {"triton", "triton.language"}
    assert not any(isinstance(node, ast.ImportFrom) for node in tree.body)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_function_takes_the_name_of_another(case, hopper: bool) -> None:  # type: ignore[no-untyped-def]
    tree = ast.parse(emit.module_text(case.spec, hopper=hopper))
    names = Counter(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    again = {name for name, times in names.items() if times > 1}
    assert again == ({"random_bits"} if hopper else set())  # which hopper_maths.py writes anew


def test_kernels_and_specs_agree_on_which_rows_are_low() -> None:
    assert tiles.LOW_SCORE.value == LOW_SCORE


def test_text_defines_every_function_that_plain_attention_stands_in_for() -> None:
    plain = ast.parse((emit.KERNELS / "plain_score.py").read_text())
    wanted = {node.name: ast.unparse(node.args) for node in plain.body if isinstance(node, ast.FunctionDef)}
    tree = ast.parse(emit.module_text(CAUSAL))
    found = {node.name: ast.unparse(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name: found[name] for name in wanted} == wanted


def test_kernel_text_is_the_repositorys() -> None:
    text = emit.module_text(CAUSAL)
    kernel = (emit.KERNELS / "forward.py").read_text().split("@triton.jit", 1)[1].strip()
    assert "def flashfuse_forward" in kernel
    assert kernel in text


def test_only_generated_functions_know_masks() -> None:
    text = emit.module_text(CAUSAL)
    assert "le_1 = n <= m" in text
    assert 'tl.where(le_1, mul_1, float("-inf"))' in text
    assert "keeps  n <= m" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain", "flashfuse_forward_plain_d128"),
        ("causal", "flashfuse_forward_causal_d128"),
        ("softcap", "flashfuse_forward_causal_softcap_d128"),
        ("documents_causal", "flashfuse_forward_causal_document_d128"),
    ],
)
def test_profilers_show_what_a_kernel_computes(name: str, shown: str) -> None:
    spec = next(case.spec for case in CASES if case.name == name)
    tree = ast.parse(emit.module_text(spec))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "named")
    found: dict[str, Any] = {}
    exec(compile(ast.Module([function], []), "named", "exec"), found)
    assert found["named"]("flashfuse_forward")(SimpleNamespace(constants={"D": 128})) == shown


def test_fast_tanh_only_where_tanh_is() -> None:
    assert "tanh = tanh_approximate" in emit.module_text(SOFTCAP, True)
    assert "tanh = tanh_approximate" not in emit.module_text(SOFTCAP, False)
    assert emit.module_text(CAUSAL, True) == emit.module_text(CAUSAL, False)


def test_same_module_for_same_spec() -> None:
    assert load.kernel_module(CAUSAL) is load.kernel_module(CAUSAL, fast_tanh=True)


def test_corrupt_file_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path / "new"))
    text = emit.module_text(CAUSAL)
    path = load.write_module(text)
    assert path.parent == tmp_path / "new"
    assert path.name.startswith("attention_")
    path.write_text("half a fi")
    assert load.write_module(text) == path
    assert path.read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(blocked / "below"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = load.write_module(emit.module_text(CAUSAL))
    assert path.is_relative_to(tmp_path)
    assert path.read_text() == emit.module_text(CAUSAL)


def test_kernel_files_run_on_their_own() -> None:
    imports = "from flashfuse.codegen.kernels import backward, block_table, capture_gradient, forward"
    command = f"{imports}; print(forward.flashfuse_forward.fn.__name__)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "flashfuse_forward"
