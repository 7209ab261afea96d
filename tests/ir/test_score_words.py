"""Words for reports and kernel names: what people call the steps of a score and the parts of a mask."""

from __future__ import annotations

import pytest

from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind
from flashfuse.ir.score_words import mask_words, score_words


def leaves():
    builder = Builder()
    return builder, builder.leaf("score"), {letter: builder.leaf("index", letter) for letter in "bhmn"}


def test_steps_in_order_with_the_users_names():
    builder, s, i = leaves()
    capped = builder.op("tanh", s * (0.125 / 30)) * 30.0
    slope = builder.leaf("load", 0, Kind.FLOAT, [i["h"]])
    biased = capped + slope * builder.op("to_float", i["n"] - i["m"])
    words = score_words(builder.program(biased), ("slopes",))
    assert words.text == "s * 0.125 -> softcap 30 -> + slopes[h] * (n - m)"
    assert words.labels == ("softcap", "alibi")


def test_a_softcap_that_is_none_is_not_called_one():
    builder, s, _ = leaves()
    words = score_words(builder.program(builder.op("tanh", s * 0.5) + 30.0))
    assert "softcap" not in words.text + "".join(words.labels)
    assert words.text == "s * 0.5 -> tanh -> + 30"


def test_a_score_that_enters_twice_is_shown_whole():
    builder, s, _ = leaves()
    program = builder.program(s * builder.op("sigmoid", s))
    assert score_words(program).text == program.formula()


@pytest.mark.parametrize(
    ("make", "text", "labels"),
    [
        (lambda i: i["m"] >= i["n"], "n <= m", ("causal",)),
        (lambda i: (i["n"] > i["m"]).apply("not", i["n"] > i["m"]), "n <= m", ("causal",)),
        (lambda i: i["n"] - i["m"] <= 7, "n <= m + 7", ("causal",)),
        (lambda i: (i["m"] - i["n"] < 4096) & (i["n"] <= i["m"]), "n <= m and m - n < 4096", ("causal", "window")),
        (lambda i: (i["m"] - i["n"] <= 4095) & (i["n"] < i["m"] + 1), "n <= m and m - n < 4096", ("causal", "window")),
        (lambda i: i["n"] < 5, "n < 5", ("padding",)),
        (lambda i: (i["n"] < 5) | (i["n"] <= i["m"]), "(n < 5) or (n <= m)", ("mask",)),
    ],
)
def test_predicates(make, text, labels):
    builder, _, i = leaves()
    words = mask_words(builder.program(make(i)))
    assert (words.text, words.labels) == (text, labels)


def test_predicates_over_tensors_have_the_users_names():
    builder, _, i = leaves()
    document = [builder.leaf("load", 0, Kind.INT, [i["b"], i[letter]]) for letter in "mn"]
    length = builder.leaf("load", 1, Kind.INT, [i["b"]])
    keep = document[0].eq(document[1]) & (i["n"] < length) & (i["n"] <= i["m"])
    words = mask_words(builder.program(keep), ("ids", "lengths"))
    assert words.text == "n <= m and ids[b, m] == ids[b, n] and n < lengths[b]"
    assert words.labels == ("causal", "document", "padding")
