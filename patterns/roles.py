"""Roles: which axes are batch, heads, head group, queries, keys and head dims, and the views that show them so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashfuse.patterns import axes
from flashfuse.patterns.axes import Axis, LayoutError, refined
from flashfuse.patterns.frame import Frame
from flashfuse.patterns.operands import Stage, View, canonical_view, is_viewable
from flashfuse.refusal import Refused


@dataclass(frozen=True)
class Roles:
    """The canonical axes and the chosen stages."""

    batch: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    group: tuple[Axis, ...]
    queries: tuple[Axis, ...]
    query: Stage
    key: Stage
    value: Stage

    @property
    def heads(self) -> tuple[Axis, ...]:
        return (*self.kv_heads, *self.group)


def solve_roles(frame: Frame) -> tuple[Roles, dict[str, View], dict[str, bool]]:
    """The deepest stages for which all three operands have the canonical layout by views alone.

    Failing that, the product's own operands, of which one may then be copied as eager's own product would copy it.
    """
    summed = refined(frame.operands.summed)
    value_dim = tuple(axis for dim in frame.out_index for axis in refined(dim) if axis in frame.value[0].axes())  # type: ignore[arg-type]
    rows = tuple(axis for dim in frame.rows for axis in refined(dim))  # type: ignore[arg-type]
    value_dim = tuple(axis for axis in value_dim if axis not in rows)
    fallback = None
    for key in reversed(frame.key):
        for value in reversed(frame.value):
            roles = _roles(frame, rows, key, value)
            if roles is None:
                continue
            found = _stage_views(frame, roles, summed, value_dim)
            if found is not None and not any(found[2].values()):
                return found
            fallback = found or fallback
    if fallback is None:
        raise Refused("FF204", frame.product, "no strided view of query, key and value has the canonical layout")
    return fallback


def _roles(frame: Frame, rows: tuple[Axis, ...], key: Stage, value: Stage) -> Roles | None:
    in_key, in_value = set(key.axes()), set(value.axes())
    only_query = [axis for axis in rows if axis not in in_key and axis not in in_value and axis in frame.query[0].axes()]
    batch = [axis for axis in rows if axis not in only_query]
    # the longest query-only axis is the query position; those right before it and after all batch axes are a head group
    queries = _query_axes(frame, only_query)
    rows = (*(axis for axis in rows if axis not in queries), *queries)
    tail: list[Axis] = []
    for axis in reversed(rows[: len(rows) - len(queries)]):
        if axis not in only_query:
            break
        tail.insert(0, axis)
    # query-only axes further to the front are batch axes that key and value are expanded over
    batch += [axis for axis in only_query if axis not in tail and axis not in queries]
    batch = [axis for axis in rows if axis in batch]
    return Roles(tuple(batch[:-1]), tuple(batch[-1:]), tuple(tail), queries, frame.query[0], key, value)


def _query_axes(frame: Frame, only_query: list[Axis]) -> tuple[Axis, ...]:
    """The longest run of query-only axes that one axis of the output was split into; the last of equals.

    A symbolic length counts as longer than a known one.
    """
    runs: list[tuple[Axis, ...]] = [()]
    for dim in frame.out_index:
        for whole in dim:  # type: ignore[union-attr]
            run: tuple[Axis, ...] = ()
            for axis in (*refined((whole,)), None):
                if axis in only_query:
                    run = (*run, axis)  # type: ignore[arg-type]
                    continue
                runs.append(run)
                run = ()
    return max(reversed(runs), key=_length)


def _length(run: tuple[Axis, ...]) -> float:
    size = axes.product([axis.size for axis in run])
    return size if isinstance(size, int) and run else 0 if not run else math.inf


def _stage_views(
    frame: Frame, roles: Roles, summed: tuple[Axis, ...], value_dim: tuple[Axis, ...]
) -> tuple[Roles, dict[str, View], dict[str, bool]] | None:
    try:
        key_view = canonical_view(roles.key.index, (roles.batch, roles.kv_heads, frame.keys, summed))
        value_view = canonical_view(roles.value.index, (roles.batch, roles.kv_heads, frame.keys, value_dim))
    except LayoutError:
        return None
    copies = {
        "key": not is_viewable(roles.key, key_view),
        "value": not is_viewable(roles.value, value_view),
    }
    if (copies["key"] and roles.key is not frame.key[0]) or (copies["value"] and roles.value is not frame.value[0]):
        return None
    for query in reversed(frame.query):
        if query.dtype != roles.key.dtype and query is not frame.query[0]:
            continue
        try:
            view = canonical_view(query.index, (roles.batch, roles.heads, roles.queries, summed))
        except LayoutError:
            continue
        copied = not is_viewable(query, view)
        if copied and query is not frame.query[0]:
            continue
        chosen = Roles(roles.batch, roles.kv_heads, roles.group, roles.queries, query, roles.key, roles.value)
        views = {"query": view, "key": key_view, "value": value_view}
        return chosen, views, {**copies, "query": copied}
    return None


def check_layouts(frame: Frame, roles: Roles) -> None:
    """Refuse (FF203) a key whose head and key axes lie the other way round than the value's, if sizes cannot tell."""
    head, position = refined(roles.kv_heads), refined(frame.keys)
    if len(head) != 1 or len(position) != 1 or not axes.same_size(head[0].size, position[0].size):
        return
    orders = []
    for stages in (frame.key, frame.value):
        own = stages[-1].axes()
        if head[0] not in own or position[0] not in own:
            return
        orders.append(own.index(head[0]) < own.index(position[0]))
    if orders[0] != orders[1]:
        found = f"heads and keys are both {head[0].size} long; key has them in another order than value"
        raise Refused("FF203", frame.operands.right if frame.query_first else frame.operands.left, found)
