"""A decoder layer with a sliding window of 64 positions, written as eager code: the mask becomes a predicate in the kernel.

    python examples/sliding_window.py
"""

from __future__ import annotations

from typing import Any

import torch

import flashfuse


class Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        m = torch.arange(x.shape[1], device=x.device)[:, None]
        n = torch.arange(x.shape[1], device=x.device)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores.masked_fill((n > m) | (m - n >= self.window), float("-inf"))
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def main(options: dict[str, Any] | None = None) -> flashfuse.Report:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Attention(64, 4, window=64).to(device)
    x = torch.randn(2, 512, 64, device=device)
    compiled = torch.compile(model, backend="flashfuse", options=options)
    print(f"largest difference from eager code: {(compiled(x) - model(x)).abs().max().item():.1e}\n")
    report = flashfuse.explain(model, x)
    print(report)
    return report


if __name__ == "__main__":
    main()
