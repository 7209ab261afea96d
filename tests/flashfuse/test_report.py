"""`flashfuse.explain`: the user's line and terms, a reason for every refusal, and always an answer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import flashfuse
import flashfuse.errors
from flashfuse.block_map import EMPTY, FULL, PARTIAL, block_map
from flashfuse.ir.attention_spec import AttentionSpec


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def attention(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def refused(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1).cumprod(-1) @ v


def windowed(q, k, v, bias, padding):
    m, n = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores = 20 * torch.tanh(q @ k.mT * 0.25 / 20) + bias
    scores = scores.masked_fill((n > m) | (m - n >= 100), float("-inf"))
    return scores.masked_fill(~padding[:, None, None], float("-inf")).softmax(-1) @ v


def qkv(length: int = 8, batch: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, 3, length, 16) for _ in range(3))


def test_the_users_line_comes_first_and_his_terms_follow():
    report = flashfuse.explain(windowed, *qkv(256), torch.randn(3, 256, 256), torch.ones(2, 256, dtype=torch.bool))
    assert len(report.fused) == 1
    assert not report.refusals
    text = str(report)
    assert "1 attention in 1 graph: 1 fused, 0 left alone" in text
    assert "FUSED       test_report.py:" in text
    assert "s * 0.25 -> softcap 20 -> + bias[h, m, n]" in text
    assert "n <= m and m - n < 100 and padding[b, n]" in text
    assert "skips blocks by the values of padding" in text
    assert "1.5 MiB of scores not written" in text
    assert not torch._dynamo.utils.counters["flashfuse"]
    (row,) = json.loads(report.to_json())["sites"]
    assert row["path"].endswith(f"tests/flashfuse/{row['where']}")
    assert row["bytes_saved"] == 2 * 3 * 256 * 256 * 4


def test_skipped_blocks_and_grouped_heads():
    def causal(q, k, v):
        k, v = (t.repeat_interleave(3, 1) for t in (k, v))
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    q, k, v = torch.randn(1, 6, 256, 16), torch.randn(1, 2, 256, 16), torch.randn(1, 2, 256, 16)
    text = str(flashfuse.explain(causal, q, k, v))
    assert "n <= m   (causal)   skips 38% of the key blocks" in text  # 6 of 16
    assert "3 query heads share a key head" in text


def test_the_block_map_is_the_mask_itself():
    found = []

    def inner(module, _inputs):
        found.extend(node.args[5] for node in module.graph.nodes if "flashfuse.attention" in str(node.target))
        return module.forward

    def sliding(q, k, v):
        m, n = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return (q @ k.mT).masked_fill((n > m) | (m - n >= 100), float("-inf")).softmax(-1) @ v

    torch.compile(sliding, backend="flashfuse", options={"inner": inner})(*qkv(256))
    from flashfuse.ir.attention_spec import from_text

    spec = from_text(found[0])
    m, n = torch.arange(300)[:, None], torch.arange(260)
    keep = (n <= m) & (m - n < 100)
    blocks = block_map(spec, 300, 260)
    assert blocks is not None
    for i, row in enumerate(blocks.rows):
        for j, cell in enumerate(row):
            block = keep[64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
            assert cell == (FULL if block.all() else PARTIAL if block.any() else EMPTY)
    assert block_map(spec, 0, 260) is None
    large = block_map(spec, 1 << 20, 1 << 20)
    assert large is not None
    assert len(large.rows) <= 96
    assert isinstance(spec, AttentionSpec)


def test_explain_tells_why_not():
    report = flashfuse.explain(refused, *qkv())
    (found,) = report.refusals
    assert found.code == "FF401"
    text = str(report)
    assert "LEFT ALONE  test_report.py:" in text
    assert "then stopped" in text
    assert "hint" in text
    assert "why FF401" in text
    assert json.loads(report.to_json())["sites"][0]["code"] == "FF401"


def test_equal_layers_are_shown_once():
    def layers(q, k, v):
        for _ in range(3):
            q = attention(q, k, v)
        return q

    report = flashfuse.explain(layers, *qkv())
    assert len(report.fused) == 3
    assert str(report).count("FUSED") == 1
    assert "[1-3] FUSED" in str(report)


# ------------------------------------------------------------------------------------------------ always an answer


def test_a_model_that_raises_or_has_no_attention():
    def raising(x):
        raise ValueError("the model's own")

    assert flashfuse.explain(raising, torch.ones(2)).error == "ValueError: the model's own"
    assert "0 attentions" in str(flashfuse.explain(lambda x: x + 1, torch.ones(2)))
    text = str(flashfuse.explain(lambda x: x.softmax(-1), torch.ones(2, 3)))
    assert "1 other softmax is no attention" in text


def test_wrong_shapes_inside_the_model():
    report = flashfuse.explain(attention, torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 6), torch.ones(2, 3, 4, 6))
    assert report.error
    assert "The model itself raised" in str(report)


def test_graph_breaks_are_told():
    def broken(q, k, v):
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(out, k, v)

    report = flashfuse.explain(broken, *qkv())
    assert len(report.fused) == 2
    assert "2 graphs" in str(report)
    assert "broken off once: Call to `torch._dynamo.graph_break()`" in str(report)
    assert list(json.loads(report.to_json())["graph_breaks"].values()) == [1]


def test_without_triton():
    """In a fresh process in which triton cannot be imported."""
    script = (
        "import sys; sys.modules['triton'] = None; import torch, flashfuse\n"
        "q = torch.randn(1, 2, 8, 16)\n"
        "report = flashfuse.explain(lambda q: (q @ q.mT * 0.25).softmax(-1) @ q, q)\n"
        "assert len(report.fused) == 1, report\n"
        "print(report, len(report.to_html()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 fused" in done.stdout


def test_a_graph_that_cannot_be_drawn_costs_only_its_drawing(monkeypatch: pytest.MonkeyPatch):
    def broken(_result):
        raise RuntimeError("planted")

    monkeypatch.setattr("flashfuse.report.draw", broken)
    report = flashfuse.explain(attention, *qkv())
    assert len(report.fused) == 1
    assert not report.error
    assert "s * 0.25" in report.to_html()


@pytest.mark.parametrize(("length", "batch"), [(0, 2), (8, 0), (1, 1)])
def test_lengths_of_zero_and_one(length: int, batch: int):
    report = flashfuse.explain(attention, *qkv(length, batch))
    assert not report.error
    assert len(report.sites) == 1
    assert json.loads(report.to_json())
    assert str(report)


def test_training_and_symbolic_lengths():
    q, k, v = (t.requires_grad_() for t in qkv(48))
    torch._dynamo.mark_dynamic(q, 2)
    torch._dynamo.mark_dynamic(k, 2)
    torch._dynamo.mark_dynamic(v, 2)
    report = flashfuse.explain(attention, q, k, v)
    assert len(report.fused) == 1
    assert "M=s" in str(report)
    assert "saved" not in str(report)


def test_explaining_again_and_again():
    for _ in range(12):  # Dynamo's limit is 8
        assert len(flashfuse.explain(attention, *qkv()).fused) == 1


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(flashfuse.errors.OptionError, match="did you mean 'strict'"):
        flashfuse.explain(attention, *qkv(), options={"strikt": True})
