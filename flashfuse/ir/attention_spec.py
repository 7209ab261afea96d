"""`AttentionSpec`: everything that decides what one attention computes, and nothing about how or on what device.

For query `[B, H, M, D]`, key `[B, G, N, D]`, value `[B, G, N, E]` (G divides H; query head h reads key head
`h // (H // G)`):

    s[b, h, m, n]   = sum_d query[b, h, m, d] * key[b, h // (H // G), n, d]
    x[b, h, m, n]   = score program of s, (b, h, m, n), captures and sizes
    out[b, h, m, e] = sum_n softmax_n(x)[b, h, m, n] * value[b, h // (H // G), n, e]

A spec travels inside the graph as text, so that any process can rebuild the kernel from the call alone.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from flashfuse.errors import InternalError
from flashfuse.ir import mask, ranges
from flashfuse.ir.derivative import Derivative, differentiate
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import INDICES, ScoreProgram, from_json, to_json

FORMAT = 1


class EmptyRows(enum.Enum):
    """What a row without any kept key gives."""

    IMPOSSIBLE = "impossible"  # proved: every row keeps a key with an ordinary score
    ZERO = "zero"  # output and gradients zero, as F.scaled_dot_product_attention does
    EXACT = "exact"  # what the whole program gives: NaN for -inf, the mean of all values for a finite fill


@dataclass(frozen=True)
class Capture:
    """A tensor that the score program reads, one element a load. `rank` is the number of its indices."""

    name: str
    kind: Kind
    rank: int


@dataclass(frozen=True)
class AttentionSpec:
    """See the module's text. Frozen and hashable; equality ignores the user's source lines."""

    score: ScoreProgram
    captures: tuple[Capture, ...] = ()
    empty_rows: EmptyRows = EmptyRows.EXACT

    def verify(self) -> None:
        """Raise InternalError unless program and captures fit together."""
        self.score.verify()
        if self.score.statements[self.score.result].kind is not Kind.FLOAT:
            raise InternalError("the final score must be a float")
        for statement in self.score.statements:
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
    def certainty(self) -> ranges.Certainty | None:
        """Interval evaluation of the predicate; None without one, or where the closed form already says it all."""
        if self.split.keep is None or (self.key_ranges is not None and self.key_ranges.closed):
            return None
        return ranges.block_certainty(self.split.keep)

    @property
    def dense_rows(self) -> bool:
        """Whether rows can occur that blocks skipped by the predicate would get wrong (see `EmptyRows.EXACT`)."""
        return self.empty_rows is EmptyRows.EXACT and self.split.keep is not None

    @property
    def planes(self) -> int:
        """How many values a row the forward keeps for the backward: logsumexp, and a shift if rows can lie very low."""
        return 2 if self.empty_rows is EmptyRows.EXACT else 1

    def derivative(self, captures: tuple[int, ...] = (), *, kept: bool = False) -> Derivative:
        """Derivative of the whole program, or of the mask-free one."""
        return differentiate(self.split.kept if kept else self.score, captures)

    def to_text(self) -> str:
        """JSON from which `from_text` makes an equal spec."""
        return json.dumps(
            {
                "flashfuse": FORMAT,
                "score": to_json(self.score),
                "captures": [[c.name, c.kind.value, c.rank] for c in self.captures],
                "empty_rows": self.empty_rows.value,
            },
            separators=(",", ":"),
        )

    @cached_property
    def key(self) -> str:
        """Hex digest of the meaning: equal for equal specs, whatever lines they came from."""
        anonymous = json.loads(self.to_text())
        anonymous["score"]["statements"] = [row[:-1] for row in anonymous["score"]["statements"]]
        return hashlib.sha256(json.dumps(anonymous, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> list[tuple[str, str]]:
        """(word, formula) pairs for people: the score, and the mask if there is one."""
        names = tuple(capture.name for capture in self.captures)
        rows = [("score", self.split.kept.formula(captures=names))]
        if self.split.keep is not None:
            rows.append(("keeps", self.split.keep.formula(captures=names)))
        return rows


@lru_cache(maxsize=4096)
def from_text(text: str) -> AttentionSpec:
    """The spec that `AttentionSpec.to_text` wrote. Raises InternalError if it is of another version or not well formed."""
    value = json.loads(text)
    if value.get("flashfuse") != FORMAT:
        raise InternalError(f"spec of format {value.get('flashfuse')}, this flashfuse reads {FORMAT}")
    captures = tuple(Capture(name, Kind(kind), rank) for name, kind, rank in value["captures"])
    spec = AttentionSpec(from_json(value["score"]), captures, EmptyRows(value["empty_rows"]))
    spec.verify()
    return spec


def plain_load_letters(spec: AttentionSpec, capture: int) -> tuple[str, ...] | None:
    """The index letter of each dimension of a capture if every load indexes it by plain indices or 0, else None.

    A dimension indexed by the constant 0 has letter "" (it is broadcast).
    """
    found: set[tuple[str, ...]] = set()
    for statement in spec.score.statements:
        if statement.op != "load" or statement.attribute != capture:
            continue
        letters: list[str] = []
        for operand in statement.operands:
            index = spec.score.statements[operand]
            if index.op == "index":
                letters.append(str(index.attribute))
            elif index.op == "const" and index.attribute == 0:
                letters.append("")
            else:
                return None
        found.add(tuple(letters))
    if len(found) != 1:
        return None
    only = next(iter(found))
    named = [letter for letter in only if letter]
    return only if len(named) == len(set(named)) and set(named) <= set(INDICES) else None
