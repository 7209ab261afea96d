"""`AttentionSpec`: everything that decides what one attention computes, and nothing about how or on what device.

For query `[B, H, M, D]`, key `[B, G, N, D]`, value `[B, G, N, E]` (G divides H; query head h reads key head
`h // (H // G)`):

    s[b, h, m, n]   = sum_d query[b, h, m, d] * key[b, h // (H // G), n, d]
    x[b, h, m, n]   = score program of s, (b, h, m, n), captures and sizes
    p[b, h, m, n]   = exp(x[b, h, m, n]) / (exp(sink[b, h, m]) + sum_n exp(x[b, h, m, n]))
    out[b, h, m, e] = sum_n weight(p[b, h, m, n]) * value[b, h // (H // G), n, e]

Without a sink there is no such term in the sum, without a weight the probabilities are taken as they are.

A spec travels inside the graph as text, so that any process can rebuild the kernel from the call alone.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from flashfuse.errors import InternalError
from flashfuse.ir import mask, ranges
from flashfuse.ir.affine import is_union
from flashfuse.ir.certainty import Certainty, block_certainty
from flashfuse.ir.derivative import Derivative, differentiate, index_letters
from flashfuse.ir.diagonals import is_diagonal_position
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import INDICES, ScoreProgram, Statement, from_json, to_json
from flashfuse.ir.weight import is_proportional, zero_choices

FORMAT = 2

MAX_HEAD_DIM = 512  # of the kernels
MAX_HEAD_DIM_FLOAT32 = 256  # of the kernels on a GPU: wider float32 tiles leave the registers


class EmptyRows(enum.Enum):
    """What a row without any kept key gives."""

    IMPOSSIBLE = "impossible"  # proved: every row keeps a key with an ordinary score, or has a sink that is one
    ZERO = "zero"  # output and gradients zero, as F.scaled_dot_product_attention does
    EXACT = "exact"  # what the whole program gives: NaN for -inf, the mean of all values for a finite fill


@dataclass(frozen=True)
class Capture:
    """A tensor that a program of the spec reads, one element a load. `rank` is the number of its indices."""

    name: str
    kind: Kind
    rank: int


@dataclass(frozen=True)
class AttentionSpec:
    """See the module's text. Frozen and hashable; equality ignores the user's source lines.

    `weight` is a program of the leaf `probability`, proportional to it; `sink` one of b, h and m alone. `wide`: the output is
    float32 whatever the value's dtype, since it is one of several that are summed. `logsumexp`: the row statistics are read
    too, and have a gradient.
    """

    score: ScoreProgram
    captures: tuple[Capture, ...] = ()
    empty_rows: EmptyRows = EmptyRows.EXACT
    weight: ScoreProgram | None = None
    sink: ScoreProgram | None = None
    wide: bool = False
    logsumexp: bool = False

    def out_dtype(self, value: torch.dtype) -> torch.dtype:
        """The output's dtype, given the value's."""
        return torch.promote_types(value, torch.float32) if self.wide else value

    @property
    def programs(self) -> dict[str, ScoreProgram]:
        """The programs that there are, by the names of their fields."""
        found = {"score": self.score, "weight": self.weight, "sink": self.sink}
        return {name: program for name, program in found.items() if program is not None}

    @property
    def statements(self) -> tuple[tuple[ScoreProgram, Statement], ...]:
        """All statements of all programs."""
        return tuple((program, statement) for program in self.programs.values() for statement in program.statements)

    def verify(self) -> None:
        """Raise InternalError unless programs and captures fit together."""
        for name, program in self.programs.items():
            program.verify()
            if program.statements[program.result].kind is not Kind.FLOAT:
                raise InternalError(f"the final {name} must be a float")
            if program.uses("score" if name != "score" else "probability") or program.uses("grad"):
                raise InternalError(f"the {name} reads what is not there for it")
            if name != "weight" and program.uses("random_bits"):
                raise InternalError("random numbers are for weights: kernels draw them for whole tiles of consecutive positions")
        if self.weight is not None and not is_proportional(self.weight):
            raise InternalError("the weight is not proportional to the probability")
        if self.sink is not None and (self.sink.uses("probability") or "n" in index_letters(self.sink, self.sink.result)):
            raise InternalError("the sink depends on the key")
        for _program, statement in self.statements:
            if statement.op != "load":
                continue
            capture = self.captures[int(statement.attribute)]  # type: ignore[arg-type]
            if capture.kind is not statement.kind or capture.rank != len(statement.operands):
                raise InternalError(f"load of {capture.name} does not fit its declaration {capture}")

    @cached_property
    def split(self) -> mask.SplitScore:
        """Keep-predicate and mask-free score."""
        return mask.split_mask(self.score)

    @cached_property
    def key_ranges(self) -> ranges.Ranges | None:
        """Closed-form key ranges of a block of queries, or None without a predicate."""
        return None if self.split.keep is None else ranges.key_ranges(self.split.keep)

    @cached_property
    def query_ranges(self) -> ranges.Ranges | None:
        """Closed-form query ranges of a block of keys, or None without a predicate."""
        return None if self.split.keep is None else ranges.query_ranges(self.split.keep)

    @cached_property
    def certainty(self) -> Certainty | None:
        """Interval evaluation of the predicate; None without one, where the closed form already says it all, or where it
        can tell nothing."""
        if self.split.keep is None or (self.key_ranges is not None and self.key_ranges.closed):
            return None
        found = block_certainty(self.split.keep)
        return found if found.tells_something else None

    @cached_property
    def has_gaps(self) -> bool:
        """Whether kernels may have blocks to skip between two that they visit."""
        found = (self.key_ranges, self.query_ranges)
        closed = any(each is not None and each.has_gap for each in found)
        return closed or (self.certainty is not None and self.split.keep is not None and is_union(self.split.keep))

    @cached_property
    def reads_elements(self) -> bool:
        """Whether scores load an element for each query and key, as a bias is; a table by distance has far fewer."""
        program = self.split.kept
        loads = [(number, s) for number, s in enumerate(program.statements) if s.op == "load"]
        return any(
            {"m", "n"} <= set(index_letters(program, number)) and "d" not in (plain_load_letters(self, int(s.attribute)) or ())  # type: ignore[arg-type]
            for number, s in loads
        )

    @cached_property
    def ranged_by_vectors(self) -> bool:
        """Whether captured vectors at the query bound its keys, as packed documents do: ranges are short.

        Those that are read at the key alone, as padding is, say the same of all queries and cut little.
        """
        inputs = () if self.certainty is None else self.certainty.inputs
        return any(bounded.letter == "m" and bounded.statement.op == "load" for bounded in inputs)

    @cached_property
    def mask_alone(self) -> tuple[AttentionSpec, tuple[int, ...]] | None:
        """A spec that has this one's mask and nothing else, and the numbers of the captures that it reads, in its order.

        None without a mask. Specs with one mask share it, whatever else they compute.
        """
        keep = self.split.keep
        if keep is None:
            return None
        read = keep.loads()
        statements = tuple(
            replace(s, attribute=read.index(int(s.attribute))) if s.op == "load" else s  # type: ignore[arg-type]
            for s in keep.statements
        )
        builder = Builder()
        kept = builder.include(ScoreProgram(statements, keep.results))[keep.result]
        score = builder.op("where", kept, builder.leaf("score"), float("-inf"))
        return AttentionSpec(builder.program(score), tuple(self.captures[number] for number in read), EmptyRows.ZERO), read

    @property
    def dense_rows(self) -> bool:
        """Whether rows can occur that blocks skipped by the predicate would get wrong (see `EmptyRows.EXACT`)."""
        return self.empty_rows is EmptyRows.EXACT and self.split.keep is not None

    @cached_property
    def has_choices(self) -> bool:
        """Whether the weight puts zeros in the place of probabilities, and rows of NaN can occur where that shows."""
        return self.dense_rows and self.weight is not None and bool(zero_choices(self.weight))

    @property
    def planes(self) -> int:
        """How many values a row the forward keeps for the backward: logsumexp, and a shift if rows can lie very low."""
        return 2 if self.empty_rows is EmptyRows.EXACT else 1

    def derivative(self, captures: tuple[int, ...] = (), *, kept: bool = False) -> Derivative:
        """Derivative of the whole score program, or of the mask-free one."""
        return differentiate(self.split.kept if kept else self.score, captures)

    def to_text(self) -> str:
        """JSON from which `from_text` makes an equal spec."""
        return json.dumps(
            {
                "flashfuse": FORMAT,
                **{name: to_json(program) for name, program in self.programs.items()},
                "captures": [[c.name, c.kind.value, c.rank] for c in self.captures],
                "empty_rows": self.empty_rows.value,
                **{name: True for name in ("wide", "logsumexp") if getattr(self, name)},
            },
            separators=(",", ":"),
        )

    @cached_property
    def key(self) -> str:
        """Hex digest of the meaning: equal for equal specs, whatever lines they came from."""
        anonymous = json.loads(self.to_text())
        for name in self.programs:
            anonymous[name]["statements"] = [row[:-1] for row in anonymous[name]["statements"]]
        return hashlib.sha256(json.dumps(anonymous, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> list[tuple[str, str]]:
        """(word, formula) pairs for people: the score, and the mask, the sink and the weight if there are such."""
        names = tuple(capture.name for capture in self.captures)
        rows = [("score", self.split.kept.formula(captures=names))]
        if self.split.keep is not None:
            rows.append(("keeps", self.split.keep.formula(captures=names)))
        if self.sink is not None:
            rows.append(("sink", self.sink.formula(captures=names)))
        if self.weight is not None:
            rows.append(("weight", self.weight.formula(captures=names)))
        return rows


@lru_cache(maxsize=4096)
def from_text(text: str) -> AttentionSpec:
    """The spec that `AttentionSpec.to_text` wrote. Raises InternalError if it is of another version or not well formed."""
    value = json.loads(text)
    if value.get("flashfuse") != FORMAT:
        raise InternalError(f"spec of format {value.get('flashfuse')}, this flashfuse reads {FORMAT}")
    captures = tuple(Capture(name, Kind(kind), rank) for name, kind, rank in value["captures"])
    weight, sink = (from_json(value[name]) if name in value else None for name in ("weight", "sink"))
    flags = {name: value.get(name, False) for name in ("wide", "logsumexp")}
    spec = AttentionSpec(from_json(value["score"]), captures, EmptyRows(value["empty_rows"]), weight, sink, **flags)
    spec.verify()
    return spec


def plain_load_letters(spec: AttentionSpec, capture: int) -> tuple[str, ...] | None:
    """The index letter of each dimension of a capture if every load indexes it by plain indices or 0, else None.

    A dimension indexed by the constant 0 has letter "" (it is broadcast), one of diagonals (`ir/diagonals.py`) letter "d".
    """
    found: set[tuple[str, ...]] = set()
    for program, statement in spec.statements:
        if statement.op != "load" or statement.attribute != capture:
            continue
        letters: list[str] = []
        for operand in statement.operands:
            index = program.statements[operand]
            if index.op == "index":
                letters.append(str(index.attribute))
            elif index.op == "const" and index.attribute == 0:
                letters.append("")
            elif is_diagonal_position(program.statements, operand):
                letters.append("d")
            else:
                return None
        found.add(tuple(letters))
    if len(found) != 1:
        return None
    only = next(iter(found))
    named = [letter for letter in only if letter]
    plain = len(named) == len(set(named)) and set(named) <= {*INDICES, "d"}
    return only if plain and not ("d" in named and {"m", "n"} & set(named)) else None
