"""torch.nn.MultiheadAttention over sentences of different lengths: padded keys are skipped block by block.

    python examples/encoder_with_padding.py
"""

from __future__ import annotations

from typing import Any

import torch

import flashfuse


class Encoder(torch.nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.attentions = torch.nn.ModuleList(
            torch.nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers)
        )
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        for attention, norm in zip(self.attentions, self.norms, strict=True):
            y = norm(x)
            x = x + attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x.masked_fill(padding[..., None], 0.0)


def main(options: dict[str, Any] | None = None) -> flashfuse.Report:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Encoder(64, 4, layers=2).to(device).train()  # nn.MultiheadAttention's eval fast path is one opaque call
    x, lengths = torch.randn(3, 200, 64, device=device), torch.tensor([200, 120, 31], device=device)
    compiled = torch.compile(model, backend="flashfuse", options=options)
    print(f"largest difference from eager code: {(compiled(x, lengths) - model(x, lengths)).abs().max().item():.1e}\n")
    report = flashfuse.explain(model, x, lengths)
    print(report)
    return report


if __name__ == "__main__":
    main()
