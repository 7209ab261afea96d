"""torch.compile(backend="flashfuse") against eager on every spelling and near miss: values, gradients, effects.

The measure is FlashAttention's: the error against a float64 run of the same code is at most twice that of the
same-precision eager run (plus the noise of one float32 addition).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "patterns"))

from zoo import NEAR_MISSES, SPELLINGS, NearMiss, Spelling, qkv

INNER = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def counts() -> tuple[int, int]:
    """(fused, refused)."""
    counters = torch._dynamo.utils.counters["flashfuse"]
    return counters["fused"], counters["refused"]


def run(function: Callable, inputs: tuple, gradients: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients, with the floating inputs in `dtype`."""
    leaves = [
        t.detach().to(dtype).requires_grad_(place in gradients)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for place, t in enumerate(inputs)
    ]
    out = function(*leaves)
    torch.manual_seed(1)
    torch.autograd.backward(out, torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach(), *(leaves[place].grad for place in gradients)]


def reference(function: Callable, inputs: tuple, gradients: tuple[int, ...]) -> list[torch.Tensor]:
    """The same code on float64 inputs. (A float32 island in the code stays one; the noise term covers it.)"""
    torch.set_default_dtype(torch.float64)
    try:
        return run(function, inputs, gradients, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def assert_within_twice(ours: list, eager: list, exact: list) -> None:
    for name, mine, same, best in zip(
        ("out", "grad 0", "grad 1", "grad 2", "grad 3"), ours, eager, exact, strict=False
    ):
        assert mine.dtype == same.dtype
        assert mine.shape == same.shape
        assert torch.equal(mine.isnan(), same.isnan()), name
        mine, same, best = mine.double(), same.double(), best.double()
        noise = 2 * ((best + 0.3 - 0.3) - best).abs().nan_to_num().max() + 2e-6 * best.abs().nan_to_num().max()
        allowed = 2 * (same - best).abs().nan_to_num().max() + noise
        error = (mine - best).abs().nan_to_num().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# What is done to a score does not depend on shapes: test_spellings reads those entries with dynamic shapes too.
_STATIC = ("zoo_scores", "zoo_joined")
_RUNS = [(e, dynamic) for e in SPELLINGS for dynamic in (False, True) if not (dynamic and e.function.__module__ in _STATIC)]


@pytest.mark.parametrize(("entry", "dynamic"), _RUNS, ids=[f"{e.name}-{'dynamic' if d else 'static'}" for e, d in _RUNS])
def test_fused_spelling_equals_eager(entry: Spelling, dynamic: bool):
    inputs = entry.inputs()
    compiled = torch.compile(entry.function, backend="flashfuse", options=INNER, dynamic=dynamic)
    ours = run(compiled, inputs, entry.gradients, torch.float32)
    fused, refused = counts()
    assert refused == 0
    assert fused == entry.sites or dynamic  # Dynamo may capture twice when it finds that a Python float must be specialised
    eager = run(entry.function, inputs, entry.gradients, torch.float32)
    assert_within_twice(ours, eager, reference(entry.exact or entry.function, inputs, entry.gradients))


@pytest.mark.parametrize("entry", NEAR_MISSES, ids=lambda entry: entry.name)
def test_near_miss_is_left_alone_and_right(entry: NearMiss):
    inputs = entry.inputs()
    compiled = torch.compile(entry.function, backend="flashfuse", options=INNER)
    ours = compiled(*[t.clone() for t in inputs])
    assert counts() == (0, entry.sites)
    eager = entry.function(*[t.clone() for t in inputs])
    torch.testing.assert_close(ours, eager, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    [
        "softmax_over_queries",
        "softmax_over_heads",
        "key_with_heads_and_keys_swapped",
        "key_with_batch_and_keys_swapped",
    ],
)
def test_inductor_does_not_misread_what_flashfuse_refused(name: str):
    """Inductor's own matcher ignores the softmax's dim and the key's permutation (pytorch #196468, #195320)."""
    entry = next(entry for entry in NEAR_MISSES if entry.name == name)
    inputs = entry.inputs()
    with torch.no_grad():
        ours = torch.compile(entry.function, backend="flashfuse")(*inputs)
        torch.testing.assert_close(ours, entry.function(*inputs), atol=1e-5, rtol=1e-4)


def test_inductor_does_not_misread_a_finite_masked_fill_with_dropout():
    """Inductor takes the fill for -inf; with a fill of -1 that is plainly wrong."""

    def function(q, k, v, mask):
        scores = (q @ k.transpose(-2, -1) / 4.0).masked_fill(mask, -1.0)
        return torch.nn.functional.dropout(scores.softmax(-1), 0.5, training=True) @ v * 0 + scores.sum()

    def without_dropout(q, k, v, mask):
        scores = (q @ k.transpose(-2, -1) / 4.0).masked_fill(mask, -1.0)
        return scores.softmax(-1) @ v

    mask = torch.rand(2, 1, 1, 24) > 0.5
    inputs = (*qkv(), mask)
    with torch.no_grad():
        for each in (function, without_dropout):
            torch.testing.assert_close(
                torch.compile(each, backend="flashfuse")(*inputs), each(*inputs), atol=1e-4, rtol=1e-4
            )


def test_a_graph_without_attention_is_the_same_object():
    seen: list[Any] = []
    handed: list[Any] = []

    def inner(module, inputs):
        handed.append(module)
        return module.forward

    from flashfuse.backend import flashfuse

    def backend(module, inputs):
        seen.append(module)
        return flashfuse(module, inputs, options={"inner": inner})

    torch.compile(lambda x: torch.softmax(x, -1) * 2, backend=backend)(torch.randn(3, 4))
    assert handed[0] is seen[0]


def test_writes_to_inputs_survive():
    """A key/value cache written in place, then attended to: the write and the attention are both kept."""

    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        return (q @ keys.mT * 0.25).softmax(-1) @ values

    def inputs():
        torch.manual_seed(2)
        return (torch.randn(2, 4, 3, 16), torch.randn(2, 4, 3, 16), torch.randn(2, 4, 3, 16),
                torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16), torch.tensor([2, 3, 4]))  # fmt: skip

    ours, theirs = inputs(), inputs()
    with torch.no_grad():
        a = torch.compile(step, backend="flashfuse", options=INNER)(*ours)
        b = step(*theirs)
    assert counts() == (1, 0)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours[3], theirs[3])
    torch.testing.assert_close(ours[4], theirs[4])


def test_autocast_region():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return (q @ k.mT * 0.25).softmax(-1) @ v

    inputs = qkv()
    ours = torch.compile(function, backend="flashfuse", options=INNER)(*inputs)
    assert counts() == (1, 0)
    eager = function(*inputs)
    assert ours.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(ours, eager, atol=2e-2, rtol=2e-2)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    def block(q, k, v):
        return (q @ k.mT * 0.25).softmax(-1) @ v

    def function(q, k, v):
        return checkpoint(block, q, k, v, use_reentrant=False).sin()

    inputs = qkv()
    ours = run(torch.compile(function, backend="flashfuse", options=INNER), inputs, (0, 1, 2), torch.float32)
    assert counts() == (1, 0)
    for mine, eager in zip(ours, run(function, inputs, (0, 1, 2), torch.float32), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", [False, True], ids=["need_weights=False", "need_weights=True"])
def test_multihead_attention_module(weights: bool):
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x, pad = torch.randn(2, 10, 32), torch.arange(10)[None] >= torch.tensor([10, 6])[:, None]

    def function(x):
        return module(x, x, x, key_padding_mask=pad, need_weights=weights)[0]

    ours = torch.compile(function, backend="flashfuse", options=INNER)(x)
    assert counts()[0] + counts()[1] == 1
    torch.testing.assert_close(ours, function(x), atol=1e-5, rtol=1e-4)


def test_transformer_encoder_trains():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 12, 32)
    loss = torch.compile(layer, backend="flashfuse", options=INNER)(x).square().mean()
    loss.backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().mean().backward()
    for mine, parameter in zip(ours, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-3)


def test_sequence_lengths_share_a_graph():
    function = next(entry.function for entry in SPELLINGS if entry.name == "causal_additive_dynamic")
    compiled = torch.compile(function, backend="flashfuse", options=INNER, dynamic=True)
    for length in (7, 16, 33, 128, 200):
        q, k, v = (torch.randn(2, 4, length, 16) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v), atol=1e-5, rtol=1e-4)
    assert counts()[0] <= 2


def test_no_import_is_needed_and_inductor_compiles_the_rest():
    q, k, v = (t.requires_grad_() for t in qkv())

    def function(q, k, v):
        return ((q.tanh() @ k.mT * 0.25).softmax(-1) @ v).relu()

    out = torch.compile(function, backend="flashfuse")(q, k, v)
    out.sum().backward()
    ours = [out.detach(), *(t.grad.clone() for t in (q, k, v))]
    for t in (q, k, v):
        t.grad = None
    eager = function(q, k, v)
    eager.sum().backward()
    for mine, theirs in zip(ours, [eager.detach(), q.grad, k.grad, v.grad], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert counts() == (1, 0)


@pytest.mark.parametrize("kernels", ["0", "1"], ids=["in torch", "in Triton's interpreter"])
def test_a_bias_of_infinity_before_a_finite_mask_and_zero_after(kernels: str, monkeypatch: pytest.MonkeyPatch):
    """NaN where eager code has it: in a row of -inf that loses no key, and not in one that loses some."""
    if torch.cuda.is_available():
        pytest.skip("triton was imported for the device")
    monkeypatch.setenv("FLASHFUSE_INTERPRET", kernels)
    (entry,) = (entry for entry in SPELLINGS if entry.name == "a_bias_a_finite_mask_and_zero_after")
    q, k, v, bias, _keep = entry.inputs()
    keep = torch.arange(k.shape[2]) < torch.tensor([[k.shape[2]], [k.shape[2] - 3]])
    bias[:, :, 3] = float("-inf")

    def outputs(call: Callable) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = call(*leaves, bias, keep)
        return [out, *torch.autograd.grad(out[:, :, 2:].square().sum(), leaves)]

    ours, eager = outputs(torch.compile(entry.function, backend="flashfuse", options=INNER)), outputs(entry.function)
    assert counts() == (1, 0)
    assert eager[0][0, :, 3].isnan().all()
    assert (eager[0][1, :, 3] == 0).all()
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
