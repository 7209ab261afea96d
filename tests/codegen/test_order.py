"""The order of programs: chosen by which batches and heads share a capture's elements, and without effect on results."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashfuse.codegen import grids, launch
from flashfuse.codegen.order import Order, order_of
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_ops import Kind

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from specs import Program, make_inputs
from test_kernels import run_kernels

KEYS = 1 << 20  # bytes of keys and values a head


def a_call(spec: AttentionSpec, *captures: torch.Tensor, B: int = 4, H: int = 8, M: int = 4096, N: int = 4096) -> launch.Call:
    return SimpleNamespace(spec=spec, captures=captures, B=B, H=H, M=M, N=N)  # type: ignore[return-value]


def pairs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def biased(*letters: str, kind: Kind = Kind.FLOAT) -> AttentionSpec:
    p = Program()
    loaded = p.capture("bias", kind, *(getattr(p, letter) for letter in letters))
    return p.spec(p.masked(loaded, p.s, float("-inf")) if kind is Kind.BOOL else p.s + loaded, EmptyRows.IMPOSSIBLE)


@pytest.mark.parametrize(
    ("letters", "shape", "expected"),
    [
        (("zero", "h", "m", "n"), (1, 8, 4096, 4096), Order(4, swapped=True)),
        (("b", "h", "m", "n"), (4, 8, 4096, 4096), Order()),
        (("b", "zero", "m", "n"), (4, 1, 4096, 4096), Order(8)),
        (("m", "n"), (4096, 4096), Order(16)),
        (("zero", "h", "n"), (1, 8, 4096), Order()),
    ],
)
def test_who_shares_a_bias_runs_side_by_side(letters: tuple[str, ...], shape: tuple[int, ...], expected: Order) -> None:
    assert order_of(a_call(biased(*letters), pairs(*shape)), 8, KEYS) == expected


def test_a_dimension_that_is_only_repeated_is_shared() -> None:
    bias = pairs(1, 8, 4096, 4096).expand(4, 8, 4096, 4096)
    assert order_of(a_call(biased("b", "h", "m", "n"), bias), 8, KEYS) == Order(4, swapped=True)


def test_what_the_cache_holds_changes_nothing() -> None:
    call = a_call(biased("b", "zero", "m", "n"), pairs(4, 1, 2048, 2048), M=2048, N=2048)  # 8 MiB, read head after head
    assert order_of(call, 8, KEYS) == Order()
    shared = a_call(biased("zero", "h", "m", "n"), pairs(1, 8, 2048, 2048), M=2048, N=2048)  # 64 MiB until the next batch
    assert order_of(shared, 8, KEYS) == Order(4, swapped=True)
    assert order_of(shared, 8, 16 * KEYS) == Order()  # no room for two heads' keys
    mask = a_call(biased("zero", "zero", "m", "n", kind=Kind.BOOL), pairs(1, 1, 4096, 4096, dtype=torch.bool))
    assert order_of(mask, 8, KEYS) == Order()


def test_the_largest_bias_decides() -> None:
    p = Program()
    wide = p.capture("wide", Kind.FLOAT, p.zero, p.h, p.m, p.n)
    small = p.capture("small", Kind.FLOAT, p.b, p.zero, p.m, p.n)
    call = a_call(p.spec(p.s + wide + small), pairs(1, 8, 4096, 4096), pairs(4, 1, 4096, 4096))
    assert order_of(call, 8, KEYS) == Order(4, swapped=True)


@pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", ["plain_gqa", "diagonals_low"])
def test_every_order_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, torch.float32)
    expected = run_kernels(case, inputs)
    for chosen in (Order(2, swapped=True), Order(2)):
        monkeypatch.setattr(grids, "order_of", lambda call, heads, size, chosen=chosen: chosen)
        found = run_kernels(case, inputs)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))
