"""The operators: registration, gradients, compilation, dispatch and fallback, the fence."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from flashfuse import attention_op, chunked_attention
from flashfuse.errors import FlashfuseError, StrictError
from flashfuse.inductor_lowerings import DIRECT_CALLS, register_lowerings

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, Family, Write, dense

NAMED = {each.name: each for each in FAMILIES}
attention = torch.ops.flashfuse.attention
attention_backward = torch.ops.flashfuse.attention_backward


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.delenv("FLASHFUSE_INTERPRET", raising=False)
    monkeypatch.delenv("FLASHFUSE_STRICT", raising=False)
    monkeypatch.setattr(attention_op, "_warned", set())
    monkeypatch.setattr(attention_op, "_failed", {})


def small(name: str, shape: tuple[int, ...] = (2, 4, 2, 9, 9, 4, 4)) -> Family:
    return Family(**{**vars(NAMED[name]), "shape": shape})


def make(each: Family, dtype: torch.dtype = torch.float32, *, grad: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """query, key, value and captures."""
    B, H, G, M, N, D, E = each.shape
    shapes = ((B, M, H, D), (B, N, G, D), (B, N, G, E))
    tensors = [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_(grad) for shape in shapes]
    captures = [c.to(dtype) if c.is_floating_point() else c for c in each.captures(B, H, M, N)]
    return tensors, [c.requires_grad_(needed and grad) for c, needed in zip(captures, each.needs, strict=True)]


def apply(each: Family, tensors: list[Tensor], captures: list[Tensor], layout: str = "bhme") -> Tensor:
    return attention(*tensors, captures, list(each.sizes), each.spec.to_text(), layout)[0]


OPCHECKED = ("causal", "bias_of_heads", "row_and_column", "documents_causal", "window_of_size", "rows_all_masked_lowest")


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("layout", ["bhme", "bmhe"])
def test_opcheck(name: str, layout: str) -> None:
    each = small(name)
    tensors, captures = make(each)
    torch.library.opcheck(attention, (*tensors, captures, list(each.sizes), each.spec.to_text(), layout))
    with torch.no_grad():
        out, stats = attention(*tensors, captures, list(each.sizes), each.spec.to_text(), layout)
    arguments = [torch.randn_like(out), *tensors, out, stats, captures, list(each.sizes), list(each.needs), each.spec.to_text()]
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    arguments[6] = [capture.detach() for capture in captures]
    torch.library.opcheck(attention_backward, tuple(arguments))


def test_opcheck_of_fence() -> None:
    torch.library.opcheck(torch.ops.flashfuse.fence, (torch.randn(3, 4).mT.requires_grad_(),))


@pytest.mark.parametrize("name", OPCHECKED)
def test_gradients_equal_dense(name: str) -> None:
    each = small(name)
    tensors, captures = make(each, torch.float64)
    wanted = [*tensors, *(c for c in captures if c.requires_grad)]
    out = apply(each, tensors, captures)
    expected = dense(each, *tensors, captures)
    torch.testing.assert_close(out, expected, equal_nan=True)
    weight = torch.randn_like(out)
    for own, theirs in zip(torch.autograd.grad(out, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True):
        torch.testing.assert_close(own, theirs, equal_nan=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3)])
def test_any_subset_of_inputs_may_need_gradients(needed: tuple[int, ...]) -> None:
    each = small("bias_of_heads")
    tensors, captures = make(each, torch.float64, grad=False)
    every = [*tensors, *captures]
    wanted = [every[place].requires_grad_() for place in needed]
    own = torch.autograd.grad(apply(each, tensors, captures).sum(), wanted)
    theirs = torch.autograd.grad(dense(each, *tensors, captures).sum(), wanted)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    each = small("row_and_column", (1, 2, 1, 4, 4, 3, 2))
    tensors, captures = make(each, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: apply(each, list(x[:3]), list(x[3:])), (*tensors, *captures))


def test_layouts_and_fake_strides() -> None:
    each = small("causal")
    tensors, _ = make(each, grad=False)
    text = each.spec.to_text()
    for layout, contiguous in (("bhme", lambda t: t), ("bmhe", lambda t: t.transpose(1, 2))):
        out, stats = attention(*tensors, [], [], text, layout)
        assert contiguous(out).is_contiguous()
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in tensors]
            fake_out, fake_stats = attention(*fakes, [], [], text, layout)
        assert (fake_out.shape, fake_out.stride(), fake_out.dtype) == (out.shape, out.stride(), out.dtype)
        assert (fake_stats.shape, fake_stats.stride(), fake_stats.dtype) == (stats.shape, stats.stride(), stats.dtype)


@pytest.mark.parametrize("make_query", [
    lambda: torch.randn(2, 9, 4, 4).transpose(1, 2),
    lambda: torch.randn(2, 4, 9, 12)[..., 4:8],
    lambda: torch.randn(1, 4, 1, 4).expand(2, 4, 9, 4),
    lambda: torch.randn(2, 4, 4, 9).mT,
])  # fmt: skip
def test_gradients_are_laid_out_as_the_fake_says(make_query: Any) -> None:
    each = small("causal", (2, 4, 4, 9, 9, 4, 4))
    query = make_query()
    out, stats = attention(query, query, query, [], [], each.spec.to_text(), "bhme")
    rest = ([], [], [], each.spec.to_text())
    real = attention_backward(torch.ones(()).expand(out.shape), query, query, query, out, stats, *rest)
    with FakeTensorMode() as mode:
        q, o, s = (mode.from_tensor(tensor) for tensor in (query, out, stats))
        fake = attention_backward(torch.ones(()).expand(out.shape), q, q, q, o, s, *rest)
    for own, like in zip(real, fake, strict=True):
        assert (own.shape, own.stride(), own.dtype) == (like.shape, like.stride(), like.dtype)


def test_meta_tensors() -> None:
    each = small("causal")
    out = attention(*(t.to("meta") for t in make(each, grad=False)[0]), [], [], each.spec.to_text(), "bmhe")[0]
    assert out.is_meta
    assert out.shape == (2, 4, 9, 4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["causal", "bias_of_heads", "window_of_size"])
def test_compiled(name: str, backend: str, dynamic: bool) -> None:
    first = small(name)
    text = first.spec.to_text()

    def model(tensors: list[Tensor], captures: list[Tensor], window: int) -> Tensor:
        out = attention(*tensors, captures, [window] if first.sizes else [], text, "bmhe")[0]
        return out.transpose(1, 2).flatten(2) * 2.0

    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for length in (9, 13) if dynamic else (9,):
        each = Family(**{**vars(first), "shape": (2, 4, 2, length, length, 4, 4), "sizes": (length - 4,)})
        tensors, captures = make(each)
        wanted = [*tensors, *(c for c in captures if c.requires_grad)]
        out, expected = compiled(tensors, captures, length - 4), model(tensors, captures, length - 4)
        torch.testing.assert_close(out, expected)
        for own, theirs in zip(torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
            torch.testing.assert_close(own, theirs)
            assert own.shape == theirs.shape


def test_autocast_changes_nothing() -> None:
    each = small("causal", (1, 2, 2, 70, 70, 16, 16))
    tensors, _ = make(each)
    expected = apply(each, tensors, [])
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = apply(each, tensors, [])
        again = torch.autograd.grad(out.square().sum(), tensors)
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_a_capture_without_plain_positions_cannot_need_a_gradient() -> None:
    each = small("table_by_sum")
    tensors, captures = make(each)
    assert apply(each, tensors, captures).requires_grad
    captures[0].requires_grad_()
    with pytest.raises(FlashfuseError, match="table"):
        apply(each, tensors, captures)
    with torch.no_grad():
        apply(each, tensors, captures)


def test_there_is_no_second_derivative() -> None:
    each = small("causal")
    tensors, _ = make(each)
    (grad,) = torch.autograd.grad(apply(each, tensors, []).sum(), tensors[:1], create_graph=True)
    with pytest.raises(FlashfuseError, match="second derivative"):
        grad.sum().backward()


def test_stats_carry_no_gradient() -> None:
    each = small("causal")
    tensors, _ = make(each)
    out, stats = attention(*tensors, [], [], each.spec.to_text(), "bhme")
    assert out.requires_grad
    assert not stats.requires_grad


# ------------------------------------------------------------------------------------------------ dispatch


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton path, asked for on CPU tensors."""
    launch = pytest.importorskip("flashfuse.codegen.launch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FLASHFUSE_INTERPRET", "1")
    return launch


def test_interpreted_kernels_give_the_same(launch: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("triton was imported for the device")
    each = small("causal", (1, 2, 1, 20, 20, 16, 16))
    tensors, _ = make(each)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = apply(each, tensors, [])
    torch.testing.assert_close(out, dense(each, *tensors, []), rtol=1e-4, atol=1e-4)


def test_a_failing_kernel_warns_once_and_is_replaced(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(spec: Any, *arguments: Any) -> Tensor:
        calls.append(spec)
        raise RuntimeError("no room for this tile")

    monkeypatch.setattr(launch, "forward", broken)
    each = small("causal")
    tensors, _ = make(each, grad=False)
    with pytest.warns(UserWarning, match="no room for this tile"):
        out = apply(each, tensors, [])
    torch.testing.assert_close(out, dense(each, *tensors, []))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(apply(each, tensors, []), out)
    assert len(calls) == 1


def test_strict_raises_instead(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
    monkeypatch.setenv("FLASHFUSE_STRICT", "1")
    each = small("causal")
    with pytest.raises(StrictError, match="no room"):
        apply(each, make(each, grad=False)[0], [])


def test_unsupported_tensors_take_the_chunked_path(launch: Any) -> None:
    each = small("causal")
    tensors, _ = make(each, torch.float64, grad=False)
    with pytest.warns(UserWarning, match="float64"):
        out = apply(each, tensors, [])
    torch.testing.assert_close(out, dense(each, *tensors, []))


def test_cpu_tensors_never_touch_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = chunked_attention.forward
    monkeypatch.setattr(chunked_attention, "forward", lambda *a: (seen.append(1), original(*a))[1])
    each = small("causal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(each, make(each, grad=False)[0], [])
    assert seen


# ------------------------------------------------------------------------------------------------ fence


def over_queries(query: Tensor, key: Tensor, value: Tensor, *, fenced: bool) -> Tensor:
    """No attention: normalised over the queries. Inductor's patterns cannot tell."""
    p = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-2)
    return (torch.ops.flashfuse.fence(p) if fenced else p) @ value


@pytest.mark.parametrize("grad", [False, True])
def test_fence_keeps_inductor_from_misfusing_and_costs_nothing(grad: bool) -> None:
    assert register_lowerings()
    tensors = [torch.randn(2, 4, 16, 8).requires_grad_(grad) for _ in range(3)]
    expected = over_queries(*tensors, fenced=False)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda *x: over_queries(*x, fenced=True))
    out, code = run_and_get_code(compiled, *tensors)
    torch.testing.assert_close(out, expected)
    assert torch._dynamo.utils.counters["inductor"]["fuse_attention"] == 0
    assert not any("flashfuse.fence.default(" in text for text in code)
    torch._dynamo.reset()
    with torch._inductor.config.patch(pattern_matcher=False):
        unfenced = torch.compile(lambda *x: over_queries(*x, fenced=False))
        _, plain_code = run_and_get_code(unfenced, *tensors)
    assert code[0].count("cpp_fused") == plain_code[0].count("cpp_fused")
    if grad:
        weight = torch.randn_like(out)
        for own, theirs in zip(torch.autograd.grad(out, tensors, weight), torch.autograd.grad(expected, tensors, weight),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(own, theirs)


def with_gradients(function: Any, tensors: list[Tensor], weight: Tensor) -> tuple[Tensor, Any]:
    out = function(*tensors)
    return out, torch.autograd.grad(out, tensors, weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_calls_the_attention_directly(dynamic: bool) -> None:
    """Not through the dispatcher; strides that are not the usual ones must arrive as they are."""

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        position = torch.arange(query.shape[1])
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
        return (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2) * 2

    for length in (16, 24):
        tensors = [torch.randn(2, length, 4, 8, requires_grad=True) for _ in range(3)]
        expected = causal(*tensors)
        weight = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, tensors, weight)
        torch._dynamo.reset()
        compiled = torch.compile(causal, backend="flashfuse", dynamic=dynamic)
        (out, gradients), code = run_and_get_code(with_gradients, compiled, tensors, weight)
        torch.testing.assert_close([out, *gradients], [expected, *wanted], atol=1e-4, rtol=1e-4)
        assert len(code) == 2
        assert ["flashfuse_run_forward(" in text for text in code] == [True, False]
        assert ["flashfuse_run_backward(" in text for text in code] == [False, True]
        assert not any(f"torch.ops.flashfuse.{name}.default(" in text for text in code for name in DIRECT_CALLS)


def test_fence_is_the_identity() -> None:
    x = torch.randn(3, requires_grad=True)
    out = torch.ops.flashfuse.fence(x)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_spec_text_of_another_format_is_an_error() -> None:
    w = Write()
    text = Family("x", NAMED["plain"].spec, lambda s: s).spec.to_text().replace('"flashfuse":2', '"flashfuse":99')
    with pytest.raises(FlashfuseError, match="99"):
        attention(*(torch.randn(1, 1, 2, 2) for _ in range(3)), [], [], text, "bhme")
    assert w.captures == []
