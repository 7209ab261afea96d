"""Named axes: which part of which index each dimension of a tensor runs over.

A dimension is a `Dim`: a tuple of axes in row-major order, the empty tuple being "index 0 of size 1", or, for masks read
at computed positions, an integer `Value` of the score program. Views are followed from their result to their input.
A view that splits an axis refines it for everybody: axes are shared objects, so the refinement shows wherever the axis
is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashfuse.ir.score_builder import Value

Size = Any  # int or SymInt
_numbers = itertools.count()


class Axis:
    """One index variable. `parts` is set when a view has split it; use `refined` before reading a dimension.

    `at`: the one position that is read, of an axis that is not run over (see `fixed`).
    """

    __slots__ = ("at", "name", "parts", "size")

    def __init__(self, name: str, size: Size, at: int | None = None) -> None:
        self.name = f"{name}{next(_numbers)}"
        self.size = size
        self.at = at
        self.parts: tuple[Axis, ...] | None = None

    def __repr__(self) -> str:
        return f"{self.name}:{self.size}"


Dim = tuple[Axis, ...] | Value
Index = tuple[Dim, ...]


class LayoutError(Exception):
    """A view that named axes cannot follow. The message says which sizes did not fit."""


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for certain, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def is_one(size: Size) -> bool:
    """Whether a size is certainly 1."""
    return same_size(size, 1)


def refined(dim: Sequence[Axis]) -> tuple[Axis, ...]:
    """The dimension over unsplit axes, without axes of size 1."""
    found: list[Axis] = []
    for axis in dim:
        if axis.parts is not None:
            found.extend(refined(axis.parts))
        elif not is_one(axis.size):
            found.append(axis)
    return tuple(found)


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def fresh(name: str, size: Size) -> tuple[Axis, ...]:
    """A new dimension of one axis."""
    return () if is_one(size) else (Axis(name, size),)


def fixed(size: Size, at: int) -> tuple[Axis, ...]:
    """A dimension of which one position alone is read."""
    return (Axis("f", size, at),)


def free(dim: Sequence[Axis]) -> tuple[Axis, ...]:
    """The refined axes of a dimension that are run over."""
    return tuple(axis for axis in refined(dim) if axis.at is None)


def broadcast(index: Index, shape: Sequence[Size]) -> Index:
    """The index of an operand of `shape` that is broadcast to the rank of `index`; size-1 dimensions read position 0."""
    offset = len(index) - len(shape)
    if offset < 0:
        raise LayoutError(f"rank {len(shape)} does not broadcast to rank {len(index)}")
    return tuple(() if is_one(size) else dim for dim, size in zip(index[offset:], shape, strict=True))


def reshape(index: Index, result: Sequence[Size], operand: Sequence[Size]) -> Index:
    """The operand's index of a reshape, given the result's. Splits axes where the operand has more dimensions."""
    found: list[Dim] = []
    place = 0
    for taken, own in _blocks(list(operand), list(result)):
        dims = index[place : place + own]
        sizes = result[place : place + own]
        place += own
        wanted = operand[len(found) : len(found) + taken]
        found.extend(_redistribute(dims, sizes, wanted))
    return tuple(found)


def _blocks(left: list[Size], right: list[Size]) -> list[tuple[int, int]]:
    """Smallest runs of dimensions with equal products, as (count left, count right)."""
    blocks: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        start = (i, j)
        a: Size = 1
        b: Size = 1
        if i < len(left):
            a, i = left[i], i + 1
        if j < len(right):
            b, j = right[j], j + 1
        while not same_size(a, b):
            if j < len(right) and (i >= len(left) or _smaller(b, a)):
                b, j = b * right[j], j + 1
            elif i < len(left):
                a, i = a * left[i], i + 1
            else:
                raise LayoutError(f"a view from {left} to {right} was not understood")
        blocks.append((i - start[0], j - start[1]))
    return blocks


def _smaller(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    # symbolic: the product with fewer factors of the other is the smaller one; divisibility tells
    return bool(statically_known_true(b % a == 0))


def _redistribute(dims: Sequence[Dim], sizes: Sequence[Size], wanted: Sequence[Size]) -> list[Dim]:
    if len(dims) == len(wanted) == 1:
        return [dims[0]]
    if any(isinstance(dim, Value) for dim in dims):
        return _computed(dims, sizes, wanted)
    axes = list(refined([axis for dim in dims for axis in dim]))  # type: ignore[union-attr]
    found: list[Dim] = []
    for size in wanted:
        taken: list[Axis] = []
        while not same_size(product([axis.size for axis in taken]), size):
            if not axes:
                raise LayoutError(f"sizes {list(wanted)} do not divide {[str(s) for s in sizes]}")
            have = product([axis.size for axis in taken])
            if same_size(have * axes[0].size, size) or _smaller_factor(have * axes[0].size, size):
                taken.append(axes.pop(0))
            else:
                axes[0:1] = _split(axes[0], size // have)
        found.append(tuple(taken))
    if axes:
        raise LayoutError(f"sizes {list(wanted)} leave {axes} over")
    return found


def _smaller_factor(part: Size, whole: Size) -> bool:
    if isinstance(part, int) and isinstance(whole, int):
        return part < whole and whole % part == 0
    return bool(statically_known_true(whole % part == 0)) and not bool(statically_known_true(part % whole == 0))


def _split(axis: Axis, major: Size) -> list[Axis]:
    minor = axis.size // major
    if not same_size(major * minor, axis.size) or is_one(major):
        raise LayoutError(f"axis of size {axis.size} does not split into {major} parts")
    if axis.at is not None and not isinstance(minor, int):
        raise LayoutError("a position in an axis that is split in parts of unknown length")
    at = (None, None) if axis.at is None else divmod(axis.at, minor)
    axis.parts = (Axis(axis.name, major, at[0]), Axis(axis.name, minor, at[1]))
    return list(axis.parts)


def _computed(dims: Sequence[Dim], sizes: Sequence[Size], wanted: Sequence[Size]) -> list[Dim]:
    """Computed positions: through the linear position and back. Needs static sizes and computed dims throughout."""
    if not all(isinstance(size, int) for size in (*sizes, *wanted)):
        raise LayoutError("a view of computed positions needs static sizes")
    linear: Value | None = None
    for dim, size in zip(dims, sizes, strict=True):
        if isinstance(dim, tuple):
            if refined(dim):
                raise LayoutError("a view mixes computed positions and axes")
            if linear is not None:
                linear = linear * size
            continue
        linear = dim if linear is None else linear * size + dim
    assert linear is not None
    found: list[Dim] = []
    for place, size in enumerate(wanted):
        below = int(product(wanted[place + 1 :]))
        part = linear if below == 1 else linear.apply("floordiv", linear, below)
        found.append(() if size == 1 else part if place == 0 else part.apply("mod", part, size))
    return found
