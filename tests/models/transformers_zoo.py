"""Transformers families as small random models with inputs that fit: rules first, one row for what differs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from shrink import FIRST_TEXT_TOKEN, IMAGE, VOCABULARY, shrink
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

BATCH, LENGTH, PADDED = 2, 18, 5


@dataclass(frozen=True)
class Row:
    """What a family needs beyond the rules.

    model: class name, where the one of AutoModel is not wanted. config: fields to set, nested as in the config.
    inputs: makers of inputs that the rules get wrong, called with the config; None leaves an input out.
    """

    name: str
    model: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Callable[[Any], Any] | None] = field(default_factory=dict)


def build(row: Row, *, dropout: float = 0.0) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with random weights in eager attention, and its inputs; the second row of texts is padded on the right."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = small_config(row, dropout)
    name = row.model or MODEL_MAPPING_NAMES[row.name]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    model = model_class._from_config(config, attn_implementation="eager", experts_implementation="batched_mm")
    randomise(model)
    return model, inputs_of(row, model, config)


def small_config(row: Row, dropout: float) -> Any:
    """The config of a row. Fields that do not exist are errors."""
    config_class = type(CONFIG_MAPPING[row.name]()) if row.name in CONFIG_MAPPING else getattr(transformers, row.name)
    values = shrink(config_class().to_dict(), dropout)
    _merge(values, row.config)
    for derived in ("transformers_version", "architectures", "dtype", "model_type", "_name_or_path"):
        values.pop(derived, None)
    if "use_cache" in values:
        values["use_cache"] = False
    return config_class(**values)


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def randomise(model: torch.nn.Module) -> None:
    """Weights that let every part of the model matter: rows of unit variance, nothing left at zero or one.

    With the usual 0.02 all scores are nearly equal, and a wrong scale or mask would hardly show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, max(1, parameter[:1].numel()) ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))


# ------------------------------------------------------------------------------------------------ inputs


def inputs_of(row: Row, model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """The inputs that the forward's signature asks for, as far as the rules know them."""
    torch.manual_seed(1)
    names = inspect.signature(model.forward).parameters
    wanted = {name for name in names if name in MAKERS and _is_wanted(name, names, model, config)}
    found = {name: MAKERS[name](config) for name in sorted(wanted)}
    for name, make in row.inputs.items():
        found.pop(name, None)
        if make is not None:
            found[name] = make(config)
    return found


def _is_wanted(name: str, names: Any, model: Any, config: Any) -> bool:
    """Only the main input and what goes with it: texts of models that also read pictures are read without, if they can."""
    main = model.main_input_name
    if name in (main, "decoder_input_ids"):
        return True
    if name == "attention_mask":
        return "input_ids" in names and main in ("input_ids", "input_values", "pixel_values")
    if name == "input_ids":
        return True
    if name == "pixel_values":
        return "input_ids" in names and not _has_placeholders(config)
    return name in ("bbox",)


def _has_placeholders(config: Any) -> bool:
    return any(hasattr(config, name) for name in ("image_token_id", "image_token_index", "image_token", "boi_token_id"))


def texts(_config: Any = None) -> Tensor:
    """Token ids [B, S] without special tokens."""
    return torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (BATCH, LENGTH))


def keep(_config: Any = None) -> Tensor:
    """Which tokens are no padding, int64 [B, S]."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -PADDED:] = 0
    return mask


def part(config: Any, *names: str) -> Any:
    """The first of some fields found in a config or in its sub-configs."""
    for place in (config, *(getattr(config, n, None) for n in ("vision_config", "audio_config", "encoder_config"))):
        for name in names:
            value = getattr(place, name, None)
            if value is not None:
                return value
    return None


def picture(config: Any) -> Tensor:
    size = part(config, "image_size", "img_size") or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, part(config, "num_channels", "in_channels", "in_chans") or 3, height, width)


def boxes(_config: Any = None) -> Tensor:
    corners = torch.randint(0, 100, (BATCH, LENGTH, 2))
    return torch.cat([corners, corners + torch.randint(1, 20, corners.shape)], -1)


def waves(_config: Any = None) -> Tensor:
    return torch.randn(BATCH, 6400)


def spectra(config: Any) -> Tensor:
    """Log-mel features [B, mel, T]."""
    bins = part(config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
    return torch.randn(BATCH, bins, 2 * (part(config, "max_source_positions") or 32))


def frames(config: Any) -> Tensor:
    """Videos [B, T, C, H, W]."""
    size = part(config, "image_size") or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(BATCH, part(config, "num_frames", "frames_per_clip") or 4, 3, height, width)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "input_ids": texts, "attention_mask": keep, "decoder_input_ids": texts, "pixel_values": picture, "bbox": boxes,
    "input_values": waves, "input_features": spectra, "pixel_values_videos": frames,
}  # fmt: skip
