"""What the files of a dump need to run by themselves: random inputs, a run, and the comparison of eager with flashfuse."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def tensor(
    size: Sequence[int], stride: Sequence[int], dtype: str, device: str, *, grad: bool = False, std: float = 1.0
) -> torch.Tensor:
    """Random elements in a given layout: normal floats, mostly True booleans, integers 0 and 1.

    A device that this machine lacks is replaced by the CPU.
    """
    kind: torch.dtype = getattr(torch, dtype)
    place = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    out = torch.empty_strided(tuple(size), tuple(stride), dtype=kind, device=place)
    if 0 in stride or out.numel() == 0:  # expanded: elements share memory, so fill what lies under them
        base = torch.empty(out.untyped_storage().nbytes() // out.element_size(), dtype=kind, device=place)
        _fill(base, std)
        out = base.as_strided(tuple(size), tuple(stride))
    else:
        _fill(out, std)
    return out.requires_grad_(grad)


def _fill(out: torch.Tensor, std: float) -> None:
    if out.is_floating_point() or out.is_complex():
        out.normal_(std=std)
    elif out.dtype is torch.bool:
        out.copy_(torch.rand(out.shape, device=out.device) < 0.9)
    else:
        out.random_(0, 2)


def constants(beside: str, name: str) -> dict[str, torch.Tensor]:
    """The tensors saved beside a file of the dump."""
    place = None if torch.cuda.is_available() else "cpu"
    return torch.load(Path(beside).parent / name, map_location=place, weights_only=True)


def as_graph(module: torch.nn.Module) -> torch.fx.GraphModule:
    """A sub-graph as higher-order operators want it."""
    return torch.fx.symbolic_trace(module)


def hold(module: torch.nn.Module, target: str, value: Any) -> None:
    """Set an attribute by its dotted path."""
    *owners, name = target.split(".")
    for owner in owners:
        if not hasattr(module, owner):
            setattr(module, owner, torch.nn.Module())
        module = getattr(module, owner)
    if isinstance(value, torch.Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


@contextlib.contextmanager
def modes(grad: bool, autocast: tuple[str, str] | None = None) -> Any:
    """Grad mode and autocast as they were around the captured graph."""
    cast = contextlib.nullcontext() if autocast is None else torch.autocast(autocast[0], getattr(torch, autocast[1]))
    with torch.set_grad_enabled(grad), cast:
        yield


def run(
    graph: Callable[..., Any], inputs: Sequence[Any], grad: bool = True, autocast: tuple[str, str] | None = None
) -> list[Any]:
    """Run a graph and print what came out."""
    with modes(grad, autocast):
        outputs = _leaves(graph(*inputs))
    for number, out in enumerate(outputs):
        print(f"output {number}: {_shown(out)}")
    return outputs


def load(path: Path) -> ModuleType:
    """A file of the dump as a module."""
    name = f"flashfuse_dump_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def compare(beside: str, grad: bool = True, autocast: tuple[str, str] | None = None, **options: Any) -> float:
    """Run a captured graph eagerly and with flashfuse on the same random inputs; print and return the largest difference.

    Differences are absolute, of outputs and of the gradients of their sum, NaNs at the same places being equal.
    """
    captured = load(Path(beside).parent / "0_captured.py")
    torch.manual_seed(0)
    inputs = captured.inputs()
    graph = captured.Graph()
    compiled = torch.compile(graph, backend="flashfuse", options=options or None)
    results = [_outcome(each, inputs, grad, autocast) for each in (graph, compiled)]
    counters = torch._dynamo.utils.counters["flashfuse"]
    print(f"attentions fused: {counters['fused']}, left alone: {counters['refused']}")
    worst = 0.0
    for name in results[0]:
        eager, fused = results[0][name], results[1][name]
        difference = largest_difference(eager, fused)
        worst = max(worst, difference)
        print(f"{name:28} largest difference {difference:.3e}   largest value {_largest(eager):.3e}")
    return worst


def run_spec(
    spec: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, captures: list[torch.Tensor], sizes: list[int]
) -> float:
    """Run the op of a spec and compare it with the plain formula in float64; print and return the largest difference."""
    from flashfuse import attention_op
    from flashfuse.ir.attention_spec import from_text

    meaning = from_text(spec)
    print("\n".join(f"{word:<6} {formula}" for word, formula in meaning.describe()))
    with torch.no_grad():
        out, _stats = attention_op.attention(query, key, value, captures, sizes, spec, "bhme")
    return _against_formula(meaning, out, query, key, value, captures, sizes)


def run_kernel(
    file: str, spec: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    captures: list[torch.Tensor], sizes: list[int],
) -> float:  # fmt: skip
    """Run the kernels in `file` forward and compare them with the plain formula in float64."""
    from flashfuse.codegen import launch, load
    from flashfuse.ir.attention_spec import from_text

    reason = launch.unsupported(query, key, value)
    if reason is not None:
        raise SystemExit(f"cannot run here: {reason}. Without a GPU: TRITON_INTERPRET=1 python {file}")
    meaning = from_text(spec)
    load.use_file(meaning, Path(file))
    out, _stats = launch.forward(meaning, query, key, value, captures, sizes)
    return _against_formula(meaning, out, query, key, value, captures, sizes)


def _against_formula(
    meaning: Any, out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    captures: list[torch.Tensor], sizes: list[int],
) -> float:  # fmt: skip
    exact = plain_attention(meaning, query, key, value, captures, sizes)
    difference = largest_difference(out, exact)
    print(f"largest difference from the formula in float64: {difference:.3e}   largest value {_largest(exact):.3e}")
    return difference


def plain_attention(
    meaning: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    captures: Sequence[torch.Tensor], sizes: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """softmax(x) @ value in float64 with all scores in memory: the formulas of `AttentionSpec`, written out."""
    from flashfuse.chunk_ranges import element
    from flashfuse.ir.score_program import evaluate

    group = query.shape[1] // max(1, key.shape[1])
    query, key, value = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = query @ key.mT
    letters = dict(zip("bhmn", scores.shape, strict=True))
    index = {
        letter: torch.arange(length, device=query.device).view([-1 if each == letter else 1 for each in "bhmn"])
        for letter, length in letters.items()
    }

    def value_of(program: Any, **own: torch.Tensor) -> torch.Tensor:
        def leaf(statement: Any, operands: list[Any]) -> Any:
            if statement.op in own:
                return own[statement.op]
            if statement.op == "index":
                return index[statement.attribute]
            if statement.op == "length":
                return letters[statement.attribute.lower()]
            if statement.op == "size":
                return sizes[statement.attribute]
            return element(captures[statement.attribute], statement.kind, operands, torch.float64)

        return torch.as_tensor(evaluate(program, leaf, torch.float64)[0], dtype=torch.float64)

    final = value_of(meaning.score, score=scores).broadcast_to(scores.shape)
    if meaning.sink is not None:
        sink = value_of(meaning.sink).broadcast_to(*scores.shape[:3], 1)
        probabilities = torch.cat([final, sink], -1).softmax(-1)[..., :-1]
    else:
        probabilities = final.softmax(-1)
    if meaning.weight is not None:
        probabilities = value_of(meaning.weight, probability=probabilities)
    return probabilities @ value


def _outcome(
    graph: Callable[..., Any], inputs: Sequence[Any], grad: bool, autocast: tuple[str, str] | None
) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name. Inputs that the graph writes are copied first."""
    fresh = [_copy(each) for each in inputs]
    with modes(grad, autocast):
        outputs = [out for out in _leaves(graph(*fresh)) if isinstance(out, torch.Tensor)]
    found = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
    differentiable = [out for out in outputs if out.requires_grad]
    if grad and differentiable:
        torch.autograd.backward(differentiable, [torch.ones_like(out) for out in differentiable])
        for number, each in enumerate(fresh):
            if isinstance(each, torch.Tensor) and each.grad is not None:
                found[f"gradient of input {number}"] = each.grad
    return found


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if 0 in value.stride():
        return value.detach().requires_grad_(value.requires_grad)
    return copy.copy_(value.detach()).requires_grad_(value.requires_grad)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; infinite for other shapes or NaNs at other places."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    return float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=0.0, posinf=float("inf")).max())


def _largest(value: torch.Tensor) -> float:
    return float(value.detach().double().abs().nan_to_num(nan=0.0).max()) if value.numel() else 0.0


def _leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    size = "x".join(map(str, value.shape)) or "scalar"
    return f"{str(value.dtype).removeprefix('torch.')} {size}, largest value {_largest(value):.4g}"
