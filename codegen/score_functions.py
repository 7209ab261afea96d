"""The generated half of a kernel module: every function that `kernels/plain_score.py` stands in for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flashfuse.codegen.score_text import InputLayout, ScoreText, function_text
from flashfuse.ir.attention_spec import AttentionSpec, plain_load_letters
from flashfuse.ir.certainty import Bounded, Certainty
from flashfuse.ir.cheaper import factored, positions_in_float
from flashfuse.ir.derivative import Derivative, differentiate, index_letters
from flashfuse.ir.score_builder import closure
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_program import ScoreProgram, Statement
from flashfuse.ir.score_words import mask_words, score_words
from flashfuse.ir.separate import separated

_AT = "b, h, m, n, inside_m, inside_n, M, N, inputs"
_AT_ROW = "b, h, m, inside_m, M, N, inputs"
_ALWAYS_FINITE = frozenset(  # of finite operands
    {"probability", "grad", "index", "length", "const", "size", "load", "add", "sub", "mul", "neg", "abs", "minimum", "maximum",
     "clamp_min", "clamp_max", "tanh", "sigmoid", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "where",
     "where_bool", "to_float", "to_int", "to_bool", "random_bits"}
)  # fmt: skip


@dataclass(frozen=True)
class CaptureGradients:
    """Which captures' gradients are made where. `letters[c]` names the index of each dimension ("" for none)."""

    letters: dict[int, tuple[str, ...]]
    row: tuple[int, ...]  # summed over keys, in the dq kernel
    column: tuple[int, ...]  # summed over queries, in the dkdv kernel
    tile: tuple[int, ...]  # an element for each query and key
    diagonal: tuple[int, ...]  # an element for each distance of both

    @classmethod
    def of(cls, spec: AttentionSpec) -> CaptureGradients:
        """Sort the captures that can have a gradient by the letters that their elements depend on."""
        letters: dict[int, tuple[str, ...]] = {}
        for number, capture in enumerate(spec.captures):
            found = plain_load_letters(spec, number) if capture.kind is Kind.FLOAT else None
            if found is not None:
                letters[number] = found
        tile = tuple(c for c, found in letters.items() if {"m", "n"} <= set(found))
        diagonal = tuple(c for c, found in letters.items() if "d" in found)
        column = tuple(c for c, found in letters.items() if c not in tile and "n" in found)
        row = tuple(c for c in letters if c not in (*tile, *diagonal, *column))
        return cls(letters, row, column, tile, diagonal)


def splice_text(spec: AttentionSpec, *, apart: bool = False) -> str:
    """All generated constants and functions of a spec, in the order of `plain_score.py`.

    `apart`: in masks, distances are compared apart (see `separate.py`).
    """
    return "\n\n\n".join(_Writer(spec, apart).parts()) + "\n"


def kernel_labels(spec: AttentionSpec) -> tuple[str, ...]:
    """What a spec's kernels are called after: its mask, its score, its weight; at most four words, no scale."""
    labels = () if spec.split.keep is None else mask_words(spec.split.keep).labels
    labels += score_words(spec.split.kept).labels
    labels += () if spec.sink is None else ("sink",)
    if spec.weight is not None:
        labels += ("dropout" if spec.weight.uses("random_bits") else "weight",)
    return tuple(dict.fromkeys(labels))[:4]


class _Writer:
    def __init__(self, spec: AttentionSpec, apart: bool = False) -> None:
        self.spec = spec
        self.apart = apart
        self.layout = InputLayout.of(spec.captures)
        self.gradients = CaptureGradients.of(spec)
        # without a mask, rows may lie so low that scores must not be scaled before their maximum is taken off
        can_fold = spec.planes == 1 or spec.split.keep is not None
        self.scale, self.kept = factored(spec.split.kept) if can_fold else (1.0, spec.split.kept)

    def parts(self) -> list[str]:
        """The text blocks."""
        return [
            self.constants(), self.named(), *self.scores(), *self.raw_gradients(), self.sink(), *self.weights(), *self.ranges(),
            *self.sums("row", self.gradients.row), *self.sums("column", self.gradients.column),
            self.tile_gradient(), *self.bounds(), self.certainty(),
        ]  # fmt: skip

    def named(self) -> str:
        """The function that names kernels for profilers: `flashfuse_forward_causal_softcap_d128`."""
        words = "_".join(kernel_labels(self.spec)) or "plain"
        name = f"{{kernel}}_{words}_d{{made_for.constants.get('D', 0)}}"
        return f'def named(kernel):\n    return lambda made_for: f"{name}"'

    def constants(self) -> str:
        ahead = bool(self.loads_at_keys(self.kept))
        return "\n".join(
            [
                f"SCALE = tl.constexpr({self.scale!r})  # natural units in a unit of what `kept_score` returns",
                f"FACTOR = tl.constexpr({self.scale * math.log2(math.e)!r})  # SCALE * log2(e)",
                f"HAS_SINK = tl.constexpr({self.spec.sink is not None})  # whether rows have a sink",
                f"HAS_CHOICES = tl.constexpr({self.spec.has_choices})  # whether `weighted` puts zeros in the place of NaN",
                f"LOADS_AHEAD = tl.constexpr({ahead})  # whether `kept_score` loads elements at keys",
                f"HAS_GAP = tl.constexpr({self.spec.has_gaps})  # whether ranges of keys or queries can have a gap",
            ]
        )

    def function(self, name: str, parameters: str, program: ScoreProgram, purpose: str) -> str:
        """A function over tiles that returns the program's only result in the shape of `s`."""
        text = ScoreText(positions_in_float(program), self.layout)
        result = text.results()[0]
        whole_tile = len(index_letters(program, program.results[0])) == 4
        if "s" in parameters.split(", ") and not whole_tile:
            result = f"like({result}, s)"
        return function_text(name, parameters, text.lines, result, purpose)

    def scores(self) -> list[str]:
        split = self.spec.split
        score = self.function("score", f"s, {_AT}", self.spec.score, "The final score, masks and all, in natural units.")
        purpose = "The final score of an element that the mask keeps, in units of SCALE."
        kept = self.function("kept_score", f"s, {_AT}", self.kept, purpose)
        purpose = "Whether the mask keeps an element."
        if split.keep is None:
            keep = function_text("keep", _AT, [], "inside_m & inside_n", purpose)
        else:
            keep = self.function("keep", _AT, separated(split.keep) if self.apart else split.keep, purpose)
        return [score, kept, keep, *self.loads_ahead()]

    def loads_ahead(self) -> list[str]:
        """`kept_score` in two steps: its loads at keys, which can be under way while the product is made, and the rest."""
        heads = (("load_ahead", _AT), ("kept_score_of", f"s, loaded, {_AT}"))
        purposes = ("What `kept_score` loads at keys, a tuple.", "`kept_score` from what `load_ahead` gave.")
        program = positions_in_float(self.kept)
        numbers = self.loads_at_keys(program)
        if not numbers:
            nothing = ("(0,)", f"kept_score(s, {_AT})")
            return [function_text(*h, [], r, purpose) for h, r, purpose in zip(heads, nothing, purposes, strict=True)]
        loads = ScoreText(_with_results(program, numbers), self.layout, raw=True)
        rest = ScoreText(program, self.layout, loaded={number: f"loaded[{place}]" for place, number in enumerate(numbers)})
        return [
            function_text(*heads[0], loads.lines, f"({', '.join(loads.results())},)", purposes[0]),
            function_text(*heads[1], rest.lines, f"like({rest.results()[0]}, s)", purposes[1]),
        ]

    def loads_at_keys(self, program: ScoreProgram) -> tuple[int, ...]:
        """The loads of a program whose element depends on the key."""
        statements = enumerate(program.statements)
        return tuple(number for number, s in statements if s.op == "load" and "n" in index_letters(program, number))

    def raw_gradients(self) -> list[str]:
        whole = self.spec.derivative().program
        purpose = "Gradient of the raw score from that of `score`."
        parts = [self.function("score_gradient", f"s, grad, {_AT}", _first_result(whole), purpose)]
        purpose = "Gradient of the raw score from that of `kept_score`, in units of 1 / SCALE."
        kept = _first_result(differentiate(self.kept).program)
        return [*parts, self.function("kept_gradient", f"s, grad, {_AT}", kept, purpose)]

    def sink(self) -> str:
        purpose = "The sink of rows, in natural units."
        if self.spec.sink is None:
            return function_text("sink_score", _AT_ROW, [], "like(0.0, m)", purpose)
        text = ScoreText(self.spec.sink, self.layout)
        return function_text("sink_score", _AT_ROW, text.lines, f"like({text.results()[0]}, m)", purpose)

    def weights(self) -> list[str]:
        purposes = ("What a probability is multiplied with the value as.", "Gradient of a probability from that of `weighted`.")
        heads = (("weighted", f"p, {_AT}"), ("weight_gradient", f"p, grad, {_AT}"))
        weight = self.spec.weight
        if weight is None:
            plain = ("p", "grad")
            return [function_text(*h, [], r, purpose) for h, r, purpose in zip(heads, plain, purposes, strict=True)]
        programs = (weight, _first_result(differentiate(weight).program))
        parts = []
        for head, program, purpose in zip(heads, programs, purposes, strict=True):
            text = ScoreText(program, self.layout)
            result = text.results()[0]
            if any(statement.op not in _ALWAYS_FINITE for statement in program.statements):
                result = f"tl.where(inside_m & inside_n, {result}, 0.0)"  # what is loaded outside of tensors is zero
            parts.append(function_text(*head, text.lines, result, purpose))
        return parts

    def ranges(self) -> list[str]:
        parameters = "first, last, b, h, M, N, inputs"
        parts = []
        for name, found, length, purpose in (
            (
                "key_range",
                self.spec.key_ranges,
                "N",
                "Keys of queries first..last: possible [lo, hi) without [gap_lo, gap_hi), certain [full_lo, full_hi).",
            ),
            ("query_range", self.spec.query_ranges, "M", "The same with queries and keys exchanged."),
        ):
            if found is None:
                parts.append(function_text(name, parameters, [], f"0, {length}, 0, {length}, 0, 0", purpose))
                continue
            text = ScoreText(found.program, self.layout, lambda leaf: ("first", "last")[int(leaf.attribute)])  # type: ignore[arg-type]
            ends = ", ".join(r if r in ("0", length) else f"bound({r}, {length})" for r in text.results())
            parts.append(function_text(name, parameters, text.lines, ends if found.has_gap else f"{ends}, 0, 0", purpose))
        return parts

    def capture_gradients(self, wanted: Sequence[int], *, kept: bool) -> list[tuple[ScoreText, dict[int, str]]]:
        """Statements for the gradients of the elements of captures, and what each is called: by the score, by the weight."""
        derivatives = [(self.spec.derivative(tuple(wanted), kept=kept), "grad")]
        if self.spec.weight is not None:
            derivatives.append((differentiate(self.spec.weight, tuple(wanted)), "dp"))
        return [self.load_gradients(derivative, grad) for derivative, grad in derivatives]

    def load_gradients(self, derivative: Derivative, grad: str = "grad") -> tuple[ScoreText, dict[int, str]]:
        """Statements for the gradients of the loads of a derivative, and what each capture's is called."""
        numbers: dict[int, int] = {}
        for (capture, _), result in zip(derivative.loads, derivative.program.results[1:], strict=True):
            numbers.setdefault(capture, result)
        program = positions_in_float(_with_results(derivative.program, tuple(numbers.values())))
        text = ScoreText(program, self.layout, grad=grad)
        return text, dict(zip(numbers, text.results(), strict=True))

    def sums(self, side: str, wanted: tuple[int, ...]) -> list[str]:
        zeros = ", ".join(["tl.zeros([BLOCK], tl.float32)"] * len(wanted))
        comma = "," if len(wanted) == 1 else ""
        start = function_text(f"start_{side}_sums", "BLOCK: tl.constexpr", [], f"({zeros}{comma})", "Zeros to add to.")
        stores = [f"tl.store(partial + {i} * plane, sums[{i}], mask=inside)" for i in range(len(wanted))]
        store = function_text(
            f"store_{side}_sums", "sums, partial, plane, inside", stores, "", "Store vector i at `partial + i * plane`."
        ).rstrip()
        body: list[str] = []
        if wanted:
            for case, kept in (("if WHOLE:", False), ("else:", True)):
                body.append(case)
                before = [f"sums[{place}]" for place in range(len(wanted))]
                for text, names in self.capture_gradients(wanted, kept=kept):
                    body += [f"    {line}" for line in text.lines]
                    for place, capture in enumerate(wanted):
                        addend = f"tl.sum(tl.where(kept, like({names[capture]}, s), 0.0), 1)" if capture in names else "0.0"
                        body.append(f"    {self.layout.names[capture]}_sum = {before[place]} + {addend}")
                    before = [f"{self.layout.names[capture]}_sum" for capture in wanted]
        returned = ", ".join(f"{self.layout.names[capture]}_sum" for capture in wanted)
        add = function_text(
            f"add_{side}_sums", f"sums, kept, s, grad, p, dp, {_AT}, WHOLE: tl.constexpr", body,
            f"({returned}{comma})" if wanted else "sums", "Add sums over axis 1, where `kept`, of elements' gradients.",
        )  # fmt: skip
        if side == "row":
            return [start, add, self.sink_sums(wanted), store]
        loads = ", ".join(f"tl.load(partial + {i} * plane, mask=inside, other=0.0)" for i in range(len(wanted)))
        purpose = "What `store_column_sums` stored."
        return [
            start,
            function_text("load_column_sums", "partial, plane, inside", [], f"({loads}{comma})", purpose),
            add,
            store,
        ]

    def sink_sums(self, wanted: tuple[int, ...]) -> str:
        body: list[str] = []
        returned = "sums"
        if wanted and self.spec.sink is not None:
            text, names = self.load_gradients(differentiate(self.spec.sink, wanted))
            body = text.lines
            sums = [f"sums[{i}] + like({names[c]}, m)" if c in names else f"sums[{i}]" for i, c in enumerate(wanted)]
            returned = f"({', '.join(sums)}{',' if len(wanted) == 1 else ''})"
        purpose = "Add the gradients of loaded elements from `grad`, that of the rows' sinks."
        return function_text("add_sink_sums", f"sums, grad, {_AT_ROW}", body, returned, purpose)

    def tile_gradient(self) -> str:
        body = ["gradient = like(0.0, s)"]
        for capture in (*self.gradients.tile, *self.gradients.diagonal):
            for whole in (True, False):
                sign = "="
                for text, names in self.capture_gradients((capture,), kept=not whole):
                    if capture not in names:
                        continue
                    body.append(f"if CAPTURE == {capture} and {'WHOLE' if whole else 'not WHOLE'}:")
                    body += [*(f"    {line}" for line in text.lines), f"    gradient {sign} like({names[capture]}, s)"]
                    sign = "+="
        parameters = f"s, grad, p, dp, {_AT}, CAPTURE: tl.constexpr, WHOLE: tl.constexpr"
        return function_text("tile_gradient", parameters, body, "gradient", "Gradient of the elements of capture number CAPTURE.")

    def bounds(self) -> list[str]:
        parts = []
        for letter, side in (("m", "query"), ("n", "key")):
            body: list[str] = []
            vectors = bounded_vectors(self.spec.certainty, letter)
            keep = self.spec.split.keep
            if vectors and keep is not None:
                numbers = tuple(keep.statements.index(vector) for vector in vectors)
                text = ScoreText(_with_results(keep, numbers), self.layout)
                body += text.lines
                for place, (vector, name) in enumerate(zip(vectors, text.results(), strict=True)):
                    kind = "float" if vector.kind is Kind.FLOAT else "int"
                    body.append(f"tl.store(bounds + {2 * place} * plane, lowest_{kind}({name}, inside_{letter}))")
                    body.append(f"tl.store(bounds + {2 * place + 1} * plane, highest_{kind}({name}, inside_{letter}))")
            purpose = f"Store the smallest and largest value of vector i in a block along {letter} at plane 2 i and 2 i + 1."
            parameters = f"bounds, plane, b, h, {letter}, inside_{letter}, M, N, inputs"
            parts.append(function_text(f"store_{side}_bounds", parameters, body, "", purpose).rstrip())
        return parts

    def certainty(self) -> str:
        certainty = self.spec.certainty
        parameters = "queries, query_plane, keys, key_plane, inside, b, h, M, N, inputs"
        purpose = "(certain, possible): whether all, and whether any, of a block of queries and keys are kept."
        if certainty is None:
            return function_text("block_certainty", parameters, [], "inside, inside", purpose)
        loads: list[str] = []
        names: list[str] = []
        for number, bounded in enumerate(certainty.inputs):
            side = ("queries", "query_plane") if bounded.letter == "m" else ("keys", "key_plane")
            place = 2 * bounded_vectors(certainty, bounded.letter).index(bounded.statement) + bounded.high
            load = f"tl.load({side[0]} + {place} * {side[1]}, mask=inside, other=0)"
            decode = {Kind.FLOAT: f"from_bits({load})", Kind.BOOL: f"{load} != 0", Kind.INT: load}[bounded.statement.kind]
            names.append(f"{_bound_name(bounded, self.layout)}_{number}")
            loads.append(f"{names[-1]} = {decode}")
        text = ScoreText(certainty.program, self.layout, lambda leaf: names[int(leaf.attribute)])  # type: ignore[arg-type]
        certain, possible = (f"like({name}, inside)" for name in text.results())
        return function_text("block_certainty", parameters, [*loads, *text.lines], f"{certain}, {possible}", purpose)


def _bound_name(bounded: Bounded, layout: InputLayout) -> str:
    statement = bounded.statement
    name = layout.names[int(statement.attribute)] if statement.op == "load" else bounded.letter  # type: ignore[arg-type]
    return f"{name}_{'high' if bounded.high else 'low'}"


def bounded_vectors(certainty: Certainty | None, letter: str) -> tuple[Statement, ...]:
    """The distinct vectors along m or n whose block bounds a certainty program reads."""
    inputs = () if certainty is None else certainty.inputs
    return tuple(dict.fromkeys(bounded.statement for bounded in inputs if bounded.letter == letter))


def _with_results(program: ScoreProgram, results: tuple[int, ...]) -> ScoreProgram:
    """The program of some statements, without those that they do not need."""
    needed = closure(program.statements, results)
    renumber = {old: new for new, old in enumerate(needed)}
    statements = tuple(
        Statement(s.op, tuple(renumber[o] for o in s.operands), s.kind, s.attribute, s.source)
        for s in (program.statements[old] for old in needed)
    )
    return ScoreProgram(statements, tuple(renumber[result] for result in results))


def _first_result(program: ScoreProgram) -> ScoreProgram:
    return _with_results(program, program.results[:1])
