"""What a score program reads: tensors as they are, views of them, seeds, and relative-position biases by distance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from flashfuse.ir.derivative import index_letters
from flashfuse.ir.diagonals import is_diagonal, is_diagonal_position
from flashfuse.ir.score_builder import Value
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram
from flashfuse.patterns.calls import is_tensor, shape
from flashfuse.patterns.operands import View

if TYPE_CHECKING:
    from flashfuse.patterns.score_cone import Lifter


@dataclass(frozen=True)
class Diagonals:
    """How a node's elements follow from the distance n - m: a program, what it reads, and which of b and h it depends on."""

    program: ScoreProgram
    captures: tuple[Captured, ...]
    sizes: tuple[torch.SymInt, ...]
    letters: str


@dataclass(frozen=True)
class Captured:
    """A tensor that the program reads: a node, or its form with the canonical dimensions (`view`, which may copy).

    `seed`: the seed that takes the place of the random numbers that the node draws. `diagonals`: one element for each
    distance of a query and a key instead of the node itself.
    """

    node: fx.Node
    view: View | None = None
    seed: bool = False
    diagonals: Diagonals | None = None

    @property
    def rank(self) -> int:
        if self.seed:
            return 0
        if self.diagonals is not None:
            return len(self.diagonals.letters) + 1
        return len(self.view.merge) if self.view is not None else len(shape(self.node)) if is_tensor(self.node) else 0


def by_distance(lifter: Lifter, node: fx.Node, lifted: Value) -> Captured | None:
    """A table of floats that `node` reads by the distance n - m, as one element a distance; None for anything else.

    Its gradient is then a sum along diagonals, and the way from there to the table is torch's.
    """
    statements = lifter.builder.statements
    if lifted.statement.op != "load" or lifted.kind is not Kind.FLOAT:
        return None
    computed = [each for each in lifted.statement.operands if is_diagonal(statements, each)]
    if not computed or not is_diagonal(statements, lifted.number):
        return None
    if any(is_diagonal_position(statements, each) for each in computed):
        return None
    program = lifter.builder.program(lifted)
    read = program.loads()
    captures = tuple(lifter.captures[place] for place in read)
    if any(each.seed or each.diagonals is not None for each in captures):
        return None
    if not lifter.flow.needed(node) and any(lifter.flow.needed(each.node) for each in captures):
        return None  # the gradient stops in between
    sizes = tuple(sorted({int(s.attribute) for s in program.statements if s.op == "size"}))  # type: ignore[arg-type]
    places = {"load": read, "size": sizes}
    own = tuple(
        replace(s, attribute=places[s.op].index(int(s.attribute))) if s.op in places else s  # type: ignore[arg-type]
        for s in program.statements
    )
    letters = "".join(letter for letter in "bh" if letter in index_letters(program, program.result))
    table = Diagonals(ScoreProgram(own, program.results), captures, tuple(lifter.sizes[place] for place in sizes), letters)
    return Captured(node, diagonals=table)
