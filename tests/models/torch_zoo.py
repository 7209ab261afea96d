"""torch's own attention modules, and models of timm and diffusers with fused attention off, where these are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 12
Built = tuple[nn.Module, dict[str, Any]]


class _Self(nn.Module):
    """nn.MultiheadAttention on one sequence, with padding, causal or with its weights wanted."""

    def __init__(self, dropout: float, *, causal: bool, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)
        self.causal, self.weights = causal, weights

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor | None]:
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1) if self.causal else None
        pad = padding if mask is None else torch.zeros(padding.shape, dtype=x.dtype).masked_fill(padding, float("-inf"))
        out, weights = self.attention(x, x, x, key_padding_mask=pad, attn_mask=mask, need_weights=self.weights)
        return out, weights


def _sequence() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


def _padding() -> Tensor:
    return torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 4]])


def _multihead(*, causal: bool, weights: bool) -> Callable[[float], Built]:
    return lambda dropout: (_Self(dropout, causal=causal, weights=weights), {"x": _sequence(), "padding": _padding()})


def _encoder(dropout: float) -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": _sequence(), "src_key_padding_mask": _padding()}


def _decoder(dropout: float) -> Built:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return nn.TransformerDecoder(layer, 2), {"tgt": _sequence(), "memory": torch.randn(BATCH, 7, WIDTH), "tgt_mask": mask}


def _timm(name: str, size: int = 64, **how: Any) -> Callable[[float], Built]:
    def make(dropout: float) -> Built:
        _operators_of_torchvision()
        import timm

        timm.layers.set_fused_attn(False)
        model = timm.create_model(name, **how)
        for place, part in model.named_modules():  # not every model has an argument for it
            if place.endswith("attn_drop") and isinstance(part, nn.Dropout):
                part.p = dropout
        return model, {"x": torch.randn(BATCH, 3, size, size)}

    return make


def _operators_of_torchvision() -> None:
    """Names that timm's import needs, where a torchvision built for another torch cannot register its own."""
    for name in ("nms", "qnms"):
        if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _diffusers(name: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Callable[[float], Built]:
    def make(dropout: float) -> Built:
        _operators_of_torchvision()
        import diffusers
        from diffusers.models.attention_processor import AttnProcessor

        model = getattr(diffusers, name)(**config)
        for part in model.modules():
            if hasattr(part, "set_processor"):
                part.set_processor(AttnProcessor())
        return model, inputs()

    return make


def _noisy(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": torch.randn(BATCH, 4, 16, 16), "timestep": torch.tensor([3, 7]),
                    **{name: make() for name, make in more.items()}}  # fmt: skip


UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "in_channels": 4, "out_channels": 4,
        "sample_size": 16}  # fmt: skip

TORCH: dict[str, Callable[[float], Built]] = {
    "nn.MultiheadAttention": _multihead(causal=False, weights=False),
    "nn.MultiheadAttention causal": _multihead(causal=True, weights=False),
    "nn.MultiheadAttention with weights": _multihead(causal=False, weights=True),
    "nn.TransformerEncoder": _encoder, "nn.TransformerDecoder": _decoder,
}  # fmt: skip
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
TIMM: dict[str, Callable[[float], Built]] = {
    "timm vit": _timm("vit_tiny_patch16_224", **VIT), "timm deit": _timm("deit_tiny_patch16_224", **VIT),
    "timm eva": _timm("eva02_tiny_patch14_224", **VIT), "timm beit": _timm("beit_base_patch16_224", **VIT),
    "timm cait": _timm("cait_xxs24_224", **VIT),
    "timm xcit": _timm("xcit_nano_12_p16_224", **VIT | {"num_heads": 4}),
    "timm swin": _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    "timm swinv2": _timm("swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    "timm pvt": _timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
    "timm levit": _timm("levit_128s", size=128, img_size=128),
    "timm mvitv2": _timm("mvitv2_tiny", img_size=64),
    "timm davit": _timm("davit_tiny", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 4)),
}  # fmt: skip
DIFFUSERS: dict[str, Callable[[float], Built]] = {
    "diffusers UNet2DConditionModel": _diffusers(
        "UNet2DConditionModel", _noisy(encoder_hidden_states=lambda: torch.randn(BATCH, 5, 32)), cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **UNET),
    "diffusers UNet2DModel": _diffusers(
        "UNet2DModel", _noisy(), attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **UNET),
    "diffusers DiTTransformer2DModel": _diffusers(
        "DiTTransformer2DModel", lambda: {"hidden_states": torch.randn(BATCH, 4, 16, 16), "timestep": torch.tensor([3, 7]),
                                          "class_labels": torch.tensor([1, 2])},
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, norm_num_groups=8),
}  # fmt: skip


def installed() -> dict[str, Callable[[float], Built]]:
    """The builders whose packages are there."""
    return {
        **TORCH,
        **(TIMM if _all_found("timm", "torchvision") else {}),
        **(DIFFUSERS if _all_found("diffusers", "PIL") else {}),
    }


def _all_found(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)
