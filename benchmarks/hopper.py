"""The Hopper forward: against cuDNN and the portable kernel on the FlashAttention-2 paper's grid, and random launches.

16384 tokens, hidden 2048, bfloat16. Each cell's times are medians of interleaved rounds, in which peers begin in turns;
TFLOP/s by FlashAttention's count (half of them under a causal mask). Every output is compared with float64 on one head of
the same inputs, and the Hopper forward's bits over repeated runs.

    python benchmarks/hopper.py [--head-dims 64,128,256] [--lengths 2048,8192] [--rounds 3] [--out hopper]
    python benchmarks/hopper.py --soak 10000 [--seed 7]     # random shapes and programs against the portable kernel
    python benchmarks/hopper.py --variants sliding,gqa      # both kernels against FlexAttention on cells of flex_grid.py
    python benchmarks/hopper.py --tiles window,documents    # the forward's time with each tile that a spec could have
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flex_grid import run_all
from grid_cells import GRID, KERNELS
from measure import ResultFile, chosen, milliseconds
from soak import NotServedError, soak

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "codegen"))
from compile_report import named_spec

from flashfuse.bench_peers import Shape
from flashfuse.codegen import hopper, kernel_choice, launch
from flashfuse.codegen.hopper_tiles import SMALL_TILES, TILES, Dims, HopperTile, row_of
from flashfuse.ir.attention_spec import AttentionSpec

TOKENS, HIDDEN = 16384, 2048
REPEATED = 250  # runs whose bits are compared with the first one's
SOAKED = ("plain", "causal", "causal_low", "window", "softcap", "alibi", "bias", "documents", "sinks", "dropout")


def run(spec: AttentionSpec, kernel: str, tensors: list[torch.Tensor], captures: list[torch.Tensor]) -> torch.Tensor:
    """The output by the named kernels. Raises NotServedError if "hopper" ones were asked for and do not serve."""
    kernel_choice.ask(spec.key, kernel)
    out = launch.forward(spec, *tensors, captures, ())[0]
    if kernel == "hopper":
        call = launch.Call(spec, *tensors, captures, ())
        if not hopper.takes(call):
            raise NotServedError(hopper.refusal(call, eager=True))
    return out


def exact(tensors: list[torch.Tensor], scale: float, causal: bool) -> torch.Tensor:
    """The first head's output in float64."""
    query, key, value = (tensor[0, 0].double() for tensor in tensors)
    scores = query @ key.mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1) @ value


def cell(head_dim: int, length: int, causal: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Each peer's milliseconds, TFLOP/s and largest difference from float64, and whether the Hopper forward's bits stay."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (TOKENS // length, HIDDEN // head_dim, length, head_dim)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    spec = named_spec("causal" if causal else "plain")  # its scale is 1/8
    wanted = exact(tensors, 0.125, causal)

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal, scale=0.125)

    peers: dict[str, Callable[[], torch.Tensor]] = {"cudnn": cudnn}
    for kernel in ("portable", "hopper"):
        peers[kernel] = lambda kernel=kernel: run(spec, kernel, tensors, [])
    errors = {name: float((peer()[0, 0].double() - wanted).abs().max()) for name, peer in peers.items()}
    first = peers["hopper"]()
    same = all(torch.equal(peers["hopper"](), first) for _ in range(REPEATED))
    work = 4 * math.prod(shape) * length * (0.5 if causal else 1)
    found = {}
    for name, ms in milliseconds(peers, rounds).items():
        found[name] = {"ms": ms, "tflops": work / ms / 1e9, "error": errors[name], "right": errors[name] < 2e-2}
    found["hopper"] |= {"same_bits": same, "repeated": REPEATED}
    return found


def grid(options: argparse.Namespace) -> None:
    seed = secrets.randbelow(2**31)
    torch.manual_seed(seed)
    results = ResultFile(options.out, "cuda", seed=seed, tokens=TOKENS, hidden=HIDDEN, dtype="torch.bfloat16")
    for head_dim in map(int, options.head_dims.split(",")):
        for causal in (False, True):
            ratios, mask = [], "causal" if causal else "full"
            for length in map(int, options.lengths.split(",")):
                found = cell(head_dim, length, causal, options.rounds)
                for name, facts in found.items():
                    results.add({"head_dim": head_dim, "length": length, "causal": causal, "kernel": name, **facts})
                ratios.append(found["hopper"]["tflops"] / found["cudnn"]["tflops"])
                words = " | ".join(
                    f"{name} {facts['tflops']:.0f}{'' if facts['right'] else ' WRONG'}" for name, facts in found.items()
                )
                same = "" if found["hopper"]["same_bits"] else " OTHER BITS"
                print(f"{head_dim} {length} {mask}: {words} | of cuDNN {ratios[-1]:.2f}{same}", flush=True)
            print(f"{head_dim} {mask}: {statistics.geometric_mean(ratios):.3f} of cuDNN", flush=True)


def captures_of(name: str, shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Tensors for the captures of `compile_report.named_spec`."""
    B, H, M, N = shape
    if name in ("alibi", "sinks"):
        return [torch.rand(H, device="cuda")]
    if name == "dropout":
        return [torch.randint(2**62, (), device="cuda")]
    if name == "bias":
        return [torch.randn(1, H, M, N, device="cuda")]
    if name == "documents":
        return [torch.randint(0, 4, (B, max(M, N)), device="cuda").sort(1).values]
    return []


def random_launch(name: str, chosen: random.Random) -> tuple[float, str]:
    """One launch of a program, which must agree with the portable kernel to bfloat16's rounding."""
    head_dim = chosen.choice((64, 64, 128, 128, 256))
    groups, share = chosen.choice(((1, 1), (2, 1), (2, 2), (1, 4)))
    B, M, N = chosen.randint(1, 3), chosen.randint(1, 900), chosen.choice((128, 384, *range(1, 900, 7)))
    if name in ("causal", "window", "softcap", "alibi", "documents", "sinks", "dropout"):
        N = max(M, N) if name != "documents" else M  # no row without a key
    H = groups * share
    tensors = [torch.randn(B, heads, rows, head_dim, device="cuda", dtype=torch.bfloat16)
               for heads, rows in ((H, M), (groups, N), (groups, N))]  # fmt: skip
    captures = captures_of(name, (B, H, M, N))
    spec = named_spec(name)
    ours, theirs = (run(spec, kernel, tensors, captures).float() for kernel in ("hopper", "portable"))
    return float((ours - theirs).abs().max()) / 4e-2, str((B, H, groups, M, N, head_dim))


# ------------------------------------------------------------------------------------------------ against FlexAttention


_RATIOS = (("forward, with mask", "forward_ms"), ("forward, without", "forward_ms"), ("backward", "backward_ms"))


def variants(options: argparse.Namespace) -> None:
    """Cells of `flex_grid.py` with FlexAttention, the portable and the Hopper forward, and each kernel's ratios."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers are the threads
    options.peers, options.small, options.stop_after = ["flex", *KERNELS], False, 1e6
    options.workers = options.workers or max(1, (os.cpu_count() or 2) - 2)
    options.seed = options.seed or secrets.randbits(31)
    cells = [
        (name, Shape(max(1, TOKENS // length), length, HIDDEN // head_dim, head_dim, torch.bfloat16, "cuda"))
        for head_dim in map(int, options.head_dims.split(","))
        for length in map(int, options.lengths.split(","))
        for name in chosen(options.variants, tuple(GRID))
    ]
    results = ResultFile(f"{options.out}_variants", "cuda", seed=options.seed, tokens=TOKENS, hidden=HIDDEN)
    run_all(cells, options, results)
    found = {(row["variant"], row["length"], row["head_dim"], row["peer"]): row for row in results.rows}
    print("times are FlexAttention's over the kernel's: forward with its mask, without, backward; worst error over eager's")
    ratios: dict[tuple[str, str], list[float]] = {}
    for name, shape in cells:
        flex = found[(name, shape.length, shape.head_dim, "flex")]
        for kernel in KERNELS:
            row = found[(name, shape.length, shape.head_dim, kernel)]
            words = f"{name:9} {shape.length:6} {shape.head_dim:4} {kernel:9}"
            if "failed" in row or "failed" in flex:
                print(words, row.get("failed", flex.get("failed", ""))[:90])
                continue
            for word, key in _RATIOS:
                ratio = flex.get(f"bare_{key}" if "without" in word else key, flex[key]) / row[key]
                ratios.setdefault((kernel, word), []).append(ratio)
                words += f" {ratio:6.2f}"
            both = [f"{each['forward_ms']:.3f} {each['backward_ms']:.3f}" for each in (row, flex)]
            right = "" if row["right"] else " WRONG"
            print(f"{words}   {both[0]} ms (flex {both[1]}), error {row['error']:.2f}{right}")
    for (kernel, word), each in ratios.items():
        print(f"{kernel:9} {word:18} geometric mean {statistics.geometric_mean(each):.3f}, worst {min(each):.3f} of {len(each)}")


# ------------------------------------------------------------------------------------------------ tiles


def candidates(dims: Dims) -> list[HopperTile]:
    """All tiles of both tables' rows for head dims, and those with a second buffer of queries where it fits."""
    known = [tile for table in (TILES, SMALL_TILES) for tile in table.get(dims, ())]
    known += [dataclasses.replace(tile, queries=2) for tile in known]
    return [tile for tile in dict.fromkeys(known) if shared_memory(tile, dims) < 226 << 10]


def shared_memory(tile: HopperTile, dims: Dims) -> int:
    """Bytes of a tile's buffers."""
    key, value = tile.block_m * tile.queries + tile.stages * tile.block_n, tile.block_m * tile.staged + tile.stages * tile.block_n
    return 2 * (key * dims[0] + value * dims[1])


def time_tiles(options: argparse.Namespace) -> None:
    """The portable forward's and each tile's time, in CUDA graphs, and how far their results are apart."""
    results = ResultFile(f"{options.out}_tiles", "cuda", tokens=TOKENS, hidden=HIDDEN)
    for words in options.head_dims.split(","):
        D, E = (int(dim) for dim in (words.split("x") * 2)[:2])
        for length in map(int, options.lengths.split(",")):
            for name in options.tiles.split(","):
                print(f"{name} {length} {words}", flush=True)
                for row in timed_tiles(name, length, (D, E)):
                    results.add({"variant": name, "head_dims": [D, E], "length": length, **row})
                    said = "".join(f", {word} {row[word]}" for word in ("place", "difference", "spoiled") if row[word])
                    print(f"    {row['ms']:.4f} ms: {row['tile']}{said}", flush=True)


def timed_tiles(name: str, length: int, dims: Dims) -> Iterator[dict[str, Any]]:
    """The rows of one spec and shape; the range table, if any, is made before."""
    from triton.testing import do_bench_cudagraph

    D, E = dims
    shape = (TOKENS // length, HIDDEN // E, length, length)
    tensors = [torch.randn((*shape[:3], dim), device="cuda", dtype=torch.bfloat16) for dim in (D, D, E)]
    spec, captures = named_spec(name), captures_of(name, shape)
    kernel_choice.ask(spec.key, "portable")
    table = launch.block_ranges(spec, captures, (), shape, tensors[0].device) if spec.certainty is not None else None
    call = launch.Call(spec, *tensors, captures, (), ranges=table)

    def portable() -> torch.Tensor:
        return launch.forward(spec, *tensors, captures, (), ranges=table)[0]

    wanted = portable()
    ms = do_bench_cudagraph(portable, rep=20, return_mode="median")
    yield {"tile": "portable", "ms": ms, "place": "", "difference": 0.0, "spoiled": ""}
    out, stats = torch.empty_like(wanted), torch.empty((spec.planes, *shape[:3]), device="cuda")
    own = row_of(spec, dims)[1]
    for tile in candidates(dims):
        compiled = hopper.launch(call, out.fill_(float("nan")), stats, tile)
        difference = float((out.float() - wanted.float()).abs().max())
        ms = do_bench_cudagraph(partial(hopper.launch, call, out, stats, tile), rep=20, return_mode="median")
        place = f"number {own.index(tile) + 1}" if tile in own else ""
        yield {"tile": str(tile), "ms": ms, "place": place, "difference": difference, "spoiled": hopper.spoiled(compiled)}


# ------------------------------------------------------------------------------------------------ command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of each program's launches, with --soak")
    parser.add_argument("--variants", default="", help=f"of {', '.join(GRID)}")
    parser.add_argument("--tiles", default="", help="specs by name, as in tests/codegen/compile_report.py")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile; default: the cores but two")
    parser.add_argument("--out", default="hopper")
    options = parser.parse_args()
    if options.soak:
        seed = options.seed or secrets.randbelow(2**31)
        soak(SOAKED, options.soak, seed, options.stop_after, random_launch, ResultFile(f"{options.out}_soak", "cuda", seed=seed))
    elif options.variants:
        variants(options)
    elif options.tiles:
        time_tiles(options)
    else:
        grid(options)


if __name__ == "__main__":
    main()
