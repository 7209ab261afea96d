"""One cell of the grid against FlexAttention: a variant at a length and head dim, by both peers.

`code` is attention as people write it, which flashfuse compiles; `keep` and `score` say the same to FlexAttention, and in
chunks of queries to float64, which judges both. A cell is compiled long before it is timed, on other inputs. The peers
"portable" and "hopper" are flashfuse with the kernels of that name; "hopper" fails where they do not serve.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashfuse.bench_peers import Case, Shape, drop_gradients, largest_errors, make_case, peak_bytes, results_of, turned
from flashfuse.bench_variants import VARIANTS, Variant
from flashfuse.codegen import hopper, kernel_choice

PEERS = ("flex", "flashfuse")
KERNELS = ("portable", "hopper")
SOFTCAP = 30.0


def alibi(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads, position = query.size(1), torch.arange(query.size(-2), device=query.device)
    slopes = torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=query.device))
    distance = position[None, :] - position[:, None]
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = scores + slopes[:, None, None] * distance
    return torch.softmax(scores.masked_fill(distance > 0, float("-inf")), dim=-1).to(value.dtype) @ value


def softcap(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.size(-2)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ value


def sink_of(heads: int, like: Tensor) -> Tensor:
    """A sink a head, exact in every dtype."""
    return (torch.arange(heads, device=like.device) % 8 - 3).to(like.dtype)


def sinks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, length, _ = query.shape
    position = torch.arange(length, device=query.device)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
    column = sink_of(heads, scores)[None, :, None, None].expand(batch, -1, length, 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1] @ value


def _alibi_score(heads: int) -> Callable[..., Tensor]:
    return lambda s, b, h, m, n: s + (n - m) * torch.exp2(-8.0 / heads * (h + 1))


def _softcap_score(heads: int) -> Callable[..., Tensor]:
    return lambda s, b, h, m, n: SOFTCAP * torch.tanh(s / SOFTCAP)


_CAUSAL = VARIANTS["causal"].keep
GRID = {
    "plain": VARIANTS["vanilla"],
    "causal": VARIANTS["causal"],
    "sliding": VARIANTS["sliding"],
    "prefix": VARIANTS["prefix"],
    "document": VARIANTS["document"],
    "alibi": Variant("alibi", alibi, keep=_CAUSAL),
    "softcap": Variant("softcap", softcap, keep=_CAUSAL),
    "gqa": VARIANTS["gqa"],
    "padding": VARIANTS["padding"],
    "sinks": Variant("sinks", sinks, keep=_CAUSAL),
}
SCORES = {"alibi": _alibi_score, "softcap": _softcap_score}  # of a number of heads: FlexAttention's score_mod


@dataclass
class Peer:
    """`run` is the whole call, mask and all; `attend` the attention alone, with a mask made before (FlexAttention only)."""

    run: Callable[..., Tensor]
    mask: Callable[[], Any] | None = None
    attend: Callable[[Any], Callable[..., Tensor]] | None = None


@dataclass
class GridCell:
    """A variant at a shape: its peers, compiled by `prepare`, and the rows that `measure` fills."""

    name: str
    shape: Shape
    peers: dict[str, Peer] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: list[Tensor] = field(default_factory=list)  # kept, so that compiled code sees the same tensors

    def fresh_case(self) -> Case:
        """New random inputs; new facts lie where the old ones did."""
        case = make_case(GRID[self.name], self.shape)
        if not self.facts:
            self.facts = case.facts
        for old, new in zip(self.facts, case.facts, strict=True):
            old.copy_(new)
        case.facts = self.facts
        return case


def own_copy(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with a code object of its own, so that Dynamo keeps its compiled forms apart from other cells'."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{name}")
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def flashfuse_peer(cell: GridCell, kernel: str = "auto") -> Peer:
    tag = f"{cell.shape.length}_{cell.shape.head_dim}_{kernel}"
    options = {"kernel": kernel}
    code = torch.compile(own_copy(GRID[cell.name].code, tag), backend="flashfuse", options=options, dynamic=False, fullgraph=True)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for spec in kernel_choice.known():  # another peer has asked for other kernels of the same specs
            kernel_choice.ask(spec, kernel)
        return code(query, key, value, *cell.facts)

    return Peer(run)


def hopper_peer(cell: GridCell) -> Peer:
    """Raises RuntimeError at its second call if the Hopper forward did not serve both."""
    before, calls = hopper.served.total(), 0
    peer = flashfuse_peer(cell, "hopper")

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal calls
        out = peer.run(query, key, value)
        calls += 1
        if calls == 2 and hopper.served.total() < before + 2:
            raise RuntimeError("the Hopper forward does not serve")
        return out

    return Peer(run)


def flex_peer(cell: GridCell) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    variant, shape = GRID[cell.name], cell.shape
    tag = f"{cell.name}_{shape.length}_{shape.head_dim}"
    flex = torch.compile(own_copy(flex_attention, tag), dynamic=False, fullgraph=True)
    score = SCORES[cell.name](shape.heads) if cell.name in SCORES else None
    group = variant.group > 1
    if cell.name == "sinks":
        flex = torch.compile(own_copy(flex_with_sinks, tag), dynamic=False, fullgraph=True)

    def attend(mask: Any) -> Callable[..., Tensor]:
        return lambda query, key, value: flex(query, key, value, score_mod=score, block_mask=mask, enable_gqa=group)

    if variant.keep is None:
        return Peer(attend(None))
    create = torch.compile(own_copy(create_block_mask, tag), dynamic=False)
    keep = variant.keep(*cell.facts)
    batch = shape.batch if cell.facts else None

    def mask() -> Any:
        return create(keep, batch, None, shape.length, shape.length, device=shape.device)

    return Peer(lambda query, key, value: attend(mask())(query, key, value), mask, attend)


def flex_with_sinks(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """FlexAttention with sinks, by the rows' logsumexp."""
    from torch.nn.attention.flex_attention import flex_attention

    out, lse = flex_attention(query, key, value, return_lse=True, **settings)
    share = torch.sigmoid(lse - sink_of(query.size(1), lse)[:, None])
    return (out * share[..., None]).to(query.dtype)


_MAKERS: dict[str, Callable[[GridCell], Peer]] = {
    "flex": flex_peer,
    "flashfuse": flashfuse_peer,
    "portable": lambda cell: flashfuse_peer(cell, "portable"),
    "hopper": hopper_peer,
}


def prepare(cell: GridCell, peers: list[str]) -> None:
    """Compile every peer, forward and backward, by one run."""
    case = cell.fresh_case()
    for peer in peers:
        start = time.perf_counter()
        row = cell.rows[peer] = {
            "variant": cell.name, "length": cell.shape.length, "head_dim": cell.shape.head_dim, "batch": cell.shape.batch,
            "heads": cell.shape.heads, "peer": peer,
        }  # fmt: skip
        try:
            made = _MAKERS[peer](cell)
            drop_gradients(case.inputs)
            with torch.no_grad():
                made.run(*case.inputs)
            made.run(*case.inputs).backward(case.grad_out)
            _wait(cell.shape.device)
            cell.peers[peer] = made
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        row["prepare_s"] = round(time.perf_counter() - start, 1)
    del case
    _give_back(cell.shape.device)


def measure(cell: GridCell, rounds: int) -> None:
    """Check and time the peers on fresh inputs, in interleaved rounds; a failure is noted in the peer's row."""
    case = cell.fresh_case()
    exact = in_chunks(cell, case, torch.float64)
    usual = largest_errors(in_chunks(cell, case, cell.shape.dtype), exact)
    times: dict[str, dict[str, list[float]]] = {peer: {} for peer in cell.peers}
    for number, attempt in enumerate([check_peer, *[time_peer] * rounds]):
        for peer in turned(list(cell.peers), number):
            try:
                attempt(cell, peer, case, *((exact, usual) if attempt is check_peer else (times[peer],)))
            except Exception as error:
                cell.rows[peer]["failed"] = f"{type(error).__name__}: {error}"[:300]
                del cell.peers[peer]
            drop_gradients(case.inputs)
            _give_back(cell.shape.device)
    for peer in cell.peers:
        cell.rows[peer].update({name: statistics.median(found) for name, found in times[peer].items()}, rounds=times[peer])
    cell.peers.clear()


def check_peer(cell: GridCell, peer: str, case: Case, exact: list[Tensor], usual: list[float]) -> None:
    """Notes the peak of forward+backward, and how the slice of the results compares with float64 and with eager's errors."""
    found: list[Tensor] = []
    run = cell.peers[peer].run
    drop_gradients(case.inputs)
    cell.rows[peer]["peak_bytes"] = peak_bytes(lambda: found.extend(results_of(run, case)), cell.shape.device)
    group = GRID[cell.name].group
    errors = largest_errors([t[-1:, -n:] for t, n in zip(found, (group, group, 1, 1), strict=True)], exact)
    floor = 1e-5 if cell.shape.dtype is torch.float32 else 0.0  # the rule is for half precision
    cell.rows[peer].update(
        errors=errors,
        eager_errors=usual,
        error=max(mine / max(theirs, 1e-30) for mine, theirs in zip(errors, usual, strict=True)),
        right=all(mine <= 2 * theirs + floor for mine, theirs in zip(errors, usual, strict=True)),
    )


def time_peer(cell: GridCell, peer: str, case: Case, times: dict[str, list[float]]) -> None:
    """One round: the whole call, forward, backward and both; of FlexAttention also with the mask made before."""
    made, device = cell.peers[peer], cell.shape.device
    runs = {"": made.run}
    if made.mask is not None and made.attend is not None:
        times.setdefault("mask_ms", []).append(median_ms(made.mask, device, []))
        runs["bare_"] = made.attend(made.mask())
    for prefix_, run in runs.items():

        def forward(run: Callable[..., Tensor] = run) -> None:
            with torch.no_grad():
                run(*case.inputs)

        def both(run: Callable[..., Tensor] = run) -> None:
            run(*case.inputs).backward(case.grad_out)

        def backward(out: Tensor) -> None:
            out.backward(case.grad_out)

        times.setdefault(f"{prefix_}forward_ms", []).append(median_ms(forward, device, case.inputs))
        times.setdefault(f"{prefix_}both_ms", []).append(median_ms(both, device, case.inputs))
        if not prefix_:  # it never makes a mask
            times.setdefault("backward_ms", []).append(median_ms(backward, device, case.inputs, lambda: made.run(*case.inputs)))


def in_chunks(cell: GridCell, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """[output, gradients of query, key, value] of the last batch row and key/value head, with scores in `dtype`.

    Queries go in chunks, so that a score matrix of 32k or 128k tokens never exists; the chunks' gradients of key and value
    are added in at least float32 and rounded to `dtype` at the end.
    """
    variant, shape = GRID[cell.name], cell.shape
    group = variant.group
    cuts = [t.detach()[-1:, -n:].to(dtype) for t, n in zip((*case.inputs, case.grad_out), (group, 1, 1, group), strict=True)]
    query, key, value, grad_out = cuts
    key.requires_grad_(), value.requires_grad_()
    keep = variant.keep(*case.facts) if variant.keep else None
    score = SCORES[cell.name](shape.heads) if cell.name in SCORES else None
    b = torch.full((1, 1, 1, 1), shape.batch - 1, device=shape.device)
    h = torch.arange(shape.heads - group, shape.heads, device=shape.device)[:, None, None]
    n = torch.arange(shape.length, device=shape.device)
    outs, grads = [], []
    sums = [torch.zeros_like(t, dtype=torch.promote_types(dtype, torch.float32)) for t in (key, value)]
    for first in range(0, shape.length, 512):
        rows = query[:, :, first : first + 512].clone().requires_grad_()
        m = torch.arange(first, first + rows.size(2), device=shape.device)[:, None]
        scores = rows @ key.transpose(-2, -1) / math.sqrt(shape.head_dim)
        scores = scores if score is None else score(scores, b, h, m, n)
        scores = scores if keep is None else scores.masked_fill(~keep(b, h, m, n), float("-inf"))
        if cell.name == "sinks":
            column = sink_of(shape.heads, scores)[shape.heads - group :, None, None].expand(1, group, scores.size(2), 1)
            scores = torch.cat([scores, column], dim=-1)
        out = torch.softmax(scores, dim=-1)[..., : shape.length].to(dtype) @ value
        of_rows, *of_others = torch.autograd.grad(out, (rows, key, value), grad_out[:, :, first : first + 512])
        for total, part in zip(sums, of_others, strict=True):
            total += part
        outs.append(out.detach())
        grads.append(of_rows)
    return [torch.cat(outs, 2), torch.cat(grads, 2), *(total.to(dtype) for total in sums)]


def median_ms(
    run: Callable[..., object], device: str, inputs: list[Tensor], before: Callable[[], object] | None = None, repeats: int = 10
) -> float:
    """Median time of `repeats` calls in milliseconds, by CUDA events, each with a cold L2 cache and without gradients.

    What `before` returns is given to `run`; its time is not counted, and the device is kept busy until the host has launched.
    """
    if device != "cuda":
        repeats, cache = 3, None
    else:
        cache = torch.empty(2**26, dtype=torch.int32, device=device)
    times: list[Any] = []
    for _ in range(2 + repeats):
        drop_gradients(inputs)
        given = () if before is None else (before(),)
        if cache is None:
            start = time.perf_counter()
            run(*given)
            times.append(1000 * (time.perf_counter() - start))
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        cache.zero_()
        if given:
            torch.cuda._sleep(1_000_000)  # cycles
        events[0].record()
        run(*given)
        events[1].record()
        times.append(events)
    if cache is None:
        return statistics.median(times[2:])
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in times[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _give_back(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
