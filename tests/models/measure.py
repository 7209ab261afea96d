"""One model in one mode: what flashfuse fuses, what it refuses and why, its own seconds, and its errors.

The measure is FlashAttention's: every output and every gradient may be at most twice as far from float64 as same-precision
eager code is. `ratio` is the error divided by eager's error plus half a floor, so the rule reads `ratio <= 2`. The floor is a
few units in the last place of the tensor's largest element, and for gradients one of the model's largest gradient: the
gradient of a key bias, say, is zero in exact arithmetic, and both errors are then noise of other terms.

Where a model fails the rule its conditioning is measured: eager code is run again with every parameter changed by about one
unit in the last place. An algorithm cannot be asked to be better than that, so the error may be twice the largest of these,
and the model is reported as ill-conditioned (routers that pick experts by `topk`, say).
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashfuse.backend import compile_inner, fuse
from flashfuse.options import parse
from flashfuse.records import GraphRecord, SiteRecord

ULPS = 4  # the floor of a tensor's error, in units in the last place of its largest element
SHAKEN = 8  # copies that tell a model's conditioning: of LeViT in bfloat16 one in eight strays 49 times as far as eager code
NOT_ATTENTION, ALREADY_ONE_KERNEL = "FF101", "FF102"


@dataclass(frozen=True)
class Mode:
    """How a model runs: `train` with the rate of all dropouts or `infer`, a dtype, `static` or `dynamic` shapes."""

    training: bool
    dropout: float
    dtype: torch.dtype
    dynamic: bool

    @classmethod
    def of(cls, name: str) -> Mode:
        """From a name like `infer-fp32-static`, `train-bf16-dynamic` or `dropout-fp32-static`."""
        kind, dtype, shapes = name.split("-")
        dropout = {"infer": 0.0, "train": 0.0, "dropout": 0.1}[kind]
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        return cls(kind != "infer", dropout, dtypes[dtype], {"static": False, "dynamic": True}[shapes])


MODES = tuple(f"{kind}-{dtype}-{shapes}" for kind in ("infer", "train", "dropout") for dtype in ("fp32", "bf16")
              for shapes in ("static", "dynamic"))  # fmt: skip


@dataclass
class Found:
    """What the backend did over all graphs of a model."""

    records: list[GraphRecord] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sites(self) -> list[SiteRecord]:
        """The attentions: every site but softmaxes that are none and SDPA calls that PyTorch's kernels serve."""
        every = (site for record in self.records for site in record.sites)
        return [s for s in every if s.refusal is None or s.refusal.code not in (NOT_ATTENTION, ALREADY_ONE_KERNEL)]

    @property
    def failures(self) -> list[str]:
        """Why graphs could not be read."""
        return [record.failure for record in self.records if record.failure]

    def backend(self, inner: str) -> Callable[..., Any]:
        """A torch.compile backend that is flashfuse and notes what it does."""
        options = parse({"inner": inner}, None)

        def compile_graph(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            start = time.process_time()
            result = fuse(module, options)
            self.seconds += time.process_time() - start
            self.records.append(result.record)
            return compile_inner(result.module, inputs, options)

        return compile_graph


def measure(model: nn.Module, inputs: dict[str, Any], mode: Mode, *, inner: str = "eager") -> dict[str, Any]:
    """Run a model compiled and eagerly, and against float64. The result is a row of the table."""
    model = model.to(mode.dtype).train(mode.training)
    inputs = cast(inputs, mode.dtype)
    eager = run(copy.deepcopy(model), inputs, mode)
    found = Found()
    torch._dynamo.reset()
    mine = copy.deepcopy(model)
    compiled = torch.compile(mine, backend=found.backend(inner), dynamic=mode.dynamic)
    ours = run(mine, inputs, mode, call=compiled)
    row = {
        "sites": len(found.sites), "fused": sum(site.fused for site in found.sites), "graphs": len(found.records),
        "refused": [_refusal(site) for site in found.sites if not site.fused], "failures": found.failures,
        "own_seconds": round(found.seconds, 3),
    }  # fmt: skip
    if mode.dropout and any(site.fused for site in found.sites):
        return row | _same_again(compiled, mine, inputs, mode, ours)
    if mode.dropout:
        plain = _captured_alone(model, inputs, mode)
        return row | {"check": "same as captured", "ratio": compare(ours, plain, plain, mode.dtype)[0]}
    return row | errors(model, inputs, mode, ours, eager)


def _refusal(site: SiteRecord) -> dict[str, str]:
    assert site.refusal is not None
    return {"code": site.refusal.code, "where": site.refusal.where, "found": site.refusal.found,
            "way": " <- ".join(site.refusal.reached)}  # fmt: skip


def _captured_alone(model: nn.Module, inputs: dict[str, Any], mode: Mode) -> Named:
    """What Dynamo gives without a compiler: its capture draws random numbers (SEW-D's masks, by numpy), eager code does not."""
    torch._dynamo.reset()
    alone = copy.deepcopy(model)
    return run(alone, inputs, mode, call=torch.compile(alone, backend="eager", dynamic=mode.dynamic))


def _same_again(compiled: Any, module: nn.Module, inputs: dict[str, Any], mode: Mode, ours: Named) -> dict[str, Any]:
    """Fused dropout draws other numbers than eager code: finite everywhere, and the same for the same seed.

    The first call does not count: Dynamo draws numpy's numbers while it captures (BigBird's random blocks).
    """
    first, again = (run(module, inputs, mode, call=compiled) for _ in range(2))
    finite = all(bool(t.isfinite().all()) for t in ours.values())
    same = all(torch.equal(first[name], again[name]) for name in ours)
    return {"check": "finite and repeatable", "ratio": 0.0 if finite and same else float("inf")}


# ------------------------------------------------------------------------------------------------ running

Named = dict[str, Tensor]


def run(module: nn.Module, inputs: dict[str, Any], mode: Mode, call: Callable[..., Any] | None = None) -> Named:
    """All floating-point outputs by name, and in training the gradient of every parameter."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # what speech models mask in training
    with torch.set_grad_enabled(mode.training):
        outputs = dict(named_tensors((module if call is None else call)(**inputs)))
    if not mode.training:
        return outputs
    module.zero_grad()
    loss = sum((out * _weights(out)).sum() for out in outputs.values() if out.requires_grad)
    assert isinstance(loss, Tensor), "no output depends on a parameter"
    loss.backward()
    # a parameter that the loss does not use has no gradient in eager code and a zero one in compiled code
    grads = {f"grad of {name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in (outputs | grads).items()}


def _weights(out: Tensor) -> Tensor:
    """The gradient of the loss with respect to an output: fixed, of both signs, the same in every precision."""
    steps = torch.arange(out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    return ((steps * 0.7548776662).cos() * out.numel() ** -0.5).bfloat16().to(out.dtype)


def named_tensors(value: Any, name: str = "out") -> Iterable[tuple[str, Tensor]]:
    """The floating-point tensors in tuples, dictionaries and model outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{place}")


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating-point inputs in a dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {name: cast(value, dtype) for name, value in inputs.items()}
    return [cast(value, dtype) for value in inputs] if isinstance(inputs, list) else inputs


class _InFloat64(TorchFunctionMode):
    """Whatever asks for a narrower float gets float64: models compute their softmax and norms in float32 by name."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        wide = [_widened(each) for each in args]
        return function(*wide, **{name: _widened(each) for name, each in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) and isinstance(value, torch.dtype) else value


@contextmanager
def float64() -> Iterator[None]:
    """Everything in float64, literals included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------ errors


def errors(model: nn.Module, inputs: dict[str, Any], mode: Mode, ours: Named, eager: Named) -> dict[str, Any]:
    """The largest ratio, whose it is, and whether the rule held by itself or only given the model's conditioning."""
    check, ulps = "float64", ULPS
    try:
        with float64():
            exact = run(copy.deepcopy(model).double(), cast(inputs, torch.float64), mode)
    except Exception as error:
        check, ulps, exact = f"against eager: {type(error).__name__} in float64", 64, eager
    ratio, worst = compare(ours, eager, exact, mode.dtype, ulps=ulps)
    if ratio <= 2:
        return {"check": check, "ratio": ratio, "worst": worst}
    others = [run(_shaken(model, seed), inputs, mode) for seed in range(SHAKEN)]
    bounded, name = compare(ours, eager, exact, mode.dtype, others=others, ulps=ulps)
    check = "conditioning" if check == "float64" else check
    return {"check": check, "ratio": ratio, "worst": worst, "bounded": bounded, "bounded_worst": name}


def _shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy with every parameter changed by about one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(parameter.double() * (1 + signs * torch.finfo(parameter.dtype).eps))
    return model


def compare(
    ours: Named, eager: Named, exact: Named, dtype: torch.dtype, *, others: Iterable[Named] = (), ulps: int = ULPS
) -> tuple[float, str]:
    """The largest ratio over all tensors, and its name. Elements that are not finite in eager code must not be so here."""
    assert ours.keys() == eager.keys() == exact.keys()
    eps = torch.finfo(dtype).eps
    steepest = max((_largest(t) for name, t in exact.items() if name.startswith("grad of")), default=0.0)
    found, worst = 0.0, ""
    for name, best in exact.items():
        floor = eps * (ulps * _largest(best) + steepest * name.startswith("grad of"))
        mine = _distance(ours[name], eager[name], best)
        theirs = max(_distance(each[name], eager[name], best) for each in (eager, *others))
        ratio = mine / (theirs + floor / 2) if mine else 0.0
        if not ratio <= found:
            found, worst = ratio, name
    return found, worst


def _largest(tensor: Tensor) -> float:
    known = tensor[tensor.isfinite()]
    return float(known.abs().max()) if known.numel() else 0.0


def _distance(tensor: Tensor, eager: Tensor, exact: Tensor) -> float:
    """The largest difference where eager code and float64 are finite; infinite if only `tensor` is not."""
    assert tensor.shape == eager.shape == exact.shape
    where = eager.isfinite() & exact.isfinite()
    if not where.any():
        return 0.0
    difference = (tensor.double() - exact.double())[where].abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")
