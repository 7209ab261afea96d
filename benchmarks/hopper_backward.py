"""The Hopper backward against cuDNN and the portable kernels on the FlashAttention-2 paper's grid, and random launches.

16384 tokens, hidden 2048, bfloat16. Each cell's times are medians of interleaved rounds, in which peers begin in turns;
TFLOP/s by FlashAttention's count (five products, half of them under a causal mask). In the same run, on fresh random
inputs, gradients of one head are compared with float64: `error` is the largest ratio of a kernel's error to that of eager
code in bfloat16, and at most 2 is right (FlashAttention's rule).

    python benchmarks/hopper_backward.py [--head-dims 64,128] [--lengths 2048,8192] [--rounds 3] [--out hopper_backward]
    python benchmarks/hopper_backward.py --soak 2000 [--seed 7]     # random shapes and programs against the portable kernels
"""

from __future__ import annotations

import argparse
import math
import random
import secrets
import statistics
from collections.abc import Callable, Sequence

import torch
from hopper import HIDDEN, TOKENS, captures_of, named_spec
from measure import ResultFile, milliseconds
from soak import NotServedError, soak

from flashfuse.codegen import hopper_backward, kernel_choice, launch
from flashfuse.ir.attention_spec import AttentionSpec

SCALE = 0.125  # of the named specs
SOAKED = ("plain", "causal", "causal_low", "window", "softcap", "alibi", "sinks")
Tensors = list[torch.Tensor]


def gradients(
    spec: AttentionSpec,
    kernel: str,
    tensors: Tensors,
    saved: Tensors,
    grad_out: torch.Tensor,
    captures: Sequence[torch.Tensor] = (),
) -> Tensors:
    """Of query, key, value and a sink by the named kernels, from the forward's output and statistics in `saved`."""
    kernel_choice.ask(spec.key, kernel)
    return launch.backward(spec, grad_out, *tensors, *saved, captures, (), [spec.sink is not None for _ in captures])


def served(spec: AttentionSpec, tensors: Tensors, grad_out: torch.Tensor, captures: Sequence[torch.Tensor] = ()) -> None:
    """Raises NotServedError if the Hopper kernel does not serve these tensors."""
    call = launch.Call(spec, *tensors, captures, ())
    call.grad_out, call.grad_stats = grad_out, None
    if reason := hopper_backward.refusal(call, [0] if spec.sink is not None else [], eager=True):
        raise NotServedError(reason)


def eager(tensors: Tensors, grad_out: torch.Tensor, causal: bool, dtype: torch.dtype) -> Tensors:
    """The first head's gradients by eager code in `dtype`."""
    query, key, value = (tensor[:1, :1].to(dtype).requires_grad_() for tensor in tensors)
    scores = query @ key.mT * SCALE
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").tril(), float("-inf"))
    out = scores.softmax(-1) @ value
    return list(torch.autograd.grad(out, (query, key, value), grad_out[:1, :1].to(dtype)))


def cell(head_dim: int, length: int, causal: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Each peer's milliseconds, TFLOP/s and error over eager's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (TOKENS // length, HIDDEN // head_dim, length, head_dim)
    *tensors, grad_out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spec = named_spec("causal" if causal else "plain")
    saved = list(launch.forward(spec, *tensors, (), ()))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, scale=SCALE)

    def cudnn() -> Tensors:
        return list(torch.autograd.grad(out, leaves, grad_out, retain_graph=True))

    served(spec, tensors, grad_out)
    peers: dict[str, Callable[[], Tensors]] = {"cudnn": cudnn}
    for kernel in ("portable", "hopper"):
        peers[kernel] = lambda kernel=kernel: gradients(spec, kernel, tensors, saved, grad_out)
    exact, rounded = (eager(tensors, grad_out, causal, dtype) for dtype in (torch.float64, torch.bfloat16))
    allowed = [(low - right).abs().max() for low, right in zip(rounded, exact, strict=True)]
    errors = {}
    for name, peer in peers.items():
        got = [(grad[:1, :1].double() - right).abs().max() for grad, right in zip(peer(), exact, strict=True)]
        errors[name] = max(float(error / most) for error, most in zip(got, allowed, strict=True))
    del exact, rounded
    work = 10 * math.prod(shape) * length * (0.5 if causal else 1)
    found = {}
    for name, ms in milliseconds(peers, rounds).items():
        found[name] = {"ms": ms, "tflops": work / ms / 1e9, "error": errors[name], "right": errors[name] <= 2}
    return found


def grid(options: argparse.Namespace) -> None:
    seed = options.seed or secrets.randbelow(2**31)
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
                    f"{name} {facts['ms']:.3f} ms {facts['tflops']:.0f}{'' if facts['right'] else ' WRONG'}"
                    for name, facts in found.items()
                )
                print(f"{head_dim} {length} {mask}: {words} | of cuDNN {ratios[-1]:.2f}", flush=True)
            print(f"{head_dim} {mask}: {statistics.geometric_mean(ratios):.3f} of cuDNN", flush=True)


def random_launch(name: str, chosen: random.Random) -> tuple[float, str]:
    """One launch of a program, whose gradients must agree with the portable kernels' to bfloat16's rounding."""
    head_dim = chosen.choice((64, 128))
    groups, share = chosen.choice(((1, 1), (2, 1), (2, 2), (1, 4)))
    B, M, N = chosen.randint(1, 3), chosen.randint(1, 900), chosen.choice((128, 384, *range(1, 900, 7)))
    N = N if name == "plain" else max(M, N)  # no row without a key
    heads = groups * share
    *tensors, grad_out = (
        torch.randn(B, each, rows, head_dim, device="cuda", dtype=torch.bfloat16)
        for each, rows in ((heads, M), (groups, N), (groups, N), (heads, M))
    )
    spec, captures = named_spec(name), captures_of(name, (B, heads, M, N))
    saved = list(launch.forward(spec, *tensors, captures, ()))
    kernel_choice.ask(spec.key, "hopper")
    served(spec, tensors, grad_out, captures)
    both = [gradients(spec, kernel, tensors, saved, grad_out, captures) for kernel in ("hopper", "portable")]
    pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(*both, strict=True)]
    difference = max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)) for ours, theirs in pairs)
    return difference / 3e-2, str((B, heads, groups, M, N, head_dim))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of each program's launches, with --soak")
    parser.add_argument("--out", default="hopper_backward")
    options = parser.parse_args()
    if options.soak:
        seed = options.seed or secrets.randbelow(2**31)
        soak(SOAKED, options.soak, seed, options.stop_after, random_launch, ResultFile(f"{options.out}_soak", "cuda", seed=seed))
    else:
        grid(options)


if __name__ == "__main__":
    main()
