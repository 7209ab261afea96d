"""`flashfuse::diagonals`: a relative-position bias by distance, as a node of its own in a rewritten graph.

A bias that depends on queries and keys through n - m alone (T5's table gathered by a bucket of the distance) has
M + N - 1 different elements a head. The kernels read those, and sum their gradient along the diagonals; the way from
there to the user's own tensors is torch's, on so few elements that it costs nothing. `flashfuse/ir/diagonals.py`.

A table is converted to float32 before it is read. The gradients of thousands of distances, large and of one sign, meet in
one bucket: they are summed in float32, by the reading's own gradient, and rounded once, by the conversion's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, Statement, evaluate, from_json, to_json

_library = torch.library.Library("flashfuse", "FRAGMENT")
_library.define(
    "diagonals(Tensor[] captures, SymInt[] sizes, SymInt[] shape, str letters, str program, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def program_text(program: ScoreProgram) -> str:
    """The program as the operator takes it."""
    return json.dumps(to_json(program), sort_keys=True)


@lru_cache(maxsize=256)
def _program(text: str) -> ScoreProgram:
    return from_json(json.loads(text))


def diagonals(
    captures: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int], letters: str, program: str, device: torch.device
) -> Tensor:
    """`[B, H, M + N - 1]` float32, without B or H if `letters` lacks them: the program's value at each distance n - m.

    `shape` is B, H, M, N. Differentiable in the captures.
    """
    B, H, M, N = shape
    distance = torch.arange(1 - M, N, device=device)
    indices = {
        "b": torch.arange(B, device=device)[:, None, None],
        "h": torch.arange(H, device=device)[:, None],
        "m": (-distance).clamp(min=0),
        "n": distance.clamp(min=0),
    }

    def leaf(statement: Statement, operands: list[Any]) -> Any:
        if statement.op == "load":
            value = captures[int(statement.attribute)]  # type: ignore[arg-type]
            value = value.to({Kind.FLOAT: torch.float32, Kind.INT: torch.int64, Kind.BOOL: torch.bool}[statement.kind])
            return value[tuple(operands)] if operands else value
        if statement.op == "index":
            return indices[str(statement.attribute)]
        if statement.op == "size":
            return sizes[int(statement.attribute)]  # type: ignore[arg-type]
        return {"M": M, "N": N}[str(statement.attribute)]

    value = evaluate(_program(program), leaf, torch.float32)[0]
    whole = value.expand(B, H, M + N - 1)
    for dim, letter in ((1, "h"), (0, "b")):
        if letter not in letters:
            whole = whole.select(dim, 0)
    return whole.contiguous()  # type: ignore[no-any-return]


_library.impl("diagonals", diagonals, "CompositeImplicitAutograd")
