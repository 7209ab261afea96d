"""`python -m flashfuse bench`: jobs that measure, and a picture of what they found."""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from flashfuse.bench_peers import PEERS, Shape, drop_gradients, guarded_rows, median_ms, peak_bytes
from flashfuse.bench_variants import VARIANTS
from flashfuse.errors import OptionError
from flashfuse.options import did_you_mean

Job = tuple[str, Callable[[], list[dict[str, Any]]]]


def variant_rows(variants: str, peers: list[str], length: int, head_dim: int, rounds: int) -> list[Job]:
    """A job for each variant, at 8 heads and a batch of 1 on a CPU, 16 heads and 4 on a GPU. Raises OptionError for names."""
    names = list(VARIANTS) if variants == "all" else variants.split(",")
    for given, known in ((names, tuple(VARIANTS)), (peers, PEERS)):
        for name in given:
            if name not in known:
                raise OptionError(f"there is no {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads, dtype = (4, 16, torch.bfloat16) if device == "cuda" else (1, 8, torch.float32)
    shape = Shape(batch, length, heads, head_dim, dtype, device)
    return [(name, lambda name=name: guarded_rows(VARIANTS[name], shape, peers, rounds)) for name in names]  # type: ignore[misc]


def model_rows(
    model: Callable[..., Any], given: tuple[Any, ...], keywords: dict[str, Any], peers: list[str], rounds: int
) -> list[Job]:
    """One job for each peer on a model of one's own: its forward, without gradients."""
    return [(peer, lambda peer=peer: [_model_row(model, given, keywords, peer, rounds)]) for peer in peers]  # type: ignore[misc]


def _model_row(
    model: Callable[..., Any], given: tuple[Any, ...], keywords: dict[str, Any], peer: str, rounds: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": type(model).__name__, "peer": peer}
    device = next((each.device.type for each in _tensors((given, keywords))), "cpu")
    torch._dynamo.reset()
    run = model if peer == "eager" else torch.compile(model, backend=peer)

    def once() -> Any:
        with torch.no_grad():
            return run(*given, **keywords)

    try:
        errors = [_errors(each, model, given, keywords) for each in (once(), model(*given, **keywords))]
        row["error"] = max((mine / max(theirs, 1e-30) for mine, theirs in zip(*errors, strict=True)), default=0.0)
        row["right"] = all(mine <= 2 * theirs + 1e-5 for mine, theirs in zip(*errors, strict=True))
        row["forward_ms"] = statistics.median(median_ms(once, device, []) for _ in range(max(1, rounds)))
        row["peak_bytes"] = peak_bytes(once, device)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:300]
    drop_gradients(list(_tensors(given)))
    return row


def _errors(found: Any, model: Callable[..., Any], given: tuple[Any, ...], keywords: dict[str, Any]) -> list[float]:
    """Largest difference of each floating output from the same model in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    exact_model = copy.deepcopy(model).double() if isinstance(model, torch.nn.Module) else model
    with torch.no_grad():
        exact = exact_model(*torch.utils._pytree.tree_map(double, given), **torch.utils._pytree.tree_map(double, keywords))
    pairs = zip(_tensors(found), _tensors(exact), strict=True)
    differences = [float((a.detach().double() - b.detach()).abs().max()) for a, b in pairs if a.is_floating_point() and a.numel()]
    return [each if math.isfinite(each) else math.inf for each in differences]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def check_plot() -> None:
    """Raises OptionError without matplotlib: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install matplotlib")


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Bars of the times, one group a variant."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "forward_ms" in row]
    variants, peers = (list(dict.fromkeys(row[key] for row in measured)) for key in ("variant", "peer"))
    figure = Figure(figsize=(2 + 2 * len(variants), 4), layout="constrained")
    axes = figure.subplots()
    for number, peer in enumerate(peers):
        own = [row for row in measured if row["peer"] == peer]
        places = [variants.index(row["variant"]) + number / (len(peers) + 1) for row in own]
        axes.bar(places, [row.get("both_ms", row["forward_ms"]) for row in own], 1 / (len(peers) + 1), label=peer)
    axes.set_xticks([place + 0.5 - 1 / (len(peers) + 1) for place in range(len(variants))], variants)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds" + (", forward+backward" if any("both_ms" in row for row in measured) else ""))
    axes.legend()
    figure.savefig(file)
