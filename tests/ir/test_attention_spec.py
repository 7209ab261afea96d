"""Specs: text, equality, verification, and what is read off them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows, from_text, plain_load_letters
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind


def spec_of(*, source: str = "", rank: int = 3, kind: Kind = Kind.FLOAT, rows: EmptyRows = EmptyRows.EXACT) -> AttentionSpec:
    """A causal score with a bias `[h, m, n]`."""
    builder = Builder()
    builder.source = source
    h, m, n = (builder.leaf("index", letter) for letter in "hmn")
    biased = builder.leaf("score") * 0.125 + builder.leaf("load", 0, Kind.FLOAT, (h, m, n))
    keep = n <= m
    return AttentionSpec(builder.program(keep.apply("where", keep, biased, -math.inf)), (Capture("bias", kind, rank),), rows)


def test_text_round_trip() -> None:
    for rows in EmptyRows:
        spec = spec_of(source="model.py:7", rows=rows)
        again = from_text(spec.to_text())
        assert again == spec
        assert again.score.statements[0].source == "model.py:7"
        assert again.to_text() == spec.to_text()


def test_lines_do_not_count() -> None:
    one, other = spec_of(source="a.py:1"), spec_of(source="b.py:2")
    assert one == other
    assert hash(one) == hash(other)
    assert one.key == other.key
    assert one.key != spec_of(rows=EmptyRows.ZERO).key


def test_text_of_another_version_is_refused() -> None:
    text = json.loads(spec_of().to_text())
    text["flashfuse"] = 0
    with pytest.raises(InternalError, match="format 0"):
        from_text(json.dumps(text))


@pytest.mark.parametrize("spec", [spec_of(rank=2), spec_of(kind=Kind.INT)], ids=["rank", "kind"])
def test_loads_must_fit_their_captures(spec: AttentionSpec) -> None:
    with pytest.raises(InternalError, match="load of bias"):
        spec.verify()


def test_the_score_must_be_a_float() -> None:
    builder = Builder()
    with pytest.raises(InternalError, match="must be a float"):
        AttentionSpec(builder.program(builder.leaf("index", "m"))).verify()


def weighted(make: Callable[[Value], Value], sink: Callable[[Builder], Value] | None = None) -> AttentionSpec:
    """Plain attention with a weight, made from the probability, and a sink."""
    builder = Builder()
    weight = builder.program(make(builder.leaf("probability")))
    made = None if sink is None else builder.program(sink(builder))
    return AttentionSpec(builder.program(builder.leaf("score")), (Capture("x", Kind.FLOAT, 1),), weight=weight, sink=made)


def load(value: Value, letter: str = "h") -> Value:
    return value.builder.leaf("load", 0, Kind.FLOAT, (value.builder.leaf("index", letter),))


def test_weights_and_sinks_travel_in_the_text_and_count() -> None:
    spec = weighted(lambda p: p * 2.0, lambda builder: builder.const(0.0))
    spec.verify()
    assert from_text(spec.to_text()) == spec
    assert dict(spec.describe()) == {"score": "s", "sink": "0", "weight": "p * 2"}
    others = [weighted(lambda p: p * 2.0), weighted(lambda p: p * 3.0, lambda builder: builder.const(0.0))]
    assert len({spec.key, *(other.key for other in others)}) == 3
    assert plain_load_letters(weighted(lambda p: p * load(p, "m")), 0) == ("m",)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p * load(p), lambda p: load(p) * p / 3.0, lambda p: -(p + p * load(p)), lambda p: p,
        lambda p: p.apply("where", load(p) < 0.5, p, 0.0), lambda p: p.apply("where", load(p) < 0.5, 0.0, p * 2.0) - p,
        lambda p: p.apply("where", load(p) < 0.5, p * 3.0, p / load(p)),
    ],
)  # fmt: skip
def test_weights_that_are_proportional(make: Callable[[Value], Value]) -> None:
    weighted(make).verify()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p * p, lambda p: p + 1.0, lambda p: 1.0 / p, lambda p: p.apply("exp", p),
        lambda p: p.apply("where", p < 0.5, p, 0.0),
        lambda p: p.apply("where", load(p) < 0.5, p, 1.0), lambda p: load(p), lambda p: p.apply("maximum", p, load(p)),
        lambda p: p * p.builder.leaf("score"),
    ],
)  # fmt: skip
def test_weights_that_are_not(make: Callable[[Value], Value]) -> None:
    with pytest.raises(InternalError):
        weighted(make).verify()


def test_a_sink_is_the_same_for_all_keys() -> None:
    weighted(lambda p: p, lambda builder: load(builder.const(0), "m")).verify()
    with pytest.raises(InternalError, match="sink"):
        weighted(lambda p: p, lambda builder: load(builder.const(0), "n")).verify()
    with pytest.raises(InternalError, match="sink"):
        weighted(lambda p: p, lambda builder: builder.leaf("score")).verify()


def test_random_numbers_are_for_weights() -> None:
    builder = Builder()
    bits = builder.op("random_bits", 1, 2, 3, 4, builder.leaf("index", "n"))
    score = builder.leaf("score") * bits.apply("to_float", bits)
    with pytest.raises(InternalError, match="random"):
        AttentionSpec(builder.program(score)).verify()


def test_what_follows_from_a_spec() -> None:
    masked = spec_of()
    assert masked.split.keep is not None
    assert masked.key_ranges is not None
    assert masked.key_ranges.closed
    assert masked.certainty is None
    assert (masked.planes, masked.dense_rows) == (2, True)
    assert (spec_of(rows=EmptyRows.ZERO).planes, spec_of(rows=EmptyRows.ZERO).dense_rows) == (1, False)
    words = dict(masked.describe())
    assert words["keeps"] == "n <= m"
    assert "bias[h, m, n]" in words["score"]
    builder = Builder()
    plain = AttentionSpec(builder.program(builder.leaf("score") * 0.5))
    assert plain.key_ranges is None
    assert plain.query_ranges is None
    assert not plain.dense_rows


@pytest.mark.parametrize(
    ("loads", "letters"),
    [
        (lambda b, h, m, n: [(m, n)], ("m", "n")),
        (lambda b, h, m, n: [(n, m)], ("n", "m")),
        (lambda b, h, m, n: [(m.builder.const(0), h, m, n)], ("", "h", "m", "n")),
        (lambda b, h, m, n: [()], ()),
        (lambda b, h, m, n: [(h, m), (h, n)], None),
        (lambda b, h, m, n: [(m, m)], None),
        (lambda b, h, m, n: [(m + 1,)], None),
        (lambda b, h, m, n: [(m.builder.const(2),)], None),
        (lambda b, h, m, n: [], None),
    ],
)
def test_plain_load_letters(loads, letters) -> None:
    builder = Builder()
    indices: list[Value] = [builder.leaf("index", letter) for letter in "bhmn"]
    value = builder.leaf("score")
    for operands in loads(*indices):
        value = value + builder.leaf("load", 0, Kind.FLOAT, operands)
    spec = AttentionSpec(builder.program(value), (Capture("bias", Kind.FLOAT, 2),))
    assert plain_load_letters(spec, 0) == letters
