"""Causal and sliding attention as people write it, on the CPU: flashfuse and Inductor on the same code.

B*H = 8, head dim 64, float32. At S = 2048 the output and gradients are checked against float64 and the times
are medians of interleaved rounds; the peak memory of forward+backward above the inputs is measured at S =
1024, 2048 and 4096, each checked too. All in one run, on fresh random inputs, beside eager and SDPA.

    python benchmarks/cpu_causal_sliding.py [--peers inductor,flashfuse] [--out cpu_causal_sliding]
"""

from __future__ import annotations

import argparse
import itertools
import secrets

import torch
from measure import ResultFile, chosen, print_table

from flashfuse.bench_peers import Shape, guarded_rows
from flashfuse.bench_variants import VARIANTS

PEERS = ("eager", "sdpa", "inductor", "flashfuse")
TIMED = 2048
LENGTHS = (1024, 2048, 4096)


def print_memory(rows: list[dict]) -> None:
    """One line a variant and peer: peak memory at each length and its growth; S squared would be 4 and 4."""
    print(
        "\npeak MiB of forward+backward at S = "
        + ", ".join(map(str, LENGTHS))
        + ", and growth at each doubling"
    )
    peaks: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        peaks.setdefault((row["variant"], row["peer"]), []).append(row.get("peak_bytes", 0) / 2**20)
    for (variant, peer), found in peaks.items():
        growth = [later / max(earlier, 1e-9) for earlier, later in itertools.pairwise(found)]
        sizes, factors = "".join(f"{x:9.1f}" for x in found), "".join(f"{x:6.2f}" for x in growth)
        print(f"{variant:9}{peer:10}{sizes}  {factors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="causal,sliding")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--out", default="cpu_causal_sliding", help="added to benchmarks/results/OUT.json")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    peers = chosen(options.peers, PEERS)
    results = ResultFile(options.out, "cpu", seed=options.seed, batch=1, heads=8, dtype="torch.float32")
    for name in chosen(options.variants, tuple(VARIANTS)):
        for length in LENGTHS:
            shape = Shape(batch=1, length=length, heads=8, head_dim=64, dtype=torch.float32, device="cpu")
            rounds = options.rounds if length == TIMED else 0
            for row in guarded_rows(VARIANTS[name], shape, peers, rounds):
                results.add({"length": length, **row})
            print(f"{name} S={length}: done", flush=True)
    print_table([row for row in results.rows if row["length"] == TIMED])
    print_memory(results.rows)


if __name__ == "__main__":
    main()
