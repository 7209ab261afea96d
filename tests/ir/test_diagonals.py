"""Values that depend on n - m alone: what counts as one, and sums along diagonals."""

from __future__ import annotations

import pytest
import torch

from flashfuse.ir.diagonals import diagonal_position, diagonal_sums, is_diagonal, is_diagonal_position
from flashfuse.ir.score_builder import Builder, Value
from flashfuse.ir.score_ops import Kind


def _bucket(b: Builder, distance: Value) -> Value:
    far = distance.apply("abs", distance)
    large = (far.apply("to_float", far) / 8.0).apply("log", far.apply("to_float", far) / 8.0)
    return far.apply("where", far < 8, far, large.apply("to_int", large))


def test_distances_are_told_from_other_positions() -> None:
    b = Builder()
    m, n, h = (b.leaf("index", letter) for letter in "mnh")
    offset = b.leaf("load", 0, Kind.INT)
    row = b.leaf("load", 1, Kind.INT, [m])
    for value, expected in (
        (n - m, True), (m - n + 3, True), (_bucket(b, n - m), True), (-(m * 2) + n * 2, True), (n - (m + offset), True),
        ((n - m) * h, True), (b.leaf("load", 2, Kind.FLOAT, [n - m, h]), True), ((n - m) + h, True),
        (n + m, False), (m * 2 - n, False), (n - m + row, False), (_bucket(b, n), False), (m, False), (h, False), (h * 2, False),
        (n.apply("floordiv", n, 2) - m.apply("floordiv", m, 2), False), (b.leaf("load", 1, Kind.INT, [n]), False),
    ):  # fmt: skip
        assert is_diagonal(b.statements, value.number) is expected, b.program(value).formula()


def test_position() -> None:
    b = Builder()
    m, n, length = b.leaf("index", "m"), b.leaf("index", "n"), b.leaf("length", "M")
    assert is_diagonal_position(b.statements, diagonal_position(b).number)
    for other in (n - m, (n - m) + length, (m - n) + (length - 1), (n - m) + (b.leaf("length", "N") - 1), (n - m) - (length - 1)):
        assert not is_diagonal_position(b.statements, other.number)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (5, 3), (4, 4), (1, 6), (6, 1)])
def test_sums(rows: int, columns: int) -> None:
    tile = torch.randn(2, rows, columns, dtype=torch.float64)
    sums = diagonal_sums(tile)
    assert sums.shape == (2, rows + columns - 1)
    for place, distance in enumerate(range(1 - rows, columns)):
        torch.testing.assert_close(sums[:, place], tile.diagonal(distance, 1, 2).sum(-1))
