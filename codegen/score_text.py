"""A score program as Triton statements: one line a node, readable names, the user's source line behind it.

Shapes fall out of broadcasting: what depends on m only is computed on a `[BLOCK, 1]` (or `[1, BLOCK]`) tensor, what
depends on n only on the other, what depends on neither stays a scalar, and tensors of a whole tile appear where a
statement first needs both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import Capture
from flashfuse.ir.derivative import index_letters
from flashfuse.ir.score_ops import SCORE_OPS, Kind
from flashfuse.ir.score_program import ScoreProgram, Statement

COMMENT_COLUMN = 64
_WIDE = 2**30  # integers from here on are int64, so that a sum of a few cannot leave int32 unseen
_SMALL_FACTOR = 1024
_RESERVED = frozenset(
    {
        "s", "p", "grad", "dp", "b", "h", "m", "n", "inside_m", "inside_n", "M", "N", "inputs", "first", "last", "bounds",
        "plane", "sums", "kept", "partial", "gradient", "inside", "queries", "keys", "query_plane", "key_plane", "tl", "triton",
    }
)  # fmt: skip


def identifiers(captures: Sequence[Capture]) -> tuple[str, ...]:
    """A distinct Python name for each capture, close to the user's."""
    names: list[str] = []
    for number, capture in enumerate(captures):
        name = re.sub(r"\W+", "_", capture.name).strip("_") or "capture"
        name = f"t_{name}" if name[0].isdigit() else name
        names.append(f"{name}_{number}" if name in names else name)
    return tuple(names)


@dataclass(frozen=True)
class InputLayout:
    """Where captures and sizes lie in the kernels' `inputs` tuple: pointer and strides of each capture, then sizes."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, captures: Sequence[Capture]) -> InputLayout:
        """The layout for a spec's captures."""
        return cls(identifiers(captures), tuple(capture.rank for capture in captures))

    def pointer(self, capture: int) -> int:
        """Position of a capture's pointer; its strides follow."""
        return capture + sum(self.ranks[:capture])

    def size(self, number: int) -> int:
        """Position of a size."""
        return self.pointer(len(self.ranks)) + number


def constant_text(value: object) -> str:
    """A Python literal that Triton reads as the same number."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _WIDE:
        return f"wide({value})"
    return repr(value)


class ScoreText:
    """The statements of one program. `lines` is the body, `names[i]` what statement i is called.

    `inputs` gives the text of `input` leaves (interval programs only), `grad` that of the incoming gradient. `loaded` gives
    the text of loads that were made before, `raw` says that results are loads that are only made: in both, elements are as they
    lie in memory.
    """

    def __init__(
        self,
        program: ScoreProgram,
        layout: InputLayout,
        inputs: Callable[[Statement], str] | None = None,
        grad: str = "grad",
        loaded: Mapping[int, str] | None = None,
        raw: bool = False,
    ) -> None:
        self.program = program
        self.layout = layout
        self.inputs = inputs
        self.grad = grad
        self.loaded = loaded or {}
        self.raw = raw
        self.lines: list[str] = []
        self.names: list[str] = []
        self._taken: set[str] = set(_RESERVED)
        self._count: dict[str, int] = {}
        for number, statement in enumerate(program.statements):
            self.names.append(self._leaf_or_op(number, statement))

    def results(self) -> list[str]:
        """What the program's results are called."""
        return [self.names[result] for result in self.program.results]

    def _assign(self, wanted: str, text: str, source: str) -> str:
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        line = f"{name} = {text}"
        self.lines.append(f"{line:<{COMMENT_COLUMN}}  # {source}" if source else line)
        return name

    def _leaf_or_op(self, number: int, statement: Statement) -> str:
        if statement.op in ("score", "probability", "grad"):
            return {"score": "s", "probability": "p", "grad": self.grad}[statement.op]
        if statement.op in ("index", "length"):
            return str(statement.attribute)
        if statement.op == "const":
            return constant_text(statement.attribute)
        if statement.op == "size":
            place = self.layout.size(int(statement.attribute))  # type: ignore[arg-type]
            return self._assign(f"size_{statement.attribute}", f"wide(inputs[{place}])", statement.source)
        if statement.op == "input":
            if self.inputs is None:
                raise InternalError("an input leaf outside an interval program")
            return self.inputs(statement)
        if statement.op == "load":
            return self._load(number, statement)
        self._count[statement.op] = self._count.get(statement.op, 0) + 1
        return self._assign(f"{statement.op}_{self._count[statement.op]}", self._op(statement), statement.source)

    def _op(self, statement: Statement) -> str:
        operands = [self.names[operand] for operand in statement.operands]
        constants = [self.program.statements[operand].attribute for operand in statement.operands]
        constant = [self.program.statements[operand].op == "const" for operand in statement.operands]
        if statement.op == "div" and constant[1] and _has_reciprocal(constants[1]):
            return f"{operands[0]} * {constant_text(1.0 / float(constants[1]))}"  # type: ignore[arg-type]
        if statement.op == "mul" and statement.kind is Kind.INT:
            small = any(c and abs(int(v)) <= _SMALL_FACTOR for c, v in zip(constant, constants, strict=True))  # type: ignore[arg-type]
            if not small:
                operands[0] = f"wide({operands[0]})"
        return SCORE_OPS[statement.op].triton.format(*operands)

    def _load(self, number: int, statement: Statement) -> str:
        capture = int(statement.attribute)  # type: ignore[arg-type]
        name, first = self.layout.names[capture], self.layout.pointer(capture)
        letters = index_letters(self.program, number)
        suffix = "".join(letters) or "value"
        cast = {Kind.FLOAT: ".to(tl.float32)", Kind.BOOL: " != 0", Kind.INT: ""}[statement.kind]
        if number in self.loaded:
            return self._assign(f"{name}_{suffix}", f"{self.loaded[number]}{cast}", statement.source)
        terms = [f"inputs[{first}]"]
        order = sorted(range(len(statement.operands)), key=lambda i: self._cost(statement.operands[i]))
        for dimension in order:
            index = self.program.statements[statement.operands[dimension]]
            if index.op == "const" and index.attribute == 0:
                continue
            terms.append(f"offset({self.names[statement.operands[dimension]]}, inputs[{first + 1 + dimension}])")
        inside = [f"inside_{letter}" for letter in "mn" if letter in letters]
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        cast = "" if self.raw and number in self.program.results else cast
        return self._assign(f"{name}_{suffix}", f"tl.load({' + '.join(terms)}{mask}){cast}", statement.source)

    def _cost(self, number: int) -> int:
        letters = index_letters(self.program, number)
        return ("m" in letters) + 2 * ("n" in letters)


def _has_reciprocal(value: object) -> bool:
    return isinstance(value, float) and 1e-30 < abs(value) < 1e30


def function_text(name: str, parameters: str, body: Sequence[str], returned: str, purpose: str) -> str:
    """One jitted function."""
    lines = ["@triton.jit", f"def {name}({parameters}):", f'    """{purpose}"""']
    lines += [f"    {line}" for line in body]
    lines.append(f"    return {returned}")
    return "\n".join(lines)
