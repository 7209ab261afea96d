"""`python -m flashfuse`: output for people and for programs, exit codes, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashfuse import bench, bench_peers
from flashfuse.command_line import CANNOT, LEFT_ALONE, OK, main
from flashfuse.refusal import CATALOGUE

rich = pytest.importorskip("rich", reason="needs rich: pip install 'flashfuse[cli]'")

MODELS = """
import torch

def attention(q, k, v, scale=0.25):
    return (q @ k.mT * scale).softmax(-1) @ v

def normalised_over_queries(q):
    return (q @ q.mT).softmax(-2) @ q

def good():
    return attention, tuple(torch.randn(2, 3, 8, 16) for _ in range(3)), {"scale": 0.5}

def bad():
    return normalised_over_queries, torch.randn(2, 3, 8, 16)

def number():
    return 3
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    torch._dynamo.reset()
    (tmp_path / "my_models.py").write_text(MODELS)
    return str(tmp_path / "my_models.py")


def test_explain(models: str, capsys: pytest.CaptureFixture):
    assert main(["explain", f"{models}:good"]) == OK
    text = capsys.readouterr().out
    assert "FUSED       my_models.py:5" in text
    assert "s * 0.5" in text
    assert main(["explain", f"{models}:bad", "--json"]) == LEFT_ALONE
    assert json.loads(capsys.readouterr().out)["sites"][0]["code"] == "FF202"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "module:factory"),
        ("no.such.module:f", "cannot import no.such.module"),
        ("/no/such.py:f", "there is no file"),
        ("{models}:goodd", "did you mean 'good'"),
        ("{models}:number", "must return model, arguments"),
    ],
)
def test_a_target_that_cannot_be_had(target: str, message: str, models: str, capsys: pytest.CaptureFixture):
    assert main(["explain", target.format(models=models)]) == CANNOT
    assert message in capsys.readouterr().err


def test_why(capsys: pytest.CaptureFixture):
    assert main(["why", "ff203"]) == OK
    text = capsys.readouterr().out
    assert all(word in text for word in ("FF203", CATALOGUE["FF203"].title, CATALOGUE["FF203"].hint))
    assert main(["why", "--json"]) == OK
    assert [row["code"] for row in json.loads(capsys.readouterr().out)] == list(CATALOGUE)
    assert main(["why"]) == OK
    assert "FF501" in capsys.readouterr().out
    assert main(["why", "FF2O3"]) == CANNOT
    assert "did you mean 'FF203'" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture):
    code = main(["doctor", "--json"])
    findings = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert findings["trial"]["state"] == findings["backend"]["state"] == findings["torch"]["state"] == "ok"
    assert code == (LEFT_ALONE if any(row["state"] == "bad" for row in findings.values()) else OK)
    assert all(row["fix"] for row in findings.values() if row["state"] != "ok")
    main(["doctor"])
    assert "largest difference" in capsys.readouterr().out


def test_doctor_in_a_fresh_process():
    """Nothing has been imported yet that the backend might forget to import."""
    done = subprocess.run([sys.executable, "-m", "flashfuse", "doctor", "--json"], capture_output=True, text=True, check=False)
    states = {row["name"]: row["state"] for row in json.loads(done.stdout)}
    assert states["trial"] == "ok", done.stdout + done.stderr


@pytest.mark.parametrize("kernel", ["hopper", "hopper_backward"])
@pytest.mark.parametrize(("fault", "state"), [("", "ok"), ("results differ by 3", "less")])
def test_doctor_tells_of_the_hopper_kernels(fault: str, state: str, kernel: str, monkeypatch: pytest.MonkeyPatch):
    from flashfuse import doctor
    from flashfuse.codegen import hopper, hopper_backward

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hopper, "missing", lambda: "")
    for each in (hopper, hopper_backward):
        found = fault if each.__name__.endswith(f".{kernel}") else ""
        monkeypatch.setattr(each, "distrust", lambda *_facts, found=found: found)
    finding = doctor._hopper()
    assert finding.state == state
    assert fault in finding.found


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    from flashfuse import doctor

    def _broken():
        raise RuntimeError("planted")

    monkeypatch.setattr(doctor, "_gpu", _broken)
    assert [(each.state, each.found) for each in doctor.examine() if each.name == "broken"] == [("bad", "RuntimeError: planted")]


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from flashfuse import doctor

    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path / "kernels"))
    assert main(["cache", "size"]) == OK
    assert "0 kernels" in capsys.readouterr().out
    (tmp_path / "kernels").mkdir()
    other = tmp_path / "kernels" / "mine.txt"
    other.write_text("")
    (tmp_path / "kernels" / "attention_1.py").write_text('"""flashfuse attention 1\n\n    score  s * 0.125\n"""\n')
    (tmp_path / "kernels" / "tuned").mkdir()
    (tmp_path / "kernels" / "tuned" / "1.json").write_text("{}")
    (tmp_path / "kernels" / "answers").mkdir()
    (tmp_path / "kernels" / "answers" / "hopper_1.txt").write_text("results differ by 3")
    assert main(["cache"]) == OK
    listed = capsys.readouterr().out
    assert "s * 0.125" in listed
    assert "hopper_1.txt" in listed
    assert "results differ by 3" in listed
    assert "1 kernels, 1 tuning results, 1 checks" in listed
    assert doctor._cache().found.endswith("1 kernels, 1 tuning results")
    assert main(["cache", "clear", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    assert sorted(path.name for path in (tmp_path / "kernels").rglob("*")) == ["answers", "mine.txt", "tuned"]


def test_without_rich_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["why"]) == CANNOT
    assert 'pip install "flashfuse[cli]"' in capsys.readouterr().err
    assert main(["why", "--json"]) == OK


def test_bench(capsys: pytest.CaptureFixture, models: str):
    quick = ["bench", "--variants", "causal", "--peers", "eager,flashfuse", "--length", "64", "--head-dim", "16", "--rounds", "1"]
    assert main([*quick, "--json"]) == OK
    rows = {row["peer"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["flashfuse"]["counters"]["fused"] >= 1
    assert all(row["right"] and row["forward_ms"] > 0 and row["both_ms"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert main(["bench", "--variants", "casual"]) == CANNOT
    assert "did you mean 'causal'" in capsys.readouterr().err
    assert main(["bench", "--model", f"{models}:good", "--peers", "eager", "--rounds", "1"]) == OK
    assert "right" in capsys.readouterr().out


def test_every_peer_begins_rounds():
    rounds = [bench_peers.turned(["eager", "flex", "flashfuse"], number) for number in range(4)]
    assert [each[0] for each in rounds] == ["eager", "flex", "flashfuse", "eager"]
    assert rounds[1] == ["flex", "flashfuse", "eager"]
    assert bench_peers.turned([], 1) == []


def test_a_picture_without_matplotlib_is_an_error_before_anything_is_measured(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "variant_rows", lambda *_given: pytest.fail("measured first"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--plot", "times.png"]) == CANNOT
    assert "pip install matplotlib" in capsys.readouterr().err
