"""The documentation says what is so: the tutorial's program and outputs, the refusals, the measured tables, the links."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from flashfuse.command_line import LEFT_ALONE, OK, main
from flashfuse.options import Options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def block(text: str, mark: str) -> list[str]:
    """The lines of the fenced block after a mark."""
    return text.split(mark, 1)[1].split("```", 2)[1].splitlines()[1:]


def test_the_tutorials_program_and_outputs(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("rich", reason="needs rich: pip install 'flashfuse[cli]'")
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    program = "\n".join(block(text, "Save this as `model.py`:")) + "\n"
    (tmp_path / "model.py").write_text(program)
    torch._dynamo.reset()
    assert main(["explain", f"{tmp_path}/model.py:factory"]) == OK
    shown = capsys.readouterr().out
    for line in block(text, "<!-- output: explain -->"):
        assert line in shown.splitlines(), shown
    (tmp_path / "model.py").write_text(program.replace("dim=-1)\n        return", "dim=-2)\n        return"))
    torch._dynamo.reset()
    assert main(["explain", f"{tmp_path}/model.py:factory"]) == LEFT_ALONE
    shown = capsys.readouterr().out
    for line in block(text, "<!-- output: refusal -->"):
        assert line in shown.splitlines(), shown


def test_the_catalogue_of_refusals(capsys: pytest.CaptureFixture):
    main(["why", "--markdown"])
    same = (DOCS / "refusals.md").read_text(encoding="utf-8") == capsys.readouterr().out
    assert same, "python -m flashfuse why --markdown > docs/refusals.md"


def test_every_option_is_documented():
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    own = set(Options.__dataclass_fields__) - {"mode", "inductor"}
    assert own == set(re.findall(r"^\| `(\w+)` \|", text.split("## Environment")[0], re.MULTILINE))
    sources = "".join(path.read_text(encoding="utf-8") for folder in ("flashfuse", "patterns", "codegen")
                      for path in (ROOT / folder).rglob("*.py"))  # fmt: skip
    read = set(re.findall(r'environ\.get\("(FLASHFUSE_\w+)"', sources))
    assert read == set(re.findall(r"`(FLASHFUSE_\w+?)=", text.split("## Environment")[1].split("##")[0]))


def test_the_page_of_measurements_is_the_results_files():
    specification = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    page = (DOCS / "measurements.md").read_text(encoding="utf-8")
    assert page == tables.written(page), "python benchmarks/tables.py --write"
    assert page.count("| plain, 8192 |") == 2


def test_the_measured_tables_are_the_results_files():
    runs = json.loads((ROOT / "benchmarks/results/attention_variants.json").read_text())
    rows = [row for run in runs for row in run["rows"]]
    measured = {f"{row['forward_ms']:.2f} / {row['both_ms']:.2f}" for row in rows}
    text = (DOCS / "comparison.md").read_text(encoding="utf-8").split("## Measured")[1]
    shown = re.findall(r"\d+\.\d\d / \d+\.\d\d", text)
    assert len(shown) > 20
    assert set(shown) <= measured


@pytest.mark.parametrize("page", [*sorted(path.name for path in DOCS.glob("*.md")), "../README.md"])
def test_links_lead_somewhere(page: str):
    path = DOCS / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target
