"""What of flashfuse will work on this machine, and how to mend what will not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import flashfuse


@dataclass(frozen=True)
class Finding:
    """`state`: "ok", "less" (works, but slower or without a feature) or "bad" (does not work)."""

    name: str
    state: str
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Every check in order. A check that itself fails is a finding, too."""
    findings = []
    for check in (_python, _torch, _triton, _gpu, _hopper, _interpreter, _compiler, _cache, _extras, _backend, _trial):
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(check.__name__.strip("_"), "bad", f"{type(error).__name__}: {error}"))
    return findings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _at_least(found: str, wanted: tuple[int, int]) -> bool:
    numbers = [int("".join(digit for digit in part if digit.isdigit()) or 0) for part in found.split(".")[:2]]
    return tuple(numbers) >= wanted


def _python() -> Finding:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("python", "ok" if sys.version_info >= (3, 10) else "bad", found, "Python 3.10 or newer")


def _torch() -> Finding:
    found = _version("torch")
    good = bool(found) and _at_least(found, (2, 11))
    return Finding("torch", "ok" if good else "bad", found or "not installed", "" if good else "pip install 'torch>=2.11'")


def _triton() -> Finding:
    found = _version("triton")
    if found and _at_least(found, (3, 6)):
        return Finding("triton", "ok", found)
    fix = "pip install 'triton>=3.6' (Linux); without it the kernels cannot run, the CPU path can"
    return Finding("triton", "less", found or "not installed", fix)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "less", "none that torch can use", "on a CPU attention is exact and linear in memory, "
                       "but its kernels need an NVIDIA GPU and a torch built for CUDA")  # fmt: skip
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    found = f"{name}, sm_{capability[0]}{capability[1]}, CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return Finding("GPU", "less", found, "kernels are written for NVIDIA devices; the torch path runs")
    if capability < (8, 0):
        return Finding("GPU", "less", found, "kernels need compute capability 8.0 (A100, RTX 30 or newer); the torch path runs")
    return Finding("GPU", "ok", found)


def _hopper() -> Finding:
    import torch

    name = "Hopper kernels"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return Finding(name, "ok", "not for this device: they need compute capability 9.0")
    from flashfuse.codegen import hopper, hopper_backward, hopper_tiles

    device = torch.device("cuda", torch.cuda.current_device())
    fault = hopper.missing()
    if not fault:
        found = {hopper.distrust(device, *facts) for facts in hopper_tiles.serving()}
        found |= {hopper_backward.distrust(device, head_dim) for head_dim in hopper_backward.HEAD_DIMS}
        fault = "; ".join(sorted(found - {""}))
    if not fault:
        return Finding(name, "ok", "they pass their check")
    return Finding(name, "less", fault, "the portable kernels serve; `python -m flashfuse cache clear` has them checked again")


def _interpreter() -> Finding:
    on, numpy = os.environ.get("TRITON_INTERPRET") == "1", _version("numpy")
    if not on:
        return Finding("interpreter", "ok", "off: kernels are compiled")
    if _version("triton").startswith("3.6") and numpy and _at_least(numpy, (2, 4)):
        return Finding(
            "interpreter", "bad", f"on, with numpy {numpy}", "pip install 'numpy<2.4': Triton 3.6's interpreter needs it"
        )
    return Finding("interpreter", "less", "on: kernels run slowly, in Python", "unset TRITON_INTERPRET")


def _compiler() -> Finding:
    found = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), "")
    fix = 'install g++ (apt install g++); Inductor needs it on a CPU, Triton on a GPU. Until then: options={"inner": "aot_eager"}'
    return Finding("C++ compiler", "ok" if found else "bad", found or "none", "" if found else fix)


def _cache() -> Finding:
    from flashfuse.codegen.load import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("cache", "less", f"{folder}: {error}", "set FLASHFUSE_CACHE_DIR to a folder that can be written")
    kernels, tuned = len(list(folder.glob("attention_*.py"))), len(list((folder / "tuned").glob("*.json")))
    return Finding("cache", "ok", f"{folder}, {kernels} kernels" + (f", {tuned} tuning results" if tuned else ""))


def _extras() -> Finding:
    missing = [f"{package} (flashfuse[{extra}])" for package, extra in (("rich", "cli"), ("Pygments", "report"))
               if not _version(package)]  # fmt: skip
    if not missing:
        return Finding("extras", "ok", "rich, Pygments")
    return Finding("extras", "less", f"without {', '.join(missing)}", 'pip install "flashfuse[cli,report]"')


def _backend() -> Finding:
    import torch

    known = "flashfuse" in torch._dynamo.list_backends(exclude_tags=())
    fix = "" if known else "pip install flashfuse (its entry point registers the backend), in this very environment"
    return Finding("backend", "ok" if known else "bad", f"flashfuse {flashfuse.__version__}", fix)


def _trial() -> Finding:
    """One causal attention, forward and backward, against eager code."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def attention(q: torch.Tensor) -> torch.Tensor:
        keep = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
        return (q @ q.transpose(-2, -1) * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ q

    q = torch.randn(1, 2, 64, 16, device=device, requires_grad=True)
    compiled: Callable[..., torch.Tensor] = torch.compile(attention, backend="flashfuse", options={"inner": "aot_eager"})
    counters = torch._dynamo.utils.counters["flashfuse"]
    before = counters["fused"]
    results = []
    for function in (attention, compiled):
        out = function(q)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), q)))
    difference = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    good = difference < 1e-2 and counters["fused"] == before + 1
    found = f"one attention on {device}, forward and backward: largest difference {difference:.1e}"
    return Finding("trial", "ok" if good else "bad", found, "" if good else "please report this output")
