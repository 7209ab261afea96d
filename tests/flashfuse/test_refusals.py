"""For every code of the catalogue a small program that gives it, and a message that names the user's line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flashfuse
from flashfuse import backend
from flashfuse.ir.attention_spec import AttentionSpec, Capture
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind
from flashfuse.refusal import CATALOGUE, Refusal, Refused

PROGRAMS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {}


def qkv(*size: int, **more: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*(size or (2, 3, 8, 16)), **more) for _ in range(3))


def gives(code: str, inputs: Callable[[], tuple[Any, ...]] = qkv) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        PROGRAMS[code] = (function, inputs)
        return function

    return register


def plain(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


@gives("FF101")
def gate(q, k, v):
    return q.softmax(-1) * k


@gives("FF102")
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


LAYER = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()


@gives("FF103", lambda: (torch.randn(2, 5, 16),))
def encoder_layer_in_its_fast_path(x):
    with torch.no_grad():
        return LAYER(x)


@gives("FF201")
def scores_without_a_product(q, k, v):
    return (q + k).softmax(-1) @ v.mT


@gives("FF202")
def normalised_over_the_queries(q, k, v):
    return (q @ k.mT * 0.25).softmax(-2) @ v


@gives("FF203", lambda: qkv(1, 8, 8, 16))
def key_with_heads_and_positions_swapped(q, k, v):
    return (q @ k.permute(0, 2, 3, 1) * 0.25).softmax(-1) @ v


@gives("FF204")
def one_query_as_a_vector(q, k, v):
    return (k[0, 0] @ q[0, 0, 0]).softmax(-1) @ v[0, 0]


@gives("FF206", lambda: qkv(2, 3, 8, 16, dtype=torch.float64))
def double_precision(q, k, v):
    return plain(q, k, v)


@gives("FF207", lambda: qkv(1, 1, 4, 520))
def wide_heads(q, k, v):
    return plain(q, k, v)


@gives("FF208", lambda: qkv(1, 1, 4, 16, device="meta"))
def no_device(q, k, v):
    return plain(q, k, v)


@gives("FF303")
def key_written_in_between(q, k, v):
    k = k.tanh()
    p = (q @ k.mT * 0.25).softmax(-1)
    k.mul_(2.0)
    return p @ v + k.sum()


@gives("FF401")
def running_sum_of_the_scores(q, k, v):
    return (q @ k.mT * 0.25).cumsum(-1).softmax(-1) @ v


@gives("FF402")
def rounded_division(q, k, v):
    return torch.div(q @ k.mT, 3, rounding_mode="floor").softmax(-1) @ v


@gives("FF403")
def keys_of_their_own_for_each_query(q, k, v):
    keys = k[:, :, None] + q[:, :, :, None]
    return torch.einsum("bhmd,bhmnd->bhmn", q, keys).softmax(-1) @ v


@gives("FF407")
def dropped_probabilities_returned(q, k, v):
    p = F.dropout((q @ k.mT * 0.25).softmax(-1), 0.5, training=True)
    return p @ v, p


@gives("FF408", lambda: qkv(2, 3, 8, 16, requires_grad=True))
def detached_probabilities(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1).detach() @ v


@gives("FF304")
def dropout_of_whole_heads(q, k, v):
    return F.dropout2d((q @ k.mT * 0.25).softmax(-1), 0.5) @ v


@gives("FF405", lambda: (*qkv(), torch.randn(8, 8, requires_grad=True)))
def one_bias_read_in_two_ways(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias + bias.mT).softmax(-1) @ v


PLANTED = {"FF104", "FF501"}  # failures of flashfuse itself, or of tracing


def refusal_of(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Refusal:
    torch._dynamo.reset()
    report = flashfuse.explain(function, *inputs)
    assert not report.fused
    assert not report.error
    (site,) = (site for graph in report.graphs for site in graph.sites)
    assert site.refusal is not None
    return site.refusal


def test_there_is_a_program_for_every_code():
    assert set(PROGRAMS) | PLANTED == set(CATALOGUE)


@pytest.mark.parametrize("code", PROGRAMS)
def test_the_code_and_the_users_line(code: str):
    function, make = PROGRAMS[code]
    found = refusal_of(function, make())
    assert found.code == code, str(found)
    name, line = found.where.split(":")
    assert name == "test_refusals.py"
    blocks = [inspect.getsourcelines(each) for each in (function, plain)]
    assert any(start <= int(line) < start + len(lines) for lines, start in blocks), str(found)
    assert str(found).startswith(f"{found.where}  {code} ")
    assert found.entry.hint


def test_a_graph_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(backend, "normalise", broken)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="FF104 could not be read: RuntimeError: planted"):
        report = flashfuse.explain(plain, *qkv())
    assert "FF104 could not be read: RuntimeError: planted" in str(report)


def test_a_failure_while_rewriting(monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(backend.Rewriter, "replace", broken)
    with pytest.warns(UserWarning, match=r"test_refusals.py:\d+ is compiled without flashfuse"):
        found = refusal_of(plain, qkv())
    assert found.code == "FF501"
    assert "planted" in found.found


def test_a_gradient_at_computed_positions():
    """Capturing takes such tensors in another form; this is the net below it."""
    from flashfuse.patterns.attention import check_gradients

    builder = Builder()
    twice = builder.leaf("index", "n") * 2
    spec = AttentionSpec(
        builder.program(builder.leaf("score") + builder.leaf("load", 0, Kind.FLOAT, [twice])), (Capture("c0", Kind.FLOAT, 1),)
    )
    lifter = SimpleNamespace(captures=[SimpleNamespace(node=object())])
    for needed in (False, True):
        flow = SimpleNamespace(needed=lambda _node, needed=needed: needed)
        if not needed:
            check_gradients(spec, lifter, flow)  # type: ignore[arg-type]
            continue
        with pytest.raises(Refused, match="FF405"):
            check_gradients(spec, lifter, flow)  # type: ignore[arg-type]
