"""Train a small character model with dropout on the first pages of Alice in Wonderland, eagerly and compiled.

Dropout in the attention's probabilities is part of the kernel; its random bits are not eager code's, so the two losses
are alike and not equal.

    python examples/train_on_text.py [steps]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from quickstart import TEXT

import flashfuse


class Block(torch.nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(torch.nn.Module):
    def __init__(self, letters: int, length: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.letters, self.places = torch.nn.Embedding(letters, width), torch.nn.Embedding(length, width)
        self.blocks = torch.nn.ModuleList(Block(width, heads, dropout=0.1) for _ in range(layers))
        self.head = torch.nn.Linear(width, letters)

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        x = self.letters(letters) + self.places(torch.arange(letters.shape[1], device=letters.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def losses(steps: int, length: int, *, compiled: bool, options: dict[str, Any] | None) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    alphabet = sorted(set(TEXT))
    text = torch.tensor([alphabet.index(letter) for letter in TEXT], device=device)
    model = Model(len(alphabet), length).to(device)
    run = torch.compile(model, backend="flashfuse", options=options) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (8,)).tolist()
        batch = torch.stack([text[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(run(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


def main(steps: int = 200, length: int = 128, options: dict[str, Any] | None = None) -> tuple[list[float], list[float]]:
    eager = losses(steps, length, compiled=False, options=options)
    compiled = losses(steps, length, compiled=True, options=options)
    for step in sorted({0, *range(9, steps, max(10, steps // 10)), steps - 1}):
        print(f"step {step + 1:4}   eager {eager[step]:.3f}   compiled {compiled[step]:.3f}")
    print(f"\n{flashfuse.explain(Model(50, length), torch.zeros(8, length, dtype=torch.long))}")
    return eager, compiled


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
