"""Whole transformers models, randomly initialised and unchanged: every attention fused, outputs and gradients right.

Training runs with dropout 0; the measure is FlashAttention's factor of two over same-precision eager, against float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 99, 18


@dataclass(frozen=True)
class Family:
    """One architecture: its classes, how its config differs from `BASE`, how many attentions two layers have."""

    name: str
    model: str
    config: str
    overrides: dict[str, Any] = field(default_factory=dict)
    sites: int = 2
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    base: bool = True
    dynamic: bool = True  # False where another family has the same attention, and training tells the rest


BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDLE = dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0)
GROUPED = {"num_key_value_heads": 2}

FAMILIES = (
    Family("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    Family("llama without a mask", "LlamaForCausalLM", "LlamaConfig", GROUPED, inputs=("input_ids",)),
    Family("mistral", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}, dynamic=False),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, dynamic=False),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config",
           {**GROUPED, "head_dim": 16, "attn_logit_softcapping": None, "sliding_window": 6}),
    Family("gpt2", "GPT2LMHeadModel", "GPT2Config",
           {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "attn_pdrop": 0.0,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}, base=False),
    Family("opt", "OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, dynamic=False),
    Family("bert", "BertModel", "BertConfig"),
    Family("roberta", "RobertaModel", "RobertaConfig", dynamic=False),
    Family("vit", "ViTModel", "ViTConfig", {"image_size": 32, "patch_size": 8}, inputs=("pixel_values",)),
    Family("bart", "BartModel", "BartConfig",
           {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
            "max_position_embeddings": 64, "activation_dropout": 0.0}, sites=6, base=False, dynamic=False),
    Family("t5", "T5Model", "T5Config",
           {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": VOCABULARY,
            "dropout_rate": 0.0}, sites=6, inputs=("input_ids", "attention_mask", "decoder_input_ids"), base=False),
)  # fmt: skip


def build(family: Family, *, training: bool) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model in eager attention, and its inputs; the second row is padded on the right."""
    config_class = getattr(transformers, family.config)
    values = {**(BASE if family.base else {}), **IDLE, **family.overrides}
    torch.manual_seed(0)
    config = config_class(**values, attn_implementation="eager")
    model = getattr(transformers, family.model)(config).train(training)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    keep = torch.ones(2, LENGTH, dtype=torch.long)
    keep[1, -5:] = 0
    everything = {
        "input_ids": ids, "attention_mask": keep, "decoder_input_ids": ids.flip(1), "pixel_values": torch.randn(2, 3, 32, 32),
    }  # fmt: skip
    return model, {name: everything[name] for name in family.inputs}


def outputs(model: Callable, module: torch.nn.Module, inputs: dict, *, training: bool) -> list[torch.Tensor]:
    """Main output, and in training the loss and the gradient of every parameter."""
    with torch.set_grad_enabled(training):
        result = model(**inputs)
    main = result.logits if "logits" in result else result.last_hidden_state
    if not training:
        return [main]
    keep = inputs.get("attention_mask")
    kept = main[keep.bool()] if keep is not None and main.shape[:2] == keep.shape else main
    loss = kept.square().mean()
    module.zero_grad()
    loss.backward()
    # a parameter that the loss does not use has no gradient in eager code and a zero one in compiled code
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return [main.detach(), loss.detach(), *gradients]


_RUNS = [(f, mode) for mode in ("train", "eval, dynamic") for f in FAMILIES if mode == "train" or f.dynamic]


@pytest.mark.parametrize(("family", "mode"), _RUNS, ids=[f"{family.name}-{mode}" for family, mode in _RUNS])
def test_every_attention_is_fused_and_right(family: Family, mode: str):
    training = mode == "train"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = build(family, training=training)
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "aot_eager"}, dynamic="dynamic" in mode)
    ours = [t.clone() for t in outputs(compiled, model, inputs, training=training)]
    counters = torch._dynamo.utils.counters["flashfuse"]
    assert (counters["fused"], counters["refused"]) == (family.sites, 0)
    eager = [t.clone() for t in outputs(model, model, inputs, training=training)]
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = outputs(model.double(), model, wide, training=training)
    assert len(ours) == len(eager) == len(exact)
    for mine, same, best in zip(ours, eager, exact, strict=True):
        assert mine.shape == same.shape
        noise = 2 * ((best + 0.3 - 0.3) - best).abs().max() + 4e-6 * best.abs().max() + 1e-7
        error, allowed = (mine - best).abs().max(), 2 * (same - best).abs().max() + noise
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}, shape {tuple(mine.shape)}"


@pytest.mark.parametrize("training", [True, False])
def test_gpt_oss_has_its_sinks(training: bool):
    """Against float32: its experts have no float64."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    overrides = {**GROUPED, "head_dim": 16, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}
    model, inputs = build(Family("gpt-oss", "GptOssForCausalLM", "GptOssConfig", overrides), training=training)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "aot_eager"})
    ours = [t.clone() for t in outputs(compiled, model, inputs, training=training)]
    counters = torch._dynamo.utils.counters["flashfuse"]
    assert (counters["fused"], counters["refused"]) == (2, 0)
    for mine, eager in zip(ours, outputs(model, model, inputs, training=training), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-6, rtol=1e-4)


def test_training_with_dropout():
    """The same seed gives the same step, and dropout changes it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bert = next(family for family in FAMILIES if family.name == "bert")
    family = Family("bert with dropout", bert.model, bert.config, {"attention_probs_dropout_prob": 0.2})
    model, inputs = build(family, training=True)
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "aot_eager"})
    steps = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        steps.append([t.clone() for t in outputs(compiled, model, inputs, training=True)])
    counters = torch._dynamo.utils.counters["flashfuse"]
    assert (counters["fused"], counters["refused"]) == (2, 0)
    assert all(torch.equal(one, again) for one, again in zip(steps[0], steps[1], strict=True))
    assert not torch.equal(steps[0][0], steps[2][0])


def test_left_padding_equals_eager():
    """Rows whose keys are all padding: eager code gives the mean of all values, and so must the fused attention.

    (Against float32: in float64 the model's own float32 softmax turns the float64 fill into -inf, hence NaN.)
    """
    torch._dynamo.reset()
    model, inputs = build(FAMILIES[0], training=True)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "aot_eager"})
    ours = [t.clone() for t in outputs(compiled, model, inputs, training=True)]
    for mine, eager in zip(ours, outputs(model, model, inputs, training=True), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-6, rtol=1e-4)
