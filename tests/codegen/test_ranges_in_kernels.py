"""Generated range functions and range tables, by brute force against the predicate: no key lost, none unmasked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from flashfuse.codegen import launch
from flashfuse.codegen.load import kernel_module
from flashfuse.codegen.range_tables import block_ranges
from flashfuse.ir.block_table import BLOCK
from flashfuse.ir.score_program import Statement, evaluate

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from specs import Case, make_inputs

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")
MASKED = [case for case in CASES if case.spec.split.keep is not None]
CPU = torch.device("cpu")


@triton.jit
def ends(out, function: tl.constexpr, first, last, b, h, M, N, inputs):
    lo, hi, full_lo, full_hi, gap_lo, gap_hi = function(first, last, b, h, M, N, inputs)
    tl.store(out, lo)
    tl.store(out + 1, hi)
    tl.store(out + 2, full_lo)
    tl.store(out + 3, full_hi)
    tl.store(out + 4, gap_lo)
    tl.store(out + 5, gap_hi)


@triton.jit
def walk(
    out, aligned: tl.constexpr, without_gap: tl.constexpr, past_gap: tl.constexpr, lo, hi, gap_lo, gap_hi, BLOCK: tl.constexpr
):
    lo, _full_lo, _full_hi = aligned(lo, 0, 0, BLOCK)
    hi, gap_lo, skipped = without_gap(lo, hi, gap_lo, gap_hi, BLOCK)
    for step in tl.range(lo, hi, BLOCK):
        tl.store(out + past_gap(step, gap_lo, skipped), 1)


def kept(case: Case, captures: list[torch.Tensor]) -> torch.Tensor:
    """The predicate as a dense `[B, H, M, N]` tensor, by `evaluate`."""
    B, H, _, M, N, _, _ = case.shape
    index = {letter: torch.arange(size).reshape([-1 if i == place else 1 for i in range(4)])
             for place, (letter, size) in enumerate(zip("bhmn", (B, H, M, N), strict=True))}  # fmt: skip

    def leaf(statement: Statement, operands: list[object]) -> object:
        if statement.op == "index":
            return index[str(statement.attribute)]
        if statement.op == "length":
            return torch.tensor({"M": M, "N": N}[str(statement.attribute)])
        if statement.op == "size":
            return torch.tensor(case.sizes[int(statement.attribute)])  # type: ignore[arg-type]
        place = [torch.as_tensor(operand) for operand in operands]
        return captures[int(statement.attribute)][tuple(place)]  # type: ignore[arg-type]

    assert case.spec.split.keep is not None
    return torch.as_tensor(evaluate(case.spec.split.keep, leaf)[0]).expand(B, H, M, N)


def check(mask: torch.Tensor, found: list[int]) -> None:
    """`mask` is `[own side, other side]` of one block."""
    lo, hi, full_lo, full_hi, gap_lo, gap_hi = found
    assert not mask[:, :lo].any()
    assert not mask[:, hi:].any()
    assert not mask[:, gap_lo:gap_hi].any()
    assert mask[:, full_lo : max(full_lo, full_hi)].all()
    assert lo >= 0
    assert hi <= mask.shape[1]
    assert full_hi <= mask.shape[1]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_closed_forms(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    B, _, _, M, N, _, _ = case.shape
    mask = kept(case, inputs.captures)
    module = kernel_module(case.spec)
    arguments = launch.Call(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes).inputs
    out = torch.empty(6, dtype=torch.int64)
    for b in range(B):
        for function, length, plane in (
            (module.key_range, M, mask[b, 0]), (module.query_range, N, mask[b, 0].T),
        ):  # fmt: skip
            for first in range(0, length, 16):
                last = min(first + 16, length) - 1
                ends[(1,)](out, function, first, last, b, 0, M, N, arguments)
                check(plane[first : last + 1], out.tolist())


def table_of(case: Case, captures: list[torch.Tensor]) -> torch.Tensor:
    """The table of the case's mask alone, as a rewritten graph makes it."""
    B, H, _, M, N, _, _ = case.shape
    mask_alone = case.spec.mask_alone
    assert mask_alone is not None
    return block_ranges(mask_alone[0], [captures[number] for number in mask_alone[1]], case.sizes, (B, H, M, N), CPU)


@pytest.mark.parametrize("case", [c for c in MASKED if c.spec.certainty is not None], ids=lambda case: case.name)
def test_tables(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    mask = kept(case, inputs.captures)
    M = mask.shape[2]
    table = table_of(case, inputs.captures)
    for b in range(table.shape[0]):
        for h in range(table.shape[1]):
            rows = iter(table[b, h].tolist())
            for side in (mask[b, h], mask[b, h].T):
                for first in range(0, side.shape[0], BLOCK):
                    check(side[first : first + BLOCK], next(rows))
            assert list(rows) == []
    assert table.shape[2] == -(-M // BLOCK) + -(-mask.shape[3] // BLOCK)


def documents(ids: torch.Tensor) -> torch.Tensor:
    case = next(c for c in CASES if c.name == "documents")
    captures = make_inputs(case, torch.float32).captures
    captures[0][:] = ids
    return table_of(case, captures)[0, 0]


def test_tables_skip_other_documents() -> None:
    rows = [[0, 32, 0, 32, 0, 0], [32, 64, 32, 64, 0, 0], [64, 75, 64, 75, 0, 0]]
    assert documents(torch.arange(75) // 32).tolist() == rows * 2


def test_tables_skip_what_lies_between() -> None:
    ids = torch.tensor([0, 1, 0])[torch.arange(75) // 32]
    rows = [[0, 75, 0, 32, 32, 64], [32, 64, 32, 64, 0, 0], [0, 75, 0, 32, 32, 64]]
    assert documents(ids).tolist() == rows * 2


def test_causal_ranges_are_sharp() -> None:
    case = next(c for c in CASES if c.name == "causal")
    module = kernel_module(case.spec)
    out = torch.empty(6, dtype=torch.int64)
    ends[(1,)](out, module.key_range, 32, 47, 0, 0, 75, 75, ())
    assert out.tolist() == [0, 48, 0, 33, 0, 0]


GAPS = ((0, 75, 4, 45), (20, 70, 33, 60), (0, 75, 0, 0), (3, 75, 3, 30), (10, 33, 20, 80), (40, 10, 0, 75))


@pytest.mark.parametrize("ends", GAPS)
def test_loops_skip_gaps_and_nothing_else(ends: tuple[int, int, int, int]) -> None:
    """Every element of a range outside of its gap lies in a block that is visited, no block inside the gap is."""
    lo, hi, gap_lo, gap_hi = ends
    module = kernel_module(next(c for c in CASES if c.name == "sinks_window").spec)
    out = torch.zeros(96, dtype=torch.int32)
    functions = (module.block_aligned, module.without_gap, module.past_gap)
    walk[(1,)](out, *functions, lo, hi, gap_lo, gap_hi, 16)
    visited = set(out.nonzero().flatten().tolist())
    wanted = {x // 16 * 16 for x in range(lo, hi) if not gap_lo <= x < gap_hi}
    assert wanted <= visited
    assert not [first for first in visited if gap_lo <= first and first + 16 <= gap_hi]
    assert not [first for first in visited if first >= hi or first + 16 <= lo]


def test_sink_tokens_leave_a_gap() -> None:
    module = kernel_module(next(c for c in CASES if c.name == "sinks_window").spec)
    out = torch.empty(6, dtype=torch.int64)
    ends[(1,)](out, module.key_range, 64, 74, 0, 0, 75, 75, ())
    assert out.tolist() == [0, 75, 55, 65, 4, 45]
