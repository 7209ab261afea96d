"""A score function that nobody has a kernel for: a learned distance for each head, squashed, with its gradient.

Every key's score is damped by how far away it is, with a rate that each head learns. flashfuse derives the backward of the
score, of the rates too.

    python examples/custom_score.py
"""

from __future__ import annotations

from typing import Any

import torch

import flashfuse


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    position = torch.arange(q.shape[-2], device=q.device)
    distance = (position[:, None] - position[None, :]).abs()
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores * torch.sigmoid(scores) - rate[:, None, None] * torch.log1p(distance.float())
    return scores.softmax(dim=-1) @ v


def main(options: dict[str, Any] | None = None) -> flashfuse.Report:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 256, 32, device=device) for _ in range(3))
    rate = torch.rand(4, device=device, requires_grad=True)
    compiled = torch.compile(attention, backend="flashfuse", options=options)
    gradients = [torch.autograd.grad(each(q, k, v, rate).square().sum(), rate)[0] for each in (attention, compiled)]
    print(f"gradient of the rates, eager:    {gradients[0].tolist()}")
    print(f"gradient of the rates, compiled: {gradients[1].tolist()}\n")
    report = flashfuse.explain(attention, q, k, v, rate)
    print(report)
    return report


if __name__ == "__main__":
    main()
