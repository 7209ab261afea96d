"""All models of the zoo by name."""

from __future__ import annotations

from typing import Any

import torch
import torch_zoo
import transformers
import transformers_rows
import transformers_zoo

ROWS = {row.name: row for row in transformers_rows.ROWS}
OTHERS = torch_zoo.installed()
NAMES = (*ROWS, *OTHERS)


def build(name: str, *, dropout: float = 0.0) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with random weights, and its inputs."""
    if name in ROWS:
        return transformers_zoo.build(ROWS[name], dropout=dropout)
    torch.manual_seed(0)
    model, inputs = OTHERS[name](dropout)
    transformers_zoo.randomise(model)
    return model, inputs


def available() -> list[str]:
    """The families that the installed transformers has, and everything else."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [name for name in NAMES if name not in ROWS or name in CONFIG_MAPPING or hasattr(transformers, name)]


def preload() -> None:
    """Import what all families need, and compile something small, before processes are forked."""
    from measure import Mode, measure
    from transformers import BertModel, CLIPModel, LlamaModel, T5Model, WhisperModel  # noqa: F401

    measure(*build("nn.MultiheadAttention"), Mode.of("infer-fp32-static"))
    torch._dynamo.reset()
