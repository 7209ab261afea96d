"""Sums of softmaxes before one value: errors in 16 bits, where outputs could cancel, the kernels, and what is said of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashfuse
from flashfuse import attention_op
from flashfuse.patterns.sums import Edge, check_terms
from flashfuse.refusal import Refused

sys.path.insert(0, str(Path(__file__).parents[1] / "patterns"))
from zoo import SPELLINGS

B, H, S, D = 1, 2, 33, 16


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def differential(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    first, second = (q @ k.mT * 0.25).softmax(-1).view(B, H, 2, S, S).unbind(2)
    return (first - factor * second) @ v


def results(function, tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


@pytest.mark.parametrize("kernels", [False, True])
def test_a_difference_of_nearly_equal_outputs_is_as_exact_as_eager(kernels: bool, monkeypatch: pytest.MonkeyPatch):
    """Values with a large mean: each output rounded by itself would be several times worse than eager's."""
    if kernels:
        launch = pytest.importorskip("flashfuse.codegen.launch")
        if not launch.interpreting():
            pytest.skip("runs in Triton's interpreter")
        monkeypatch.setenv("FLASHFUSE_INTERPRET", "1")
        monkeypatch.setenv("FLASHFUSE_STRICT", "1")
    dtype = torch.float16 if kernels else torch.bfloat16  # the interpreter's numpy has no bfloat16
    shapes = ((B, 2 * H, S, D), (B, 2 * H, S, D), (B, H, S, 2 * D))
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[2] = tensors[2] + 8
    tensors.append(torch.tensor(0.97).to(dtype))
    weight = torch.randn(B, H, S, 2 * D)
    exact = results(differential, [tensor.double() for tensor in tensors], weight.to(dtype).double())
    eager = results(differential, tensors, weight)
    ours = results(torch.compile(differential, backend="flashfuse", options={"inner": "aot_eager"}), tensors, weight)
    assert torch._dynamo.utils.counters["flashfuse"] == {"fused": 2}
    for mine, same, best in zip(ours, eager, exact, strict=True):
        assert mine.dtype == same.dtype
        error, allowed = (mine - best).abs().max(), 2 * (same - best).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps / 4 * best.abs().max()


def test_a_wide_spec_gives_float32_and_reads_back_equal():
    entry = next(each for each in SPELLINGS if each.name == "difference_of_two_softmaxes")
    report = flashfuse.explain(entry.function, *(tensor.bfloat16() for tensor in entry.inputs()))
    first, second = report.sites
    spec = first.spec
    assert spec.wide
    assert attention_op.from_text(spec.to_text()) == spec
    assert spec.key != replace(spec, wide=False).key
    assert spec.out_dtype(torch.bfloat16) is torch.float32
    assert spec.out_dtype(torch.float64) is torch.float64
    assert dict(first.notes)["sum"] == "one of 2 outputs that are added up, times 1"
    assert dict(second.notes)["sum"] == "one of 2 outputs that are added up, times -1 * factor"
    assert "added up" in str(report)


def test_terms_must_be_each_once_what_the_sums_add_up():
    graph = torch.fx.Graph()
    inner, outer = (graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder(n), n)) for n in "ab")
    outer_0, outer_1, inner_0, inner_1 = Edge(outer, 0), Edge(outer, 1), Edge(inner, 0), Edge(inner, 1)
    check_terms([(outer_0,), (outer_1,)])
    check_terms([(inner_0, outer_0), (inner_1, outer_0), (outer_1,)])
    for wrong in (
        [(outer_0,)],
        [(outer_0,), (outer_0,), (outer_1,)],
        [(inner_0, outer_0), (outer_1,)],
        [(inner_0, outer_0), (inner_1, outer_0), (outer_0,), (outer_1,)],
        [(outer_0,), (outer_1,), ()],
        [(outer_0,), (outer_1,), (inner_0,), (inner_1,)],
    ):
        with pytest.raises(Refused, match="FF401"):
            check_terms(wrong)


def test_one_mask_of_dropout_for_all_terms():
    """The difference of a softmax and another of the same scores is zero, whatever is dropped."""

    def function(q, k, v):
        scores = q @ k.mT * 0.25
        return torch.nn.functional.dropout(scores.softmax(-1) - (scores + 1.0).softmax(-1), 0.5, training=True) @ v

    q, k, v = (torch.randn(B, H, S, D) for _ in range(3))
    out = torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"})(q, k, v)
    assert torch._dynamo.utils.counters["flashfuse"] == {"fused": 2}
    assert out.abs().max() < 1e-5
