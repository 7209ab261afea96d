"""Random score programs and predicates, and their values on whole `[M, N]` grids, for the tests of the IR."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, Statement, evaluate

SMOOTH = ("add", "sub", "mul", "div", "neg", "exp", "tanh", "sigmoid", "sqrt", "where", "maximum", "minimum", "abs")


def grid_leaf(M: int, N: int, score: Tensor | None = None, captures: Sequence[Tensor] = (), sizes: Sequence[int] = (),
              inputs: Sequence[Any] = (), grad: Tensor | None = None) -> Callable[[Statement, list[Any]], Any]:  # fmt: skip
    """A `leaf` function for `evaluate` over `[M, N]`; b and h are 0."""
    indices = {"b": 0, "h": 0, "m": torch.arange(M)[:, None], "n": torch.arange(N)[None, :]}

    def leaf(statement: Statement, operands: list[Any]) -> Any:
        attribute: Any = statement.attribute
        return {
            "score": lambda: score, "grad": lambda: grad, "index": lambda: indices[attribute],
            "length": lambda: M if attribute == "M" else N, "size": lambda: sizes[attribute],
            "input": lambda: inputs[attribute], "load": lambda: captures[attribute][tuple(operands)],
        }[statement.op]()  # fmt: skip

    return leaf


def on_grid(program: ScoreProgram, M: int, N: int, **leaves: Any) -> Tensor:
    """The program's only result as `[M, N]`."""
    value = evaluate(program, grid_leaf(M, N, **leaves), torch.float64)[0]
    return torch.as_tensor(value).expand(M, N)


class Predicates:
    """Makes random predicates over positions: affine ones, and with `vectors` also over captured vectors 0 and 1."""

    def __init__(self, seed: int, *, vectors: bool = False) -> None:
        self.random = random.Random(seed)
        self.builder = Builder()
        self.m, self.n = self.builder.leaf("index", "m"), self.builder.leaf("index", "n")
        self.vectors = vectors

    def integer(self) -> Value:
        """A random integer expression, affine more often than not."""
        choose = self.random.choice
        lengths = [self.builder.leaf("length", "M"), self.builder.leaf("length", "N"), self.builder.leaf("size", 0, Kind.INT)]
        leaves = [self.m, self.n, self.m, self.n, self.builder.const(self.random.randint(-4, 4)), *lengths]
        value = choose(leaves)
        for _ in range(self.random.randint(0, 2)):
            value = value.apply(choose(("add", "sub")), value, choose(leaves))
        if self.random.random() < 0.1:
            value = choose((-value, value * 2, value.apply("floordiv", value, 2), value.apply("abs", value)))
        return value

    def comparison(self) -> Value:
        """A random comparison, or a captured truth value."""
        roll = self.random.random()
        if self.vectors and roll < 0.3:
            return self.load(0, self.m).eq(self.load(0, self.n))
        if self.vectors and roll < 0.5:
            return self.load(1, self.n, kind=Kind.BOOL)
        if roll > 0.97:
            return self.builder.const(self.random.random() < 0.5)
        name = self.random.choice(("lt", "le", "gt", "ge", "lt", "le", "gt", "ge", "eq", "ne"))
        left, right = self.integer(), self.integer()
        return left.apply(name, left, right)

    def load(self, capture: int, index: Value, kind: Kind = Kind.INT) -> Value:
        return self.builder.leaf("load", capture, kind, (index,))

    def predicate(self, depth: int = 2) -> Value:
        """A random formula of comparisons."""
        if depth == 0 or self.random.random() < 0.3:
            return self.comparison()
        name = self.random.choice(("and", "and", "or", "or", "not", "xor" if self.random.random() < 0.2 else "and"))
        first = self.predicate(depth - 1)
        return first.apply("not", first) if name == "not" else first.apply(name, first, self.predicate(depth - 1))

    def program(self) -> ScoreProgram:
        return self.builder.program(self.predicate())

    def conjunction(self, count: int) -> ScoreProgram:
        """A conjunction of order comparisons with unit coefficients."""
        parts = []
        for _ in range(count):
            offset = self.builder.const(self.random.randint(-3, 3))
            left, right = self.random.choice(((self.n, self.m), (self.m, self.n), (self.n, offset), (self.m, offset)))
            name = self.random.choice(("lt", "le", "gt", "ge"))
            parts.append(left.apply(name, left, right if right.number == offset.number else right + offset))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole & part
        return self.builder.program(whole)


def random_score(seed: int) -> ScoreProgram:
    """A random differentiable program of the score, float captures 0 `[M]`, 1 `[N]`, 2 `[M, N]` and the indices."""
    chance = random.Random(seed)
    builder = Builder()
    m, n = builder.leaf("index", "m"), builder.leaf("index", "n")
    values = [
        builder.leaf("score"), builder.leaf("load", 0, Kind.FLOAT, (m,)), builder.leaf("load", 1, Kind.FLOAT, (n,)),
        builder.leaf("load", 2, Kind.FLOAT, (m, n)), (m - n).apply("to_float", m - n), builder.const(0.7),
    ]  # fmt: skip
    for _ in range(chance.randint(2, 9)):
        name = chance.choice(SMOOTH)
        a, b = chance.choice(values), chance.choice(values)
        if name == "where":
            values.append(a.apply("where", a < b, a, b * 0.5))
        elif name in ("exp", "sqrt", "div"):  # kept within their domain, and small
            calm = a.apply("tanh", a)
            values.append({"exp": lambda: calm.apply("exp", calm), "sqrt": lambda: calm.apply("sqrt", calm + 1.5),
                           "div": lambda: b / (calm + 1.5)}[name]())  # fmt: skip
        else:
            values.append(a.apply(name, a) if name in ("neg", "tanh", "sigmoid", "abs") else a.apply(name, a, b))
    result = values[-1] + values[0] * 0.1
    for load in values[1:4]:
        if chance.random() < 0.5:
            result = result + load * values[-2]
    return builder.program(result)
