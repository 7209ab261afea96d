"""flashfuse against FlexAttention on a grid of masks, lengths and head dims, with the preparation of masks in both.

Lengths 2k, 8k and 32k, head dims 64, 128 and 256, hidden width 2048, B*S = 16384 tokens (32768 at 32k), bfloat16: plain, causal,
sliding 256, prefix 256, 12 documents a row, ALiBi, softcap and sinks on causal, groups of 4 query heads, and rows padded
to the longest. flashfuse compiles
the eager code; FlexAttention gets its block mask from a compiled `create_block_mask`, and the time of a call includes it
(`bare_` times do not). Forward, backward and both, medians of CUDA events with a cold cache in interleaved rounds.

In the same run, on the same fresh random inputs, the output and gradients of one batch row and one key/value head are
compared with float64 in chunks of queries: `error` is the largest ratio of a peer's error to that of the same
formula in bfloat16, and at most 2 is right.

Cells are compiled in parallel by worker processes, which then take turns at the device. A run of some of the cells
is a run of its own in the result file.

    python benchmarks/flex_grid.py [--lengths 2048,8192] [--head-dims 64] [--variants causal,gqa] [--workers 14]
    python benchmarks/flex_grid.py --peers flex,portable,flashfuse      # the portable kernels alone, and what serves by itself
    python benchmarks/flex_grid.py --long            # sliding 256 at 32k and 128k tokens: is time linear in the length?
    python benchmarks/flex_grid.py --small           # tiny shapes, to try the script on a CPU
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import secrets
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from grid_cells import GRID, KERNELS, PEERS, GridCell, measure, prepare
from measure import ResultFile, chosen

from flashfuse.bench_peers import Shape

_TIMES = ("forward_ms", "both_ms")

# ------------------------------------------------------------------------------------------------ workers


def work(turn: Connection, cells: Sequence[tuple[str, Shape]], peers: list[str], rounds: int, seed: int) -> None:
    """A worker: compiles its cells, says so, and at each word from the parent measures one and sends its rows."""
    torch.manual_seed(seed)
    if cells[0][1].device == "cpu":
        torch.set_num_threads(1)
    made = [GridCell(name, shape) for name, shape in cells]
    for cell in made:
        prepare(cell, peers)
    turn.send("ready")
    for cell in made:
        turn.recv()
        try:
            measure(cell, rounds)
        except Exception as error:
            for row in cell.rows.values():
                row.setdefault("failed", f"{type(error).__name__}: {error}"[:300])
        turn.send(list(cell.rows.values()))


class Worker:
    """The parent's side of a worker process."""

    def __init__(self, cells: list[tuple[str, Shape]], peers: list[str], rounds: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.cells, self.peers = cells, peers
        self.turn, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, cells, peers, rounds, seed), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def hear(self, until: float) -> Any:
        """The next message, or why there is none."""
        try:
            if self.turn.poll(max(0.0, until - time.perf_counter())):
                return self.turn.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return f"the worker ended with code {self.process.exitcode}"
        return "no time was left"

    def rows(self, number: int, until: float) -> list[dict[str, Any]]:
        """The rows of one cell, measured now."""
        try:
            self.turn.send("go")
            heard = self.hear(until)
        except (BrokenPipeError, ConnectionError):
            heard = "the worker has ended"
        return heard if isinstance(heard, list) else self.failed(number, heard)

    def failed(self, number: int, why: str) -> list[dict[str, Any]]:
        name, shape = self.cells[number]
        facts = {"variant": name, "length": shape.length, "head_dim": shape.head_dim}
        return [{**facts, "peer": peer, "failed": why} for peer in self.peers]


def run_all(cells: list[tuple[str, Shape]], options: argparse.Namespace, results: ResultFile) -> None:
    """Compile all cells in parallel, then measure one after another."""
    start = time.perf_counter()
    until = start + options.stop_after
    count = min(options.workers, len(cells))
    shares = [cells[number::count] for number in range(count)]
    workers = [Worker(share, options.peers, options.rounds, options.seed + n) for n, share in enumerate(shares)]
    states = [worker.hear(until) for worker in workers]
    print(f"{len(cells)} cells compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for worker, state in zip(workers, states, strict=True):
        for number, (name, shape) in enumerate(worker.cells):
            rows = worker.rows(number, until) if state == "ready" else worker.failed(number, state)
            for row in rows:
                results.add(row, write=not options.small)
            print(f"{name} {shape.length} {shape.head_dim}: done after {time.perf_counter() - start:.0f} s", flush=True)
        worker.turn.close()
        worker.process.join(5)  # its memory is free before the next one measures
        if worker.process.is_alive():
            worker.process.terminate()


# ------------------------------------------------------------------------------------------------ tables


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a cell and peer, then the ratios and what they come to."""
    print(
        f"\n{'variant':9}{'S':>7}{'D':>5} {'peer':10}{'fwd ms':>9}{'f+b ms':>9}{'bwd ms':>9}{'mask ms':>9}{'MiB':>7}{'error':>7}"
    )
    for row in sorted(rows, key=lambda row: (row["length"], row["head_dim"], list(GRID).index(row["variant"]))):
        name = f"{row['variant']:9}{row['length']:>7}{row['head_dim']:>5} {row['peer']:10}"
        if "both_ms" not in row:
            print(name + "failed: " + row.get("failed", "?").replace("\n", " ")[:80])
            continue
        mask = f"{row['mask_ms']:9.3f}" if "mask_ms" in row else " " * 9
        wrong = "" if row["right"] else " WRONG"
        peak = f"{row['peak_bytes'] / 2**20:7.0f}"
        print(
            f"{name}{row['forward_ms']:9.3f}{row['both_ms']:9.3f}{row['backward_ms']:9.3f}{mask}{peak}{row['error']:7.2f}{wrong}"
        )
    found = {(row["variant"], row["length"], row["head_dim"], row["peer"]): row for row in rows if "both_ms" in row}
    for own in dict.fromkeys(peer for *_cell, peer in found if peer != "flex"):
        for word, prefix in (("with its mask", ""), ("without its mask", "bare_")):
            _print_ratios(found, own, word, prefix)
    wrong_rows = [row for row in rows if row.get("right") is False]
    failed = [row for row in rows if "failed" in row]
    print(f"{len(failed)} rows failed, {len(wrong_rows)} are wrong")


def _print_ratios(found: dict[tuple[str, int, int, str], dict[str, Any]], own: str, word: str, prefix: str) -> None:
    """A peer's speed against FlexAttention `word`: the geometric mean, the worst cells, those below 0.97."""
    ratios: list[tuple[float, str]] = []
    for (name, length, head_dim, peer), row in found.items():
        rival = found.get((name, length, head_dim, "flex"))
        if peer != own or rival is None:
            continue
        ratios += [
            (rival.get(prefix + key, rival[key]) / row[key], f"{name} {length} {head_dim} {key.split('_')[0]}") for key in _TIMES
        ]
    if not ratios:
        return
    for each in ("forward", "both"):
        part = [ratio for ratio, cell in ratios if cell.endswith(each)]
        facts = f"geometric mean {_mean(part):.3f}x of {len(part)} cells, worst {min(part):.3f}x"
        print(f"{own} against flex {word}, {each:7}: {facts}")
    ratios.sort()
    print(f"    all {_mean([r for r, _ in ratios]):.3f}x; {sum(r < 0.97 for r, _ in ratios)} below 0.97x; the slowest:")
    for ratio, cell in ratios[:10]:
        print(f"    {ratio:7.3f}x {cell}")


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def print_growth(rows: list[dict[str, Any]]) -> None:
    """How time and memory grow from the shortest to the longest length."""
    for peer in PEERS:
        own = sorted((row for row in rows if row["peer"] == peer and "both_ms" in row), key=lambda row: row["length"])
        for head_dim in sorted({row["head_dim"] for row in own}):
            first, *_, last = [row for row in own if row["head_dim"] == head_dim] * 2
            if first is last:
                continue
            parts = [f"{key.split('_')[0]} {last[key] / first[key]:.2f}x" for key in (*_TIMES, "peak_bytes")]
            print(f"{peer} {head_dim}: from {first['length']} to {last['length']} tokens: {', '.join(parts)}")


# ------------------------------------------------------------------------------------------------ command line


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", help="default: all; with --long: sliding")
    parser.add_argument("--lengths", help="default: 2048,8192,32768; with --long: 32768,131072")
    parser.add_argument("--head-dims", help="default: 64,128,256; with --long: 64,128")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--out", help="added to benchmarks/results/OUT.json; default: flex_grid, with --long: sliding_long")
    parser.add_argument("--stop-after", type=float, default=1e6, help="seconds; what is not measured then is recorded as failed")
    parser.add_argument("--long", action="store_true", help="sliding window at 32k and 128k tokens")
    parser.add_argument("--small", action="store_true", help="tiny shapes, no result file")
    options = parser.parse_args()
    options.peers = chosen(options.peers, (*PEERS, *KERNELS))
    options.variants = chosen(options.variants or ("sliding" if options.long else ",".join(GRID)), tuple(GRID))
    lengths = "128,512" if options.small else "32768,131072" if options.long else "2048,8192,32768"
    options.lengths = [int(each) for each in (options.lengths or lengths).split(",")]
    head_dims = "16" if options.small else "64,128" if options.long else "64,128,256"
    options.head_dims = [int(each) for each in (options.head_dims or head_dims).split(",")]
    options.out = options.out or ("sliding_long" if options.long else "flex_grid")
    return options


def main() -> None:
    options = read_options()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers are the threads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("no GPU here: only --small runs on a CPU")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, tokens = (64, 1024) if options.small else (2048, 16384)
    tokens = 0 if options.long else tokens  # one row of each length
    cells = [
        (name, Shape(max(1, tokens // length), length, hidden // head_dim, head_dim, dtype, device))
        for length in sorted(options.lengths, reverse=True)
        for head_dim in options.head_dims
        for name in options.variants
    ]
    results = ResultFile(options.out, device, seed=options.seed, hidden=hidden, tokens=tokens, dtype=str(dtype))
    run_all(cells, options, results)
    print_table(results.rows)
    if options.long:
        print_growth(results.rows)


if __name__ == "__main__":
    main()
