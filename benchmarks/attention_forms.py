"""Attention with more than a mask (benchmarks/forms.py), forward and forward+backward, against other ways to run it.

Peers: eager; inductor and flashfuse, which are torch.compile on the same code; flex, compiled FlexAttention with a score
function (and a block mask where the form is causal, made before the clock starts) written by hand, for all but dropout.
S = 4096, B*S = 16384 tokens, hidden width 2048, bfloat16; Evoformer's four sequences are rows of one alignment, so that its
pair bias fits at this length.

In the same run, on the same fresh random inputs, the output and gradients of the last key/value head are compared with
float64 (`error` is the largest ratio of a peer's error to eager's, at most 2 is right); a gradient that all heads share is
the sum of theirs. Dropout: the peer's own mask is found by values that are columns of the identity, and float64 and eager
code use that mask. Times are medians of interleaved rounds of do_bench; memory is the peak of forward+backward.

    python benchmarks/attention_forms.py [--head-dims 64] [--variants alibi,t5] [--peers flex,flashfuse]
    python benchmarks/attention_forms.py --device cpu --length 128 --rounds 1        # tiny, to try the script
"""

from __future__ import annotations

import argparse
import math
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from forms import FORMS, Form, Operand, Sizes
from measure import ResultFile, chosen, print_table
from torch import Tensor

from flashfuse.bench_peers import (
    Case,
    Cell,
    Cut,
    Errors,
    eager_reference,
    eager_results,
    largest_errors,
    prepare,
    same_code,
    time_in_rounds,
)  # fmt: skip

PEERS = ("eager", "inductor", "flex", "flashfuse")
RETRIES = 8


def head_cut(operand: Operand, unit: int, units: int) -> Cut:
    """The heads of one unit: a key/value head with its query heads, or a pair of heads."""
    if operand.heads is None:
        return lambda t: t
    count = operand.tensor.size(operand.heads) // units
    return lambda t: t.narrow(operand.heads, unit * count, count)


class FormCase:
    """A form's inputs and what their results are in float64."""

    def __init__(self, form: Form, sizes: Sizes) -> None:
        operands = form.operands(sizes)
        self.form = form
        self.units = min(each.tensor.size(each.heads) for each in operands if each.heads is not None)
        shape = form.code(*(each.tensor.to("meta") for each in operands)).shape
        self.operands = sorted(operands, key=lambda each: not each.gradient)  # stable: the order of the arguments
        self.out = Operand(sizes.random(*shape), operands[0].heads)
        inputs = [each.tensor.requires_grad_() for each in self.operands if each.gradient]
        facts = [each.tensor for each in self.operands if not each.gradient]
        seed = secrets.randbits(31) if form.replay is not None else None
        self.case = Case(form.code, inputs, facts, self.out.tensor, self.cuts(self.units - 1), seed)

    def cuts(self, unit: int) -> list[Cut]:
        return [head_cut(each, unit, self.units) for each in (self.out, *self.operands)]

    def make(self, peer: str, row: dict[str, Any]) -> Callable[..., Tensor]:
        """The function of the inputs that is this peer."""
        if peer != "flex":
            return same_code(peer, self.case)
        assert self.form.flex is not None
        compiled = torch.compile(self.form.flex(*self.case.inputs, *self.case.facts), dynamic=False)
        return lambda *inputs: compiled(*inputs, *self.case.facts)

    def reference(self) -> Errors:
        """The last head in float64, and eager's errors on it; gradients that all heads share are summed over the heads.

        The errors of the heads' parts add up as independent ones do: the error of one sum may be small by luck.
        """
        exact, errors = eager_reference(self.case)
        gradients = [each for each in self.operands if each.gradient]
        for place in [1 + i for i, each in enumerate(gradients) if each.heads is None]:
            parts: list[list[Tensor]] = [
                [eager_results(self.case.sliced(dtype, self.cuts(unit)))[place].double() for unit in range(self.units)]
                for dtype in (torch.float64, None)
            ]
            exact[place] = torch.stack(parts[0]).sum(0)
            errors[place] = math.hypot(*(largest_errors([eager], [head])[0] for head, eager in zip(*parts, strict=True)))
        return exact, errors

    def replayed_reference(self, run: Callable[..., Tensor]) -> Errors:
        """The same for dropout, with the mask that this peer draws after this seed."""
        assert self.form.replay is not None
        assert self.case.seed is not None
        query, key, value = self.case.inputs
        length, width = value.size(-2), value.size(-1)
        columns = []
        for start in range(0, length, width):
            columns_of_identity = torch.zeros_like(value)
            columns_of_identity[..., range(start, start + width), range(width)] = 1
            torch.manual_seed(self.case.seed)
            columns.append(self.case.cuts[0](run(query, key, columns_of_identity.requires_grad_()).detach()) != 0)
        cuts: list[Cut] = [*self.case.cuts, lambda t: t]
        kept = [torch.cat(columns, dim=-1)]
        return eager_reference(Case(self.form.replay, self.case.inputs, kept, self.case.grad_out, cuts))


def form_rows(form: Form, sizes: Sizes, peers: list[str], rounds: int) -> list[dict[str, Any]]:
    """All peers on one form, on the same inputs; a failure outside any peer (a lost CUDA context, say) is a row too."""
    start = {"variant": form.name, "head_dim": sizes.head_dim}
    torch._dynamo.reset()
    try:
        made = FormCase(form, sizes)
        fixed = made.reference() if form.replay is None else None
        cells = [Cell(peer, row={**start, "peer": peer}) for peer in peers if peer != "flex" or form.flex is not None]
        for cell in cells:
            prepare(cell, made.case, made.make, lambda run: fixed or made.replayed_reference(run))
        time_in_rounds(cells, made.case, rounds)
    except Exception as error:
        return [{**start, "peer": "all", "failed": f"{type(error).__name__}: {error}"[:300]}]
    return [cell.row for cell in cells]


def fill_caches(names: list[str], head_dims: list[int], options: argparse.Namespace) -> None:
    """Compiles everything in processes of their own, which leaves the generated kernels in the caches on disk."""
    peers = [peer for peer in options.peers.split(",") if peer != "eager"]
    jobs = [(name, head_dim, peer) for head_dim in head_dims for name in names for peer in peers]
    running: list[subprocess.Popen[bytes]] = []
    for name, head_dim, peer in jobs:
        while len([each for each in running if each.poll() is None]) >= options.workers:
            time.sleep(0.1)
        command = [sys.executable, __file__, "--fill-caches", "--variants", name, "--head-dims", str(head_dim)]
        command += ["--device", options.device, "--length", str(options.length), "--peers", peer]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for each in running:
        each.wait()


def only_compile(form: Form, sizes: Sizes, peers: list[str]) -> None:
    """Run every peer once; where the others leave no memory for it, again."""
    for peer in peers:
        if peer == "eager" or (peer == "flex" and form.flex is None):
            continue
        for _ in range(RETRIES):
            try:
                compile_one(form, sizes, peer)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                time.sleep(3)
                continue
            except Exception as error:  # the measuring process will meet it again and note it
                print(f"{form.name} {peer}: {error}", file=sys.stderr)
            break


def compile_one(form: Form, sizes: Sizes, peer: str) -> None:
    made = FormCase(form, sizes)
    run = made.make(peer, {})
    run(*made.case.inputs).backward(made.case.grad_out)
    with torch.no_grad():
        run(*made.case.inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(FORMS))
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--out", default="attention_forms", help="added to benchmarks/results/OUT.json; not on a CPU")
    parser.add_argument("--workers", type=int, default=4, help="processes that compile before anything is measured; 0: none")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds; no form is begun later")
    parser.add_argument("--fill-caches", action="store_true", help="only compile and run once")
    options = parser.parse_args()

    on_gpu = options.device == "cuda"
    peers, names = chosen(options.peers, PEERS), chosen(options.variants, tuple(FORMS))
    head_dims = [int(each) for each in options.head_dims.split(",")]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch, hidden = (16384 // options.length, 2048) if on_gpu else (2, None)
    start = time.perf_counter()
    if options.workers and not options.fill_caches and on_gpu:
        fill_caches(names, head_dims, options)
        print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    results = ResultFile(
        options.out, options.device, seed=options.seed, batch=batch, length=options.length, hidden=hidden, dtype=str(dtype)
    )
    for number, (head_dim, name) in enumerate((d, n) for d in head_dims for n in names):
        torch.manual_seed(options.seed + number)
        sizes = Sizes(batch, options.length, hidden // head_dim if hidden else 16, head_dim, dtype, options.device)
        if options.fill_caches:
            only_compile(FORMS[name], sizes, peers)
            continue
        if time.perf_counter() - start > options.stop_after:
            print(f"{name} {head_dim}: not begun, --stop-after has passed")
            continue
        for row in form_rows(FORMS[name], sizes, peers, options.rounds):
            results.add(row, write=on_gpu)
        print(f"{name} {head_dim}: done after {time.perf_counter() - start:.0f} s", flush=True)
    if not options.fill_caches:
        print_table(results.rows)


if __name__ == "__main__":
    main()
