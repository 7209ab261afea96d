"""`TORCH_LOGS="+flashfuse"` and `TORCH_TRACE`: what is told while compiling, in a fresh process as users do it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import torch

def attention(q, k, v):
    keep = torch.ones(8, 8, dtype=torch.bool).tril()
    fused = (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v
    return fused + (q @ k.mT).softmax(-2) @ v

q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))
torch.compile(attention, backend="flashfuse", options={"inner": "aot_eager"})(q, k, v)
"""


def test_logs_and_trace_in_a_fresh_process(tmp_path: Path):
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "TORCH_LOGS": "+flashfuse", "TORCH_TRACE": str(tmp_path / "trace")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert "fused  user.py:6  s * 0.25; n <= m" in done.stderr
    assert "left alone  user.py:7  FF202" in done.stderr
    assert "[1] FUSED       user.py:6" in done.stderr
    text = next((tmp_path / "trace").iterdir()).read_text()
    records = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"artifact"' in line]
    names = {record["artifact"]["name"] for record in records if "artifact" in record}
    assert {"flashfuse_report", "flashfuse_rewritten_graph"} <= names
    assert any(name.startswith("flashfuse_kernel_") for name in names)
    assert "def flashfuse_forward(" in text
    assert "torch.ops.flashfuse.attention" in text


def test_nothing_is_said_of_other_softmaxes(caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()
    with caplog.at_level(logging.DEBUG, "flashfuse"):
        torch.compile(lambda x: x.softmax(-1), backend="flashfuse", options={"inner": "eager"})(torch.ones(2, 3))
    assert not [record for record in caplog.records if record.name == "flashfuse"]
