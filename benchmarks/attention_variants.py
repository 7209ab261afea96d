"""Attention as people write it (flashfuse/bench_variants.py), forward and forward+backward, and other ways to run it.

Peers: eager; inductor and flashfuse, which are torch.compile on the same code; sdpa and flex, hand-made
(the fused SDPA operator, with an explicit mask where its causal flag does not say it, and compiled
FlexAttention with its block mask). Masks of the hand-made peers are built before the clock starts; the
block mask's own time is reported. S = 4096, B*S = 16384 tokens, hidden width 2048, bfloat16.

In the same run, on the same fresh random inputs, the output and gradients of one batch row and one
key/value head are compared with float64: `error` is the largest ratio of a peer's error to eager's, and at
most 2 is right (FlashAttention's rule). Times are medians of interleaved rounds of do_bench,
in which peers begin in turns. Memory is the peak of forward+backward above the inputs.

    python benchmarks/attention_variants.py [--head-dims 64] [--variants causal,gqa] [--peers flex,flashfuse]
    python benchmarks/attention_variants.py --small          # tiny shapes, to try the script on a CPU
"""

from __future__ import annotations

import argparse
import math
import secrets
import time

import torch
from measure import ResultFile, chosen, print_table

from flashfuse.bench_peers import PEERS, Shape, guarded_rows
from flashfuse.bench_variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--out", default="attention_variants", help="added to benchmarks/results/OUT.json")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds; no variant is begun later")
    parser.add_argument("--small", action="store_true", help="tiny shapes, no result file")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("no GPU here: only --small runs on a CPU")
    torch.manual_seed(options.seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, length, hidden = (2, 320, 8) if options.small else (4, 4096, 2048)
    peers = chosen(options.peers, PEERS)
    results = ResultFile(options.out, device, seed=options.seed, batch=batch, length=length, hidden=hidden, dtype=str(dtype))
    start = time.perf_counter()
    for head_dim in [int(each) for each in options.head_dims.split(",")]:
        heads = 8 if options.small else hidden // head_dim
        shape = Shape(batch, length, heads, head_dim, dtype, device)
        for name in chosen(options.variants, tuple(VARIANTS)):
            if time.perf_counter() - start > options.stop_after:
                print(f"{name} {head_dim}: not begun, --stop-after has passed")
                continue
            for row in guarded_rows(VARIANTS[name], shape, peers, options.rounds):
                results.add(row, write=not options.small)
            print(f"{name} {head_dim}: done after {time.perf_counter() - start:.0f} s", flush=True)
    print_table(results.rows)


if __name__ == "__main__":
    main()
