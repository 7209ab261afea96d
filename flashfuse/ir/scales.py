"""A score program with its constant scales collected."""

from __future__ import annotations

import math

from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import LEAVES, ScoreProgram


def folded(program: ScoreProgram) -> ScoreProgram:
    """The program with its scales collected (`(s * a) / b` is `s * (a / b)`, rounded once) and zeros no longer added."""
    builder = Builder()
    values: list[Value] = []
    for statement in program.statements:
        builder.source = statement.source
        operands = [values[operand] for operand in statement.operands]
        if statement.op in ("mul", "div") and statement.kind is Kind.FLOAT:
            values.append(_scaled(builder, statement.op, *operands))
        elif statement.op == "add" and statement.kind is Kind.FLOAT and operands[1].constant == 0.0:
            values.append(operands[0])
        elif statement.op in LEAVES:
            values.append(builder.leaf(statement.op, statement.attribute, statement.kind, operands))
        else:
            values.append(builder.op(statement.op, *operands))
    return builder.program(*(values[result] for result in program.results))


def _scaled(builder: Builder, op: str, a: Value, b: Value) -> Value:
    if op == "mul" and a.constant is not None:
        a, b = b, a
    factor = b.constant
    if factor is None or (op == "div" and factor == 0):
        return builder.op(op, a, b)
    scale = float(factor) if op == "mul" else 1.0 / float(factor)
    if not math.isfinite(scale):
        return builder.op(op, a, b)
    if a.statement.op == "mul" and a.operands[1].constant is not None:
        scale, a = scale * float(a.operands[1].constant), a.operands[0]  # type: ignore[arg-type]
    return a if scale == 1.0 else builder.op("mul", a, scale)
