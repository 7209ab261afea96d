"""One query a head against a long key/value cache, as `generate` with a static cache asks for it.

Milliseconds, and the speed at which keys and values were read as a share of that of a device-to-device copy in the same
run. The code is transformers' eager attention; its mask hides what lies beyond the position. Correctness against float64.
`graph_ms` is a call's share of a CUDA graph of many calls on keys that no cache still holds.

    python benchmarks/decode.py [--length 32768] [--out decode]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import ResultFile
from torch import Tensor

from flashfuse.bench_peers import median_ms
from flashfuse.bench_variants import repeat_kv

SHAPES = ((1, 32, 8, 128), (4, 32, 8, 128), (16, 32, 8, 128), (4, 16, 16, 128), (4, 32, 8, 64), (1, 71, 1, 64))  # B H G D

IN_GRAPHS = ("sdpa", "flashfuse")
CACHE_BYTES = 2**27  # more than any cache holds


def eager(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    times = query.size(1) // key.size(1)
    key, value = repeat_kv(key, times), repeat_kv(value, times)
    hidden = torch.arange(key.size(2), device=key.device)[None, :] > position[:, None]
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, torch.finfo(query.dtype).min)
    scores = torch.matmul(query, key.transpose(2, 3)) * query.size(-1) ** -0.5 + mask[None, None]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """Without a mask, which here hides nothing: the fastest kernel that PyTorch can choose."""
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def flex(length: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    last = torch.tensor(length - 1, device="cuda")
    block_mask = create_block_mask(lambda b, h, m, n: n <= m + last, None, None, 1, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value, position: compiled(query, key, value, block_mask=block_mask, enable_gqa=True)


def copy_gigabytes_a_second() -> float:
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), "cuda", []) / 1e6


def graph_ms(run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> float:
    """Milliseconds of one of the calls of a CUDA graph, which go round copies of the keys and values."""
    copies = -(-CACHE_BYTES // (2 * key.numel() * key.element_size()))
    pairs = [(key, value), *((key.clone(), value.clone()) for _ in range(copies))]
    calls = len(pairs) * -(-16 // len(pairs))

    def all_calls() -> None:
        for number in range(calls):
            run(query, *pairs[number % len(pairs)], position)

    all_calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    return median_ms(graph.replay, "cuda", []) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--out", default="decode", help="added to benchmarks/results/OUT.json")
    options = parser.parse_args()
    speed = copy_gigabytes_a_second()
    results = ResultFile(options.out, "cuda", length=options.length, dtype="torch.bfloat16", copy_gigabytes_a_second=speed)
    for batch, heads, groups, head_dim in SHAPES:
        torch._dynamo.reset()  # or the later shapes meet the limit of recompilations
        peers = {
            "eager": eager, "sdpa": sdpa, "inductor": torch.compile(eager, dynamic=False),
            "flex": flex(options.length), "flashfuse": torch.compile(eager, backend="flashfuse", dynamic=False),
        }  # fmt: skip
        query = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(batch, groups, options.length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        position = torch.tensor([options.length - 1], device="cuda")
        exact = eager(query[:1].double(), key[:1].double(), value[:1].double(), position)
        allowed = 2 * (eager(query, key, value, position)[:1].double() - exact).abs().max().item()
        for peer, run in peers.items():
            row = {"peer": peer, "batch": batch, "heads": heads, "groups": groups, "head_dim": head_dim}
            try:
                with torch.no_grad():
                    error = (run(query, key, value, position)[:1].double() - exact).abs().max().item()
                    ms = median_ms(lambda: run(query, key, value, position), "cuda", [])  # noqa: B023
                    in_graph = graph_ms(run, query, key, value, position) if peer in IN_GRAPHS else None
            except Exception as failure:  # a peer that cannot run this is a result too
                results.add({**row, "failure": f"{type(failure).__name__}: {str(failure)[:200]}"})
                continue
            share = 2 * key.numel() * key.element_size() / ms / 1e6 / speed
            found = {"ms": ms, "share_of_copy": share, "error": error, "allowed": allowed, "right": error <= allowed}
            said = f"{batch:3}{heads:4}{groups:3}{head_dim:4} {peer:16}{ms:9.3f} ms{100 * share:7.1f}%"
            if in_graph is not None:
                found |= {"graph_ms": in_graph, "graph_share_of_copy": share * ms / in_graph}
                said += f"  in a graph{in_graph:9.3f} ms{100 * share * ms / in_graph:7.1f}%"
            results.add({**row, **found})
            print(f"{said}  right {error <= allowed}", flush=True)


if __name__ == "__main__":
    main()
