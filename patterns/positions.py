"""Where the axes of an attention lie in its canonical indices b, h, m, n."""

from __future__ import annotations

from dataclasses import dataclass

from flashfuse.ir.score_builder import Value
from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, Dim, Index, refined
from flashfuse.patterns.operands import View, canonical_view


@dataclass
class Positions:
    """Where every axis lies in the canonical (b, h, m, n): letter -> axes, major first."""

    groups: dict[str, tuple[Axis, ...]]

    def letters(self, dim: Dim) -> set[str]:
        """The canonical letters that a dimension runs over; a computed one counts as both m and n."""
        if isinstance(dim, Value):
            return {"m", "n"}
        return {letter for letter, axes_ in self.groups.items() for axis in refined(dim) if axis in refined(axes_)}

    def runs(self, dim: tuple[Axis, ...]) -> list[tuple[str, int, tuple[Axis, ...]]]:
        """A dimension as runs of neighbouring axes of one letter: (letter, place of the first, axes); "" for none."""
        found: list[tuple[str, int, tuple[Axis, ...]]] = []
        for axis in dim:
            letter, place = self._place(axis)
            if found and letter and found[-1][0] == letter and found[-1][1] + len(found[-1][2]) == place:
                found[-1] = (letter, found[-1][1], (*found[-1][2], axis))
            else:
                found.append((letter, place, (axis,)))
        return found

    def _place(self, axis: Axis) -> tuple[str, int]:
        for letter, group in self.groups.items():
            whole = refined(group)
            if axis in whole:
                return letter, whole.index(axis)
        return "", 0

    def are_plain(self, index: Index) -> bool:
        """Whether each dimension is one whole canonical index, or position 0."""
        wholes = {refined(group) for group in self.groups.values()}
        plain = ("index", "const")
        return all(d.statement.op in plain if isinstance(d, Value) else refined(d) in {(), *wholes} for d in index)

    def canonical(self, index: Index) -> tuple[View, Index]:
        """The view of a tensor as [B, H, M, N], with size 1 for what it does not depend on, and its index.

        Raises LayoutError for computed positions.
        """
        if any(isinstance(dim, Value) for dim in index):
            raise axes.LayoutError("a tensor that needs a gradient is read at computed positions")
        own = {axis for dim in index for axis in refined(dim)}  # type: ignore[arg-type]
        groups = [refined(group) if own & set(refined(group)) else () for group in self.groups.values()]
        return canonical_view(index, groups), tuple(groups)
