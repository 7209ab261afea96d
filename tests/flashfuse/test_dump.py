"""The dump: every stage file runs by itself in a fresh process, the repro reproduces, and an edited kernel is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flashfuse.codegen import kernel_choice, load
from flashfuse.codegen.hopper import missing as hopper_missing
from flashfuse.graph_source import GraphSource
from flashfuse.ir.attention_spec import AttentionSpec
from flashfuse.ir.score_builder import Builder
from flashfuse.reproduce import largest_difference, plain_attention, tensor

TABLE = torch.arange(64.0)


class Block(torch.nn.Module):
    """An attention over a parameter, a constant of the module and a padding vector, and one inside a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 16)
        self.bias = torch.nn.Parameter(torch.randn(2, 12, 12))

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
        scores = q @ q.mT * 0.25 + self.bias + TABLE[:12]
        scores = scores.masked_fill(~padding[:, None, None], float("-inf"))
        y = scores.softmax(-1) @ q
        return checkpoint(lambda t: (t @ t.mT).softmax(-1) @ t, y, use_reentrant=False)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of one training graph, and of the same model with a symbolic batch."""
    folder = tmp_path_factory.mktemp("dump")
    model = Block()
    padding = torch.ones(3, 12, dtype=torch.bool)
    for dynamic in (False, True):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "dump": str(folder)}
        x = torch.randn(3, 12, 16)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(padding, 0)
        out = torch.compile(model, backend="flashfuse", options=options)(x, padding)
        torch.testing.assert_close(out, model(x, padding), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    return folder


def start(path: Path, **environment: str) -> subprocess.Popen:
    """A fresh process that runs a file of the dump, away from this repository."""
    return subprocess.Popen(
        [sys.executable, path.name], cwd=path.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def differences(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"largest difference[a-z0-9 ]*:? *([0-9.e+-]+|inf)", text)]


def test_what_is_written(dump: Path):
    for graph in ("graph_0", "graph_1"):
        names = {path.name for path in (dump / graph).iterdir() if path.is_file()}
        assert {"0_captured.py", "1_normal_form.py", "2_match.txt", "2_match.dot", "3_spec_0.py", "5_rewritten.py"} <= names
        assert "test_dump.py:" in (dump / graph / "2_match.txt").read_text()
        assert "palegreen" in (dump / graph / "2_match.dot").read_text()
    inner = [path for path in (dump / "graph_0").iterdir() if path.is_dir()]
    assert len(inner) == 1
    assert (inner[0] / "3_spec_0.py").exists()
    assert len(list((dump / "kernels").glob("attention_*.py"))) == 2
    assert "SPEC_0" in (dump / "graph_0" / "5_rewritten.py").read_text()


STAGES = ("0_captured.py", "1_normal_form.py", "3_spec_0.py", "5_rewritten.py", "repro.py")


def test_every_stage_runs_in_a_fresh_process(dump: Path):
    inner = next(path for path in (dump / "graph_0").iterdir() if path.is_dir())
    kernel = next((dump / "kernels").iterdir())
    symbolic = [dump / "graph_1" / name for name in ("0_captured.py", "5_rewritten.py")]
    files = [*(dump / "graph_0" / name for name in STAGES), inner / "3_spec_0.py", kernel, *symbolic]
    for first in range(0, len(files), 2):
        running = [(path, start(path, TRITON_INTERPRET="1")) for path in files[first : first + 2]]
        for path, process in running:
            text, _ = process.communicate(timeout=300)
            assert process.returncode == 0, f"{path}:\n{text}"
            if path.name == "repro.py":
                assert "attentions fused: 2, left alone: 0" in text
            found = differences(text)
            assert all(value < 1e-3 for value in found), text
            assert found if path.name[0] in "3ar" else "output 0: float32 3x2x12x8" in text


def test_an_edited_kernel_is_used(dump: Path, tmp_path: Path):
    """The forward kernel of the biased attention, edited to give twice its result: the repro shows it.

    The repro captures the dumped graph anew, so the user's lines differ: kernels go by what they compute.
    """
    kernel = next(path for path in (dump / "kernels").iterdir() if "c1[" in path.read_text())
    text = kernel.read_text()
    assert text.count("acc / total[:, None]") == 1
    (tmp_path / kernel.name).write_text(text.replace("acc / total[:, None]", "2 * acc / total[:, None]"))
    repro = dump / "graph_0" / "repro.py"
    process = start(repro, TRITON_INTERPRET="1", FLASHFUSE_INTERPRET="1", FLASHFUSE_OVERRIDE=str(tmp_path))
    assert differences(process.communicate(timeout=300)[0])[0] > 0.1


def scaled(by: float) -> AttentionSpec:
    builder = Builder()
    return AttentionSpec(builder.program(builder.leaf("score") * by))


def test_an_edited_portable_kernel_is_what_auto_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a GPU where "auto" would take the Hopper forward an edited portable one would not be reached."""
    monkeypatch.setattr(load, "_placed", {})
    specs = {name: scaled(by) for name, by in (("untouched", 0.21), ("edited", 0.22), ("both", 0.23))}
    for name, spec in specs.items():
        load.place_kernels(spec, tmp_path, "\n# tail\n")
        for hopper, edited in ((False, name != "untouched"), (True, name == "both")):
            path = load.write_kernel(spec, hopper=hopper)
            path.write_text(path.read_text() + "# mine\n" * edited)
    monkeypatch.setenv("FLASHFUSE_OVERRIDE", str(tmp_path))
    for spec in specs.values():
        load.kernel_module(spec)
    asked = {name: kernel_choice.asked(spec.key) for name, spec in specs.items()}
    assert asked == {"untouched": "auto", "edited": "portable", "both": "auto"}
    kernel_choice.ask(specs["edited"].key, "auto")  # as every compilation says without the option
    assert kernel_choice.asked(specs["edited"].key) == "portable"
    kernel_choice.ask(specs["edited"].key, "hopper")
    assert kernel_choice.asked(specs["edited"].key) == "hopper"


def test_a_kernel_file_that_is_run_is_what_serves():
    spec = scaled(0.24)
    for hopper in (True, False) if not hopper_missing() else (False,):
        path = load.write_kernel(spec, hopper=hopper)
        load.use_file(spec, path)
        assert load.kernel_module(spec, hopper=hopper).__file__ == str(path)
        assert kernel_choice.asked(spec.key) == ("hopper" if hopper else "portable")


def test_a_kernel_edited_in_the_dump_is_not_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spec = scaled(0.123)
    load.place_kernels(spec, tmp_path, "\n# tail\n")
    path = load.write_kernel(spec)
    assert path.parent == tmp_path
    assert "# tail\n" in path.read_text()
    assert load.write_kernel(spec) == path  # the same text again
    path.write_text("# mine\n")
    with caplog.at_level("WARNING", "flashfuse"):
        assert load.write_kernel(spec).parent != tmp_path
    assert path.read_text() == "# mine\n"
    assert "was edited and is left alone" in caplog.text


def test_a_dump_that_cannot_be_written_costs_one_warning(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    torch._dynamo.reset()
    q = torch.randn(1, 2, 8, 16)
    function = torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend="flashfuse",
                             options={"inner": "eager", "dump": str(file / "below")})  # fmt: skip
    with pytest.warns(UserWarning, match="no dump of a graph"):
        torch.testing.assert_close(function(q), (q @ q.mT).softmax(-1) @ q)


def test_random_inputs_have_the_layout_asked_for():
    out = tensor((2, 3, 4), (1, 2, 0), "float32", "cpu", grad=True)
    assert (out.shape, out.stride(), out.requires_grad) == ((2, 3, 4), (1, 2, 0), True)
    assert set(tensor((50,), (1,), "int64", "cpu").tolist()) <= {0, 1}
    assert tensor((2, 0), (1, 1), "bfloat16", "cpu").numel() == 0


def test_differences_are_seen():
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert largest_difference(a, a) == 0.0
    assert largest_difference(a, torch.tensor([1.5, float("nan"), float("inf")])) == 0.5
    assert largest_difference(a, torch.tensor([1.0, 0.0, float("inf")])) == float("inf")
    assert largest_difference(a, a[:2]) == float("inf")


def test_the_plain_formula_is_attention():
    from flashfuse.ir.attention_spec import AttentionSpec
    from flashfuse.ir.score_builder import Builder

    builder = Builder()
    spec = AttentionSpec(builder.program(builder.leaf("score") * 0.5))
    q, k, v = torch.randn(1, 4, 5, 8).double(), torch.randn(1, 2, 6, 8).double(), torch.randn(1, 2, 6, 3).double()
    wide = (t.repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(
        plain_attention(spec, q, k, v, (), ()),
        torch.nn.functional.scaled_dot_product_attention(q, *wide, scale=0.5),
    )


def test_a_graph_with_a_constant_keeps_its_value(tmp_path: Path):
    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0))

        def forward(self, x):
            return x + self.table

    module = torch.fx.symbolic_trace(Held())
    source = GraphSource(module, "title")
    text = source.text("c.pt")
    assert "CONSTANTS" in text
    torch.save(source.constants, tmp_path / "c.pt")
    (tmp_path / "g.py").write_text(text)
    from flashfuse.reproduce import load as load_file

    assert load_file(tmp_path / "g.py").Graph()(torch.zeros(3)).tolist() == [0.0, 1.0, 2.0]
