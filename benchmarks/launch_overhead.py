"""What a call of one small attention costs the host: flashfuse on eager code beside Inductor's call of SDPA, and FlexAttention.

Causal, S = 128, B = 4, 32 heads of 64, bfloat16: the device is done long before the host. Microseconds a call without waiting
for the device, medians of interleaved rounds of 200 calls; `graph` rows are torch.compile's mode="reduce-overhead", where
a call replays a CUDA graph. Outputs are compared with float64, at most twice eager's error is right.

    python benchmarks/launch_overhead.py [--length 128] [--rounds 9] [--out launch_overhead]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import ResultFile
from torch import Tensor

CALLS = 200


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.size(-2)
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = query @ key.transpose(-2, -1) * query.size(-1) ** -0.5
    return torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def flex(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length, device="cuda")
    return torch.compile(lambda query, key, value: flex_attention(query, key, value, block_mask=mask))


def microseconds(run: Callable[[], object]) -> float:
    """Of the host for one call, without waiting for the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="launch_overhead", help="added to benchmarks/results/OUT.json")
    options = parser.parse_args()
    shape = (4, 32, options.length, 64)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad_out = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    exact = eager(*(tensor.double() for tensor in inputs))
    allowed = 2 * float((eager(*inputs) - exact).abs().max())
    peers = {
        "sdpa": torch.compile(sdpa),
        "flex": flex(options.length),
        "flashfuse": torch.compile(eager, backend="flashfuse"),
        "sdpa graph": torch.compile(sdpa, mode="reduce-overhead"),
        "flashfuse graph": torch.compile(eager, backend="flashfuse", mode="reduce-overhead"),
    }

    def forward(peer: str) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return peers[peer](*inputs)

    def both(peer: str) -> None:
        peers[peer](*inputs).backward(grad_out)
        for tensor in inputs:
            tensor.grad = None

    results = ResultFile(options.out, "cuda", shape=shape, dtype="torch.bfloat16", calls=CALLS)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    errors = {}
    for peer in peers:
        for _ in range(10):
            out = forward(peer)
        errors[peer] = float((out.double() - exact).abs().max())
        runs["forward_us", peer] = lambda peer=peer: forward(peer)
        if not peer.endswith("graph"):
            runs["both_us", peer] = lambda peer=peer: both(peer)
            both(peer)
    found: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            found[name].append(microseconds(run))
    for peer in peers:
        times = {what: statistics.median(found[what, peer]) for what in ("forward_us", "both_us") if (what, peer) in found}
        results.add({"peer": peer, **times, "error": errors[peer], "allowed": allowed, "right": errors[peer] <= allowed})
        words = ", ".join(f"{what.removesuffix('_us')} {value:.1f} us" for what, value in times.items())
        print(f"{peer:16} {words}, error {errors[peer]:.2e} of {allowed:.2e}")


if __name__ == "__main__":
    main()
