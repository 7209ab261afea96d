"""Every row of SCORE_OPS: its Triton text, run in the interpreter, against its torch function."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from flashfuse.codegen import launch
from flashfuse.codegen.emit import KERNELS
from flashfuse.codegen.score_text import InputLayout, ScoreText, constant_text, function_text, identifiers
from flashfuse.ir.attention_spec import Capture
from flashfuse.ir.philox import random_bits
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import ScoreProgram, evaluate

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")

FLOATS = [-3.5, -1.0, -0.25, 0.0, 0.5, 1.0, 2.75, 30.0]
INTS = [-7, -3, -1, 0, 1, 2, 5, 12]
TYPES = {Kind.FLOAT: torch.float32, Kind.INT: torch.int64, Kind.BOOL: torch.int8}

KERNEL = """
@triton.jit
def apply(out, size, inputs, BLOCK: tl.constexpr):
    m = tl.arange(0, BLOCK)
    tl.store(out + m, row(m, m < size, inputs), mask=m < size)
"""


def _module(folder: Path, text: str) -> ModuleType:
    path = folder / "row.py"
    path.write_text("import triton\nimport triton.language as tl\n\n" + (KERNELS / "maths.py").read_text() + text + KERNEL)
    specification = importlib.util.spec_from_file_location(f"row_{folder.name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _samples(kind: Kind, place: int) -> torch.Tensor:
    """Values such that every pair of the list meets."""
    values = FLOATS if kind is Kind.FLOAT else INTS if kind is Kind.INT else [False, True]
    grid = torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")[place].flatten() % len(values)
    return torch.tensor(values)[grid]


def _program(name: str, kinds: list[Kind]) -> ScoreProgram:
    builder = Builder()
    index = builder.leaf("index", "m")
    loads = [builder.leaf("load", place, kind, (index,)) for place, kind in enumerate(kinds)]
    return builder.program(builder.op(name, *loads))


def _kinds() -> list[tuple[str, list[Kind]]]:
    rows = []
    for row in SCORE_OPS.values():
        if row.name == "random_bits":  # takes whole tiles: see test_random_bits
            continue
        free = [Kind.FLOAT, Kind.INT] if None in row.operands and row.name != "to_float" else [Kind.INT]
        if row.name in ("to_int", "to_bool"):
            free = [Kind.FLOAT]
        rows += [(row.name, [kind or chosen for kind in row.operands]) for chosen in free[: 2 if None in row.operands else 1]]
    return rows


@interpreted
@pytest.mark.parametrize(("name", "kinds"), _kinds(), ids=lambda value: value if isinstance(value, str) else value[-1].value)
def test_row(name: str, kinds: list[Kind], tmp_path: Path) -> None:
    program = _program(name, kinds)
    columns = [_samples(kind, place) for place, kind in enumerate(kinds)]
    if name in ("log", "sqrt", "rsqrt"):
        columns = [column.abs() + 0.5 for column in columns]
    if name in ("floordiv", "mod", "div"):
        columns[1] = torch.where(columns[1] == 0, 3, columns[1])
    text = ScoreText(program, InputLayout.of([Capture(f"c{i}", kind, 1) for i, kind in enumerate(kinds)]))
    module = _module(tmp_path, function_text("row", "m, inside_m, inputs", text.lines, text.results()[0], "One row."))
    inputs: list[object] = []
    for column, kind in zip(columns, kinds, strict=True):
        inputs += [column.to(TYPES[kind]), 1]
    expected = evaluate(program, lambda statement, operands: None if statement.op == "index" else columns[statement.attribute])[0]
    out = torch.empty(512, dtype=torch.float32)
    module.apply[(1,)](out, 512, tuple(inputs), BLOCK=512)
    torch.testing.assert_close(out, expected.to(torch.float32), rtol=2e-6, atol=2e-7, equal_nan=True)


RANDOM = """
@triton.jit
def tile(out, seed, b, h, first_m, first_n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if TRANSPOSED:
        bits = random_bits(tl.load(seed), b, h, first_m + column, first_n + row)
    else:
        bits = random_bits(tl.load(seed), b, h, first_m + row, first_n + column)
    tl.store(out + row * COLUMNS + column, bits)
"""


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 64), (64, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_random_bits(rows: int, columns: int, transposed: bool, tmp_path: Path) -> None:
    module = _module(tmp_path, RANDOM + "def row():\n    pass\n")
    seed, (b, h, first_m, first_n) = torch.tensor(-(2**62) - 12345), (3, 5, 48, 2**31 - 64)
    out = torch.empty(rows, columns, dtype=torch.int32)
    module.tile[(1,)](out, seed, b, h, first_m, first_n, ROWS=rows, COLUMNS=columns, TRANSPOSED=transposed)
    own = out.mT if transposed else out
    m, n = (torch.arange(size) for size in own.shape)
    expected = random_bits(seed, torch.tensor(b), torch.tensor(h), (first_m + m)[:, None], (first_n + n)[None, :])
    assert torch.equal(own, expected)


def test_one_statement_a_node_with_the_users_line() -> None:
    builder = Builder()
    builder.source = "model.py:41"
    score = builder.leaf("score")
    bias = builder.leaf("load", 0, Kind.FLOAT, (builder.leaf("index", "h"), builder.leaf("index", "m")))
    text = ScoreText(builder.program(score * 0.5 + bias), InputLayout(("bias",), (2,)))
    assert text.lines == [
        "bias_hm = tl.load(inputs[0] + offset(h, inputs[1]) + offset(m, inputs[2]), mask=inside_m, other=0)"
        ".to(tl.float32)  # model.py:41",
        f"{'mul_1 = s * 0.5':<64}  # model.py:41",
        f"{'add_1 = mul_1 + bias_hm':<64}  # model.py:41",
    ]


def test_names_are_identifiers_and_distinct() -> None:
    captures = [Capture(name, Kind.FLOAT, 0) for name in ("self.bias", "self.bias", "1st", "")]
    names = identifiers(captures)
    assert len(set(names)) == 4
    assert all(name.isidentifier() for name in names)


def test_large_integers_are_wide() -> None:
    assert constant_text(2**31 - 1) == "wide(2147483647)"
    assert constant_text(-5) == "-5"
    assert constant_text(float("-inf")) == 'float("-inf")'
    builder = Builder()
    m, length = builder.leaf("index", "m"), builder.leaf("length", "N")
    text = ScoreText(builder.program(m * length + m * 3), InputLayout((), ()))
    assert text.lines[0] == "mul_1 = wide(m) * N"
    assert text.lines[1] == "mul_2 = m * 3"


def test_fractions_become_factors() -> None:
    builder = Builder()
    divided: Value = builder.leaf("score") / 8.0
    assert ScoreText(builder.program(divided), InputLayout((), ())).lines == ["div_1 = s * 0.125"]


def test_triton_is_the_version_that_the_texts_were_written_for() -> None:
    assert tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
