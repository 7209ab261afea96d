"""The normal form call by call and by one trace of the whole graph: they agree, and equal layers are traced once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from flashfuse.patterns import call_reader, normalise
from flashfuse.patterns.attention import Match
from flashfuse.patterns.call_reader import read_calls
from flashfuse.patterns.call_traces import NotByCalls
from flashfuse.patterns.normal_form import NormalForm
from flashfuse.patterns.search import find_attention
from flashfuse.patterns.whole_trace import trace_whole


def captured(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    found: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _inputs: list[Any]) -> Any:
        found.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (module,) = found
    return module


def calls(form: NormalForm) -> list[str]:
    form.graph.eliminate_dead_code()
    return [str(node.target) for node in form.graph.nodes if node.op == "call_function" and "sym_" not in str(node.target)]


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 4, 6, 8) for _ in range(3))


def attention(q, k, v):
    mask = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
    scores = torch.where(mask, q @ k.transpose(-2, -1) * 0.3, float("-inf"))
    return F.dropout(scores.softmax(-1), 0.1, training=False) @ v


def written_scores(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores += 1.0
    scores.mul_(0.3)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [attention, written_scores])
def test_both_ways_give_the_same_calls(function: Callable[..., Any], dynamic: bool):
    module = captured(function, *qkv(), dynamic=dynamic)
    by_calls, whole = read_calls(module, lambda node: True), trace_whole(module, lambda node: True)
    idle = [name for name in calls(whole) if name != "aten.dropout.default"]  # it returns its very argument
    assert calls(by_calls) == idle
    assert by_calls.writes == [(time, by_calls.writes[0][1]) for time, _storage in whole.writes]


def layers(number: int) -> Callable[..., Any]:
    def model(q, k, v):
        for _ in range(number):
            q = torch.tanh(attention(q, k, v) + q)
        return q

    return model


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch):
    traced: list[str] = []

    def counted(node: fx.Node, *rest: Any) -> Any:
        traced.append(str(node.target))
        return original(node, *rest)

    original = call_reader.trace_call
    monkeypatch.setattr(call_reader, "trace_call", counted)
    counts = []
    for number in (2, 6):
        traced.clear()
        form = read_calls(captured(layers(number), *qkv()), lambda node: True)
        counts.append(len(traced))
        assert calls(form).count("aten.softmax.int") == number
    assert counts[0] == counts[1]


def dropout_written(q, k, v):
    """Eval-mode dropout returns its argument itself: what is written into the one is written into the other."""
    q = q * 1.0
    dropped = F.dropout(q, 0.1, training=False)
    dropped *= 0.5
    return (q @ k.mT).softmax(-1) @ v


def view_written(q, k, v):
    scores = q @ k.mT
    scores[..., 0] += 5.0
    return scores.softmax(-1) @ v


def test_a_write_through_idle_dropout_is_seen():
    module = captured(dropout_written, *qkv())
    form = read_calls(module, lambda node: True)
    (site,) = find_attention(form.graph, requires_grad=lambda node: False)
    assert isinstance(site.found, Match)
    assert dict(site.found.spec.describe())["score"] == "s * 0.5"


def fill_as_tensor(q, k, v):
    keep = torch.tensor([[True, False, True, True, True, False]])
    fill = torch.tensor(torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(keep, q @ k.mT, fill).softmax(-1) @ v


def test_a_number_made_a_tensor_keeps_its_value():
    form = read_calls(captured(fill_as_tensor, *qkv()), lambda node: True)
    (site,) = find_attention(form.graph, requires_grad=lambda node: False)
    assert isinstance(site.found, Match), site.found
    assert len(site.found.captures) == 1


def test_a_write_into_a_view_needs_the_whole_graph():
    module = captured(view_written, *qkv())
    with pytest.raises(NotByCalls, match="another view"):
        read_calls(module, lambda node: True)
    form = normalise.normalise(module, writes_of=lambda node: True)
    assert any("scatter" in name or "copy" in name for name in calls(form))


def test_functorch_is_left_as_it_was():
    """A trace that stops between the entering and the leaving of a vmap must not leave its level behind."""

    def model(x):
        y = torch.vmap(lambda row: row * 2)(x)
        return (y @ y.mT).softmax(-1) @ y

    module = captured(model, torch.randn(3, 4))
    inside = next(node for node in module.graph.nodes if node.target in ("mul", operator.mul))
    inside.target = unreadable
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    with pytest.raises(NotByCalls, match="a vmap: "):
        read_calls(module, lambda node: True)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == depth
    with pytest.raises((ZeroDivisionError, RuntimeError)):  # torch 2.11 cannot trace the vmap itself
        trace_whole(module, lambda node: True)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == depth


def unreadable(*_arguments: Any) -> None:
    """Stands for a call that cannot be traced."""
    assert torch._C._functorch.get_dynamic_layer_stack_depth() > 0
    raise ZeroDivisionError


def adds_in_place(m: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    later = m + n
    return later.sub_(m) <= 0


VMAPS = {
    "_to_copy": lambda m, n: (m * 0.5) * n <= 2,
    "sub_": adds_in_place,
    "rand": lambda m, n: torch.rand(()) * n <= m,
}


@pytest.mark.parametrize("name", VMAPS)
def test_a_vmap_that_computes_floats_writes_or_draws_is_not_read(name: str):
    rule, positions = VMAPS[name], torch.arange(6)

    def model(q, k, v):
        both = torch.vmap(torch.vmap(rule, in_dims=(None, 0), randomness="same"), in_dims=(0, None), randomness="same")
        mask = both(positions, positions)
        return (q @ k.mT).masked_fill(~mask, -1e4).softmax(-1) @ v

    with pytest.raises(NotByCalls, match=f"{name}.* in a vmap"):
        read_calls(captured(model, *qkv()), lambda node: True)


def test_a_vmap_with_two_results_is_not_read():
    def model(q, k, v):
        mask, twice = torch.vmap(lambda m: (m > 0, m * 2))(torch.arange(6))
        return (q @ k.mT).masked_fill(mask, -1e4).softmax(-1) @ v + twice[-1]

    with pytest.raises(NotByCalls, match="several results"):
        read_calls(captured(model, *qkv()), lambda node: True)
