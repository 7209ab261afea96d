"""Tuning under `mode="max-autotune"`: a handful of tiles for each kernel, timed at the first real call.

The tile that a launch settles on anyway comes first; another one is taken only if it is faster and computes the same. What
won is kept on disk, a file for each device, versions, kernel text and class of shapes: lengths between two powers of two
share a result. A file that is damaged, or that says something else than its name, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashfuse.codegen import replay
from flashfuse.codegen.load import cache_folder, write_atomically
from flashfuse.codegen.plan import Tile

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

log = logging.getLogger("flashfuse")

MAX_SPILLS = 48  # 32-bit registers a thread; candidates that spill more are not timed
_GAIN = 0.98  # less is noise
_ROUNDS, _RUNS, _PAUSE = 3, 5, 1_000_000  # times that are taken, launches in each, cycles
_ROUNDINGS = 8  # of the largest number: what two right tiles may differ by

_requested: set[str] = set()  # keys of specs
_known: dict[str, Tile | None] = {}  # by a key's name; None: nothing on disk, not tuned yet

Key = dict[str, str | int]


def request(specs: Iterable[str]) -> None:
    """From now on tune the kernels of the specs with these keys."""
    new = set(specs) - _requested
    if new:
        _requested.update(new)
        replay.forget()  # recorded launches have the tiles of before


def requested(spec: str) -> bool:
    """Whether the kernels of the spec with this key are to be tuned."""
    return spec in _requested


def folder() -> Path:
    """Where results lie."""
    return cache_folder() / "tuned"


def key_of(call: Call, kernel: str, precision: str) -> Key:
    """All that a result holds for. Lengths, and heads times batch, count by the next power of two."""
    import triton

    tensors = (call.query, call.key, call.value)
    return {
        "device": torch.cuda.get_device_name(call.on) if call.on.type == "cuda" else call.on.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "text": _text_hash(str(call.module.__file__)),
        "kernel": kernel,
        "dtypes": " ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        "precision": precision,
        "D": call.D,
        "E": call.E,
        "heads": _class(call.B * call.H),
        "group": call.H // call.G,
        "M": _class(call.M),
        "N": _class(call.N),
        "layouts": " ".join(_order(tensor) for tensor in tensors),
    }


@cache
def _text_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _class(length: int) -> int:
    return 1 << max(length - 1, 0).bit_length()


def _order(tensor: Tensor) -> str:
    """The tensor's axes in the order of its memory."""
    strides = tensor.stride()
    return "".join("bhme"[axis] for axis in sorted(range(4), key=lambda axis: (-strides[axis], axis)))


def _name(key: Key) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def result_for(key: Key, candidates: Sequence[Tile]) -> Tile | None:
    """The tile found in this process or an earlier one, or None; only one of `candidates` counts."""
    name = _name(key)
    if name not in _known:
        _known[name] = _read(folder() / f"{name}.json", key)
    tile = _known[name]
    return tile if tile in candidates else None


def _read(path: Path, key: Key) -> Tile | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        return Tile(**found["tile"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("%s is no tuning result (%s: %s)", path, type(error).__name__, error)
        return None


def _keep(key: Key, tile: Tile, times: dict[str, float]) -> None:
    name = _name(key)
    _known[name] = tile
    text = json.dumps({"key": key, "tile": asdict(tile), "milliseconds": times}, indent=1) + "\n"
    try:
        write_atomically(folder() / f"{name}.json", text)
    except OSError as error:
        log.info("the tuning result is not kept: %s", error)


def possible(call: Call) -> bool:
    """Whether this call may be repeated and timed: it is neither being recorded nor captured in a CUDA graph."""
    return call.recording is None and not (call.on.type == "cuda" and torch.cuda.is_current_stream_capturing())


def tune(
    key: Key,
    attempt: Callable[[Tile], Any],
    results: Sequence[Tensor],
    default: Tile,
    candidates: Sequence[Tile],
    rounding: float,
) -> None:
    """Keep the fastest tile whose results are those of `default`, which was just run, and leave its results behind.

    `attempt` launches with a tile, fills `results` and returns the compiled kernel; what it raises counts against the tile.
    `rounding` is that of the products.
    """
    expected = [result.clone() for result in results]
    device = results[0].device
    times = {str(default): milliseconds(lambda: attempt(default), device)}
    best = default
    for tile in candidates:
        if tile == default:
            continue
        for result in results:
            result.fill_(float("nan"))  # what a tile does not write must not look right
        try:
            if spills(attempt(tile)) > MAX_SPILLS:
                continue
            if not all(_agree(result, right, rounding) for result, right in zip(results, expected, strict=True)):
                log.warning("%s of %s gives another result than %s and is not taken", tile, key["kernel"], default)
                continue
            times[str(tile)] = milliseconds(lambda: attempt(tile), device)  # noqa: B023
        except Exception as error:  # a tile that does not compile or fit is no candidate; the default has run
            log.info("%s of %s: %s", tile, key["kernel"], error)
            continue
        if times[str(tile)] < times[str(best)] * (_GAIN if best is default else 1.0):
            best = tile
    attempt(best)
    _keep(key, best, times)
    log.info("%s: %s is the fastest of %d tiles", key["kernel"], best, len(times))


def spills(compiled: Any) -> int:
    """Registers that a thread of a compiled kernel spills; the interpreter has none."""
    return int(getattr(compiled, "n_spills", 0) or 0)


def _agree(result: Tensor, right: Tensor, rounding: float) -> bool:
    """Equal but for rounding; NaN and infinities at the same places."""
    x, y = result.float(), right.float()
    ordinary = y.isfinite()
    if not torch.equal(x.masked_fill(ordinary, 0.0).nan_to_num(1.0), y.masked_fill(ordinary, 0.0).nan_to_num(1.0)):
        return False
    difference = (x - y).masked_fill(~ordinary, 0.0).abs()
    return bool((difference <= _ROUNDINGS * rounding * y.masked_fill(~ordinary, 0.0).abs().amax()).all()) if y.numel() else True


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of a launch. On a GPU launches queue up behind a pause, so that the host's time does not count."""
    run()
    times = []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_PAUSE)
            first.record()
            for _ in range(_RUNS):
                run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / _RUNS)
        else:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
    return median(times)
