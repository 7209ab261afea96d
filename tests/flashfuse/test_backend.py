"""Options, strictness, fallbacks, and memory: what a user meets around the attention itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashfuse import backend
from flashfuse.codegen import kernel_choice
from flashfuse.options import parse


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def attention(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def refused(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1).cumprod(-1) @ v


def qkv(length: int = 8) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, length, 16) for _ in range(3))


def compiled(function, **options):
    return torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"} | options)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strikt": True}, "did you mean 'strict'"),
        ({"inner": "inducter"}, "did you mean 'inductor'"),
        ({"sdpa": "allways"}, "did you mean 'always'"),
        ({"kernel": "hoper"}, "did you mean 'hopper'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"strict": "yes"}, "must be True or False"),
    ],
)
def test_a_wrong_option_is_an_error_that_helps(options: dict, message: str):
    with pytest.raises(Exception, match=message):
        torch.compile(attention, backend="flashfuse", options=options)(*qkv())


def test_inductors_options_and_mode_are_passed_on():
    q, k, v = qkv()
    for arguments in ({"options": {"max_fusion_size": 32}}, {"mode": "max-autotune-no-cudagraphs"}):
        torch._dynamo.reset()
        out = torch.compile(attention, backend="flashfuse", **arguments)(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "options", "tuned"),
    [
        ("max-autotune", {}, 2),
        ("max-autotune-no-cudagraphs", {}, 2),
        (None, {"max_autotune": True}, 2),
        ("reduce-overhead", {}, 0),
        (None, {}, 0),
    ],
)
def test_max_autotune_asks_for_tuning(mode: str | None, options: dict, tuned: int, monkeypatch: pytest.MonkeyPatch):
    from flashfuse.codegen import tuning

    monkeypatch.setattr(tuning, "_requested", set())

    def half(q, k, v):
        return (q @ k.mT * 0.5).softmax(-1) @ v

    def function(q, k, v):
        return checkpoint(half, q, k, v, use_reentrant=False) + (q @ k.mT).softmax(-1) @ v  # one of them in a sub-graph

    def with_mode(module, inputs):
        return backend.flashfuse(module, inputs, mode=mode, options={"inner": "eager", **options})

    inputs = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(torch.compile(function, backend=with_mode)(*inputs), function(*inputs), atol=1e-5, rtol=1e-5)
    assert len(tuning._requested) == tuned


@pytest.mark.parametrize("inner", ["eager", "aot_eager", lambda module, inputs: module.forward], ids=["eager", "aot", "callable"])
def test_every_inner_compiler_gets_a_graph_that_runs(inner):
    q, k, v = qkv()
    out = torch.compile(attention, backend="flashfuse", options={"inner": inner})(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_the_rewritten_graph_holds_no_dead_attention():
    """Nothing of the eager attention is left for an inner compiler that runs what it gets."""
    handed = []

    def inner(module, inputs):
        handed.append(module)
        return module.forward

    def in_place(q, k, v):
        scores = q @ k.mT
        scores *= 0.25
        scores.masked_fill_(torch.ones(8, 8, dtype=torch.bool).tril().logical_not(), float("-inf"))
        return scores.softmax(-1) @ v

    torch.compile(in_place, backend="flashfuse", options={"inner": inner})(*qkv())
    targets = [str(node.target) for node in handed[0].graph.nodes if node.op in ("call_function", "call_method")]
    assert len(targets) == 2, targets
    assert "flashfuse.attention" in targets[0]


def written_over(q, k, v):
    """Scores whose old values are read to make the new ones."""
    scores = q @ k.mT * 0.25
    scores[:, 0:, 0:] = scores[:, 0:, 0:].view(*scores.shape[:-1], 2, -1).tanh().flatten(-2)
    return scores.softmax(-1) @ v


def written_over_and_shown(q, k, v):
    scores = q @ k.mT * 0.25
    before = scores[:, :, :1] * 2.0
    scores.copy_(scores.tanh())
    return scores.softmax(-1) @ v + before.sum()


def test_scores_that_were_written_over_go_with_what_made_them():
    graphs = []

    def inner(module, inputs):
        graphs.append(module.graph)
        return module

    for function in (written_over, written_over_and_shown):
        torch._dynamo.reset()
        inputs = qkv()
        found = torch.compile(function, backend="flashfuse", options={"inner": inner})(*inputs)
        torch.testing.assert_close(found, function(*inputs))
    left = [{node.name for node in graph.nodes if node.op in ("call_function", "call_method")} for graph in graphs]
    assert not any("tanh" in name or "matmul" in name or "setitem" in name for name in left[0]), left[0]
    assert any("matmul" in name for name in left[1]), left[1]


def test_strict_turns_a_refusal_into_an_error_with_the_line():
    with pytest.raises(Exception, match=r"test_backend.py:\d+.*FF401"):
        compiled(refused, strict=True)(*qkv())
    compiled(attention, strict=True)(*qkv())


def test_the_kernel_option_reaches_every_attention_and_every_term_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}
    monkeypatch.setattr(kernel_choice, "ask", asked.__setitem__)

    def difference(q, k, v):
        return ((q @ k.mT * 0.5).softmax(-1) - 0.5 * (q @ k.mT * 0.125).softmax(-1)) @ v

    compiled(attention, kernel="portable")(*qkv())
    assert list(asked.values()) == ["portable"]
    compiled(difference, kernel="hopper")(*qkv())
    assert sorted(asked.values()) == ["hopper", "hopper", "portable"]


# ------------------------------------------------------------------------------------------------ fallbacks


def test_a_model_may_write_into_the_output():
    """As Nystromformer's convolution does: eager code's backward does not read a product's result, the fused one does."""

    def function(q, k, v):
        out = attention(q, k, v)
        out += v
        return out

    leaves = [torch.randn(2, 4, 24, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(function, backend="flashfuse", options={"inner": "eager"})
    ours = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert torch._dynamo.utils.counters["flashfuse"]["fused"] == 1
    for mine, eager in zip(ours, torch.autograd.grad(function(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-4, rtol=1e-4)


def test_a_graph_of_numbers_alone_is_no_failure():
    """Between two graph breaks a model with dynamic shapes may compute with lengths only."""

    def function(x, length):
        count = length * 2 + 1
        torch._dynamo.graph_break()
        return x[:1] + count

    seen = []

    def compile_graph(module, _inputs):
        seen.append(backend.fuse(module, parse(None, None)).record)
        return module.forward

    torch.compile(function, backend=compile_graph, dynamic=True)(torch.ones(4), 5)
    assert len(seen) == 2
    assert not any(record.failure for record in seen)


@pytest.mark.parametrize("stage", ["normalise", "find_attention"])
def test_a_failure_inside_flashfuse_costs_one_warning(stage: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(backend, stage, broken)
    q, k, v = qkv()
    with pytest.warns(UserWarning, match=r"flashfuse: .*planted") as caught:
        out = compiled(attention)(q, k, v)
    assert len([w for w in caught if "flashfuse" in str(w.message)]) == 1
    torch.testing.assert_close(out, attention(q, k, v))


def test_a_failure_while_rewriting_keeps_the_captured_graph(monkeypatch: pytest.MonkeyPatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(backend.Rewriter, "replace", broken)
    q, k, v = qkv()
    with pytest.warns(UserWarning, match="planted"):
        torch.testing.assert_close(compiled(attention)(q, k, v), attention(q, k, v))


def test_a_failure_is_an_error_when_strict(monkeypatch: pytest.MonkeyPatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(backend, "normalise", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=r"StrictError: .*planted"):
            compiled(attention, strict=True)(*qkv())


def test_an_unsupported_dtype_is_refused_and_still_runs():
    q, k, v = (t.double() for t in qkv())
    torch.testing.assert_close(compiled(attention)(q, k, v), attention(q, k, v))
    assert torch._dynamo.utils.counters["flashfuse"] == {"refused": 1}


def test_graph_breaks():
    def function(q, k, v):
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(out, k, v)

    q, k, v = qkv()
    torch.testing.assert_close(compiled(function)(q, k, v), function(q, k, v), atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["flashfuse"]["fused"] == 2


def test_an_attention_that_only_a_checkpoint_reads_is_found():
    def function(q, k, v):
        out = attention(q, k, v)
        return checkpoint(lambda t: attention(t, k, v), out, use_reentrant=False)

    q, k, v = qkv()
    torch.testing.assert_close(compiled(function)(q, k, v), function(q, k, v), atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["flashfuse"]["fused"] == 2


# ------------------------------------------------------------------------------------------------ memory


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result has while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_scores_is_made_or_saved():
    length = 1024

    def causal(q, k, v):
        i = torch.arange(q.shape[-2])
        mask = torch.where(i[None, :] <= i[:, None], 0.0, torch.finfo(q.dtype).min)
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v

    largest, saved = LargestTensor(), []

    def watched(module, _inputs):
        def run(*arguments):
            with largest:  # around the compiled code: a mode around the call would make Dynamo step aside
                return module(*arguments)

        return make_boxed_func(run)

    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    function = compiled(causal, inner=aot_autograd(fw_compiler=watched, bw_compiler=watched))
    function(q, k, v).sum().backward()  # compiles; tracing saves tensors of its own
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(q, k, v).sum().backward()
    assert torch._dynamo.utils.counters["flashfuse"]["fused"] == 1
    assert length * 16 <= largest.elements < length * length / 4
    assert saved
    assert max(t.numel() for t in saved) <= length * 16
