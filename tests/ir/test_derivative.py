"""The derivative of a program against autograd through its evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashfuse.errors import InternalError
from flashfuse.ir import derivative as derivative_module
from flashfuse.ir.derivative import differentiate, index_letters
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import evaluate

sys.path.insert(0, str(Path(__file__).parent))
from programs import grid_leaf, on_grid, random_score


@pytest.mark.parametrize("seed", range(150))
def test_random_programs(seed: int) -> None:
    torch.manual_seed(seed)
    M, N = 3, 4
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((M, N), (M,), (N,), (M, N))]
    score, *captures = leaves
    weight = torch.randn(M, N, dtype=torch.float64)
    program = random_score(seed)
    out = on_grid(program, M, N, score=score, captures=captures)
    expected = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    derivative = differentiate(program, (0, 1, 2))
    plain = [leaf.detach() for leaf in leaves]
    results = evaluate(
        derivative.program, grid_leaf(M, N, score=plain[0], captures=plain[1:], grad=weight), torch.float64
    )
    sums = [torch.zeros_like(leaf) for leaf in plain]
    sums[0] += torch.as_tensor(results[0])
    for (capture, letters), result in zip(derivative.loads, results[1:], strict=True):
        assert letters == ("m", "n", "mn")[capture]
        missing = [axis for axis, letter in enumerate("mn") if letter not in letters]
        whole = torch.as_tensor(result, dtype=torch.float64).expand(M, N)
        sums[capture + 1] += whole.sum(missing) if missing else whole
    for own, theirs in zip(sums, expected, strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if theirs is None else theirs, rtol=1e-10, atol=1e-10)


def test_index_letters() -> None:
    builder = Builder()
    b, h, m, n = (builder.leaf("index", letter) for letter in "bhmn")
    table = builder.leaf("load", 0, Kind.FLOAT, (h, n - m))
    bias = builder.leaf("load", 1, Kind.FLOAT, (b,))
    program = builder.program(table, bias, builder.leaf("score"), builder.leaf("length", "M"))
    assert [index_letters(program, result) for result in program.results] == ["hmn", "b", "bhmn", ""]


def test_only_asked_captures_get_gradients() -> None:
    program = next(p for p in map(random_score, range(100)) if p.loads() == (0, 1, 2))
    assert {number for number, _ in differentiate(program, (1,)).loads} == {1}
    assert differentiate(program).loads == ()
    assert len(differentiate(program).program.results) == 1


def test_a_score_that_does_not_matter_has_gradient_zero() -> None:
    builder = Builder()
    program = builder.program(builder.leaf("load", 0, Kind.FLOAT, (builder.leaf("index", "n"),)))
    derivative = differentiate(program, (0,))
    assert evaluate(derivative.program, lambda *_: torch.ones(2))[0] == 0.0


def test_an_operation_without_derivative_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    builder = Builder()
    program = builder.program(builder.op("tanh", builder.leaf("score")))
    rows = {**derivative_module.SCORE_OPS, "tanh": dataclasses.replace(derivative_module.SCORE_OPS["tanh"], grad=None)}
    monkeypatch.setattr(derivative_module, "SCORE_OPS", rows)
    with pytest.raises(InternalError, match="tanh has no derivative"):
        derivative_module.differentiate.__wrapped__(program)
