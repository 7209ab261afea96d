"""What flashfuse itself costs while a deep model compiles: seconds of its own, and one kernel for all layers that are alike.

How much of a whole compile that is: `benchmarks/compile_time.py`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flashfuse import backend
from flashfuse.options import Options

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LAYERS, LENGTH, LIMIT = 24, 16, 3.0  # seconds
CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 99, "sliding_window": 4, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gemma(layers: int) -> torch.nn.Module:
    """Grouped heads and a softcap, and by turns a sliding window and none: two kinds of layers."""
    config = transformers.Gemma2Config(num_hidden_layers=layers, **CONFIG)
    return transformers.Gemma2Model._from_config(config, attn_implementation="eager").eval()


def run(model: torch.nn.Module, *, train: bool = False) -> dict[str, int]:
    """The model once through flashfuse on a padded text, with its backward or without; what the counters say."""
    ids, mask = torch.randint(5, 99, (1, LENGTH)), (torch.arange(LENGTH) < LENGTH - 3).long()[None]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "eager"})
    with torch.set_grad_enabled(train):
        out = compiled(input_ids=ids, attention_mask=mask)[0]
    if train:
        out.sum().backward()
    return dict(torch._dynamo.utils.counters["flashfuse"])


def test_a_deep_model_costs_less_than_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    specs: list[str] = []
    fuse = backend.fuse

    def timed(module: torch.fx.GraphModule, options: Options) -> Any:
        start = time.process_time()
        found = fuse(module, options)
        seconds.append(time.process_time() - start)
        specs.extend(site.spec.key for site in found.record.sites if site.spec is not None)
        return found

    monkeypatch.setattr(backend, "fuse", timed)
    assert run(gemma(LAYERS)) == {"fused": LAYERS}
    assert (len(seconds), len(specs), len(set(specs))) == (1, LAYERS, 2)
    assert seconds[0] < LIMIT


def test_each_distinct_kernel_is_emitted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forward and backward of two layers of each kind, in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("triton was imported for the device")
    load = pytest.importorskip("flashfuse.codegen.load")
    from flashfuse.codegen.plan import kernel_plan

    monkeypatch.setenv("FLASHFUSE_INTERPRET", "1")
    monkeypatch.setenv("FLASHFUSE_STRICT", "1")
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(load, "_modules", {})
    write_kernel, written = load.write_kernel, []
    monkeypatch.setattr(load, "write_kernel", lambda *arguments: written.append(arguments[0].key) or write_kernel(*arguments))
    kernel_plan.cache_clear()
    assert run(gemma(4), train=True) == {"fused": 4}
    assert len(written) == len(set(written)) == len(list(tmp_path.glob("attention_*.py"))) == 2
    assert kernel_plan.cache_info().misses == 1, "one device, one dtype and one head dim"
    assert kernel_plan.cache_info().hits >= 3 * 4 - 1, "a launch a layer forward, two backward"
