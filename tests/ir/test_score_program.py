"""Score programs: verification, text, equality, and how a builder folds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from flashfuse.errors import InternalError
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, Statement, evaluate, from_json, to_json

sys.path.insert(0, str(Path(__file__).parent))
from programs import Predicates, on_grid, random_score

F, I, B = Kind.FLOAT, Kind.INT, Kind.BOOL  # noqa: E741
SCORE = Statement("score", (), F)
M_INDEX = Statement("index", (), I, "m")
TRUE = Statement("const", (), B, True)

MALFORMED = {
    "does not come before": ((Statement("neg", (0,), F),), (0,)),
    "no such operation": ((SCORE, Statement("cosh", (0,), F)), (1,)),
    "takes 2 operands, has 1": ((SCORE, Statement("add", (0,), F)), (1,)),
    "mixes kinds": ((SCORE, M_INDEX, Statement("add", (0, 1), F)), (2,)),
    "operand": ((M_INDEX, Statement("exp", (0,), F)), (1,)),
    "result has kind": ((SCORE, Statement("neg", (0,), I)), (1,)),
    "has kind int, not float": ((Statement("score", (), I),), (0,)),
    "is no str": ((Statement("index", (), I, 3),), (0,)),
    "is no int": ((Statement("size", (), I, "x"),), (0,)),
    "no index 'k'": ((Statement("index", (), I, "k"),), (0,)),
    "no length 'K'": ((Statement("length", (), I, "K"),), (0,)),
    "indexed by something that is no integer": ((SCORE, Statement("load", (0,), F, 0)), (1,)),
    "a leaf takes no operands": ((SCORE, Statement("index", (0,), I, "m")), (1,)),
    "result %7 does not exist": ((SCORE,), (7,)),
    "result %-1 does not exist": ((SCORE,), (-1,)),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_verify_names_what_is_wrong(message: str) -> None:
    statements, results = MALFORMED[message]
    with pytest.raises(InternalError, match=None if message == "operand" else message):
        ScoreProgram(statements, results).verify()


def test_a_single_result_is_asked_for() -> None:
    with pytest.raises(InternalError, match="2 results"):
        _ = ScoreProgram((SCORE, TRUE), (0, 1)).result


def example() -> ScoreProgram:
    builder = Builder()
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    builder.source = "model.py:41"
    scaled = builder.leaf("score") * 0.125
    builder.source = "model.py:42"
    document = [builder.leaf("load", 0, Kind.INT, (builder.leaf("index", "b"), index)) for index in (m, n)]
    keep = (n <= m) & document[0].eq(document[1])
    return builder.program(keep.apply("where", keep, scaled, -math.inf))


def test_pretty_has_one_statement_a_line() -> None:
    lines = example().pretty().splitlines()
    assert len(lines) == len(example().statements) + 1
    assert "model.py:41" in next(line for line in lines if "= mul(" in line)
    assert lines[-1] == f"return %{example().result}"


def test_formula_reads_like_people_write() -> None:
    formula = example().formula(captures=("document",))
    assert "document[b, m]" in formula
    assert "n <= m" in formula
    assert "s * 0.125" in formula


def test_json_round_trip() -> None:
    for program in (example(), *(random_score(seed) for seed in range(20)), *(Predicates(s).program() for s in range(20))):
        again = from_json(json.loads(json.dumps(to_json(program))))
        assert again == program
        assert [s.source for s in again.statements] == [s.source for s in program.statements]


def test_json_keeps_infinities_and_rejects_nonsense() -> None:
    text = json.dumps(to_json(example()), allow_nan=False)  # infinities are spelled
    assert -math.inf in [s.attribute for s in from_json(json.loads(text)).statements]
    broken = to_json(example())
    broken["statements"][0][1] = [5]
    with pytest.raises(InternalError):
        from_json(broken)


def test_equality_and_hash_ignore_lines() -> None:
    elsewhere = tuple(Statement(s.op, s.operands, s.kind, s.attribute, "other.py:1") for s in example().statements)
    other = ScoreProgram(elsewhere, example().results)
    assert other == example()
    assert hash(other) == hash(example())
    assert ScoreProgram(elsewhere[:-1], (0,)) != example()


def test_builder_shares_equal_statements() -> None:
    builder = Builder()
    s = builder.leaf("score")
    assert (s * 2.0 + 1.0).number == (s * 2.0 + 1.0).number
    assert (s * 2.0).number != (s * 3.0).number


def test_builder_does_not_touch_float_arithmetic() -> None:
    """Folds that would change rounding, or NaN and infinity, must not happen."""
    builder = Builder()
    s = builder.leaf("score")
    for value in (s + 0.0, s * 1.0, s - s, s * 0.0, (s / 3.0) * 3.0, s - 0.0):
        assert value.number != s.number
        assert value.constant is None


def test_builder_folds_what_is_exact() -> None:
    builder = Builder()
    m, s = builder.leaf("index", "m"), builder.leaf("score")
    true, false = builder.const(True), builder.const(False)
    condition = s > 0.0
    assert (m + 0).number == (m * 1).number == (m - 0).number == m.number
    assert (builder.const(7) - 9).constant == -2
    assert builder.const(-7).apply("floordiv", builder.const(-7), 2).constant == -4
    assert builder.const(-7).apply("mod", builder.const(-7), 4).constant == 1
    assert (condition & true).number == (condition | false).number == condition.number
    assert (condition & false).constant is False
    assert condition.apply("where", true, s, 0.0).number == s.number
    assert condition.apply("where", condition, s, s).number == s.number
    assert condition.apply("not", condition.apply("not", condition)).number == condition.number
    assert isinstance((builder.const(2) * builder.const(3)).constant, int)
    assert builder.const(True).kind is Kind.BOOL


def test_builder_rejects_mixed_kinds() -> None:
    builder = Builder()
    with pytest.raises(InternalError, match="mixes kinds"):
        builder.op("add", builder.leaf("score"), builder.leaf("index", "m"))


@pytest.mark.parametrize("seed", range(60))
def test_including_a_program_keeps_its_meaning(seed: int) -> None:
    torch.manual_seed(seed)
    M, N = 4, 5
    captures = [torch.randn(M).double(), torch.randn(N).double(), torch.randn(M, N).double()]
    score = torch.randn(M, N).double()
    program = random_score(seed)
    builder = Builder()
    again = builder.program(builder.include(program)[program.result])
    torch.testing.assert_close(
        on_grid(again, M, N, score=score, captures=captures), on_grid(program, M, N, score=score, captures=captures)
    )
    predicate = Predicates(seed).program()
    builder = Builder()
    again = builder.program(builder.include(predicate)[predicate.result])
    assert torch.equal(on_grid(again, M, N, sizes=[2]), on_grid(predicate, M, N, sizes=[2]))


def test_numbers_take_the_kind_of_their_statement() -> None:
    """A choice between two constants is a float although only its condition is a tensor."""
    builder = Builder()
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    bias = m.apply("where", n <= m, builder.const(0.0), -math.inf)
    value = on_grid(builder.program(bias), 2, 2)
    assert value.dtype is torch.float64
    assert value.tolist() == [[0.0, -math.inf], [0.0, 0.0]]
    half = builder.leaf("size", 0, Kind.INT)
    result = evaluate(builder.program(half.apply("to_float", half) * 0.1), lambda *_: 3, torch.float64)[0]
    assert result.dtype is torch.float64
    assert result.item() == pytest.approx(0.3, abs=1e-16)
