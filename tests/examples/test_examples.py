"""Every example runs, fuses what it says, and gives what eager code gives."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashfuse

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "attentions", "mask"),
    [
        ("sliding_window", 1, "n <= m and m - n < 64"),
        ("encoder_with_padding", 2, "padding"),
        ("custom_score", 1, "sigmoid"),
    ],
)
def test_example(name: str, attentions: int, mask: str, capsys: pytest.CaptureFixture):
    report: flashfuse.Report = importlib.import_module(name).main(OPTIONS)
    text = capsys.readouterr().out
    assert len(report.fused) == attentions
    assert not report.refusals
    assert mask in text
    if "largest difference" in text:
        assert float(text.split("code: ")[1].split()[0]) < 1e-5
    else:
        eager, compiled = (json.loads(line.split(":", 1)[1]) for line in text.splitlines()[:2])
        assert eager == pytest.approx(compiled, rel=1e-4)


def test_training_on_text(capsys: pytest.CaptureFixture):
    eager, compiled = importlib.import_module("train_on_text").main(steps=12, length=32, options=OPTIONS)
    assert compiled[-1] < compiled[0] - 0.5
    assert compiled[-1] == pytest.approx(eager[-1], rel=0.1)  # other random bits, the same model
    assert "2 fused, 0 left alone" in capsys.readouterr().out


def test_explain_as_a_test_of_ones_own():
    module = importlib.import_module("explain_in_ci")
    module.test_every_attention_is_fused()
    module.test_the_mask_is_what_we_mean()


def test_the_notebook_runs():
    """Its cells one after another, without Jupyter."""
    cells = json.loads((EXAMPLES / "explain_in_a_notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = code.replace("\nreport\n", "\nassert '<iframe' in report._repr_html_()\n")
    assert script != code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "n <= m" in done.stdout
