"""The captured graph before and after, as plain values for the report page: nodes, their modules, lines and meaning."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from flashfuse.patterns.user_code import user_place
from flashfuse.records import SiteRecord
from flashfuse.stages import Fused

_ATTENTION = ("flashfuse.attention", "flashfuse::attention")


@dataclass(frozen=True)
class DrawnNode:
    """`site` counts the graph's sites from 0, -1 for none; `role` is "fused", "refused", "op" or ""."""

    name: str
    called: str
    module: str
    path: str
    shape: str
    inputs: tuple[str, ...]
    site: int
    role: str


Drawing = tuple[DrawnNode, ...]  # in the order in which they run


def draw(result: Fused) -> tuple[Drawing, Drawing]:
    """The captured and the rewritten graph, without parameters."""
    sites = result.record.sites
    roles = {name: (number, "fused" if site.fused else "refused") for number, site in enumerate(sites) for name in site.region}
    after = _roles_after(result.module, sites)
    return _draw(result.captured, roles), _draw(result.module, after)


def _roles_after(module: fx.GraphModule, sites: Sequence[SiteRecord]) -> dict[str, tuple[int, str]]:
    """The attention calls, which come in the order of the fused sites, and what was left alone."""
    roles = {name: (number, "refused") for number, site in enumerate(sites) if not site.fused for name in site.region}
    numbers = [number for number, site in enumerate(sites) if site.fused]
    calls = [node.name for node in module.graph.nodes if str(node.target).startswith(_ATTENTION)]
    return roles | {name: (number, "op") for name, number in zip(calls, numbers, strict=False)}


def _draw(module: fx.GraphModule, roles: dict[str, tuple[int, str]]) -> Drawing:
    shown = {node: None for node in module.graph.nodes if not _is_weight(node)}
    return tuple(
        DrawnNode(
            node.name, _called(node), _module_name(node), user_place(node), _shape(node),
            tuple(each.name for each in node.all_input_nodes if each in shown), *roles.get(node.name, (-1, "")),
        )
        for node in shown
    )  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """Where a module's nodes are drawn: (column, row) of each, and how many columns and rows there are."""

    module: str
    places: dict[str, tuple[float, int]]
    columns: float
    rows: int


def place(drawing: Drawing) -> list[Placed]:
    """Every module's nodes in rows by their depth, as networkx's multipartite layout has it (which needs numpy)."""
    modules: dict[str, list[DrawnNode]] = {}
    for node in drawing:
        modules.setdefault(node.module, []).append(node)
    return [_placed(module, nodes) for module, nodes in modules.items()]


def _placed(module: str, nodes: Sequence[DrawnNode]) -> Placed:
    graph = nx.DiGraph()
    graph.add_nodes_from(node.name for node in nodes)
    graph.add_edges_from((each, node.name) for node in nodes for each in node.inputs if each in graph)
    order = {node.name: number for number, node in enumerate(nodes)}
    layers = {row: sorted(layer, key=order.__getitem__) for row, layer in enumerate(nx.topological_generations(graph))}
    row_of = {name: row for row, layer in layers.items() for name in layer}
    found = nx.multipartite_layout(graph, subset_key=layers, align="horizontal")
    columns = [float(x) for x, _y in found.values()]
    heights = [float(y) for _x, y in found.values()]
    # the layout's unit, which is alike in both directions
    along, count = (heights, len(layers)) if len(layers) > 1 else (columns, len(columns))
    span = max(along) - min(along)
    step = span / (count - 1) if span else 1.0
    places = {name: (round((x - min(columns)) / step, 3), row_of[name]) for name, (x, _y) in found.items()}
    return Placed(module, places, max(x for x, _ in places.values()) + 1, len(layers))


def _is_weight(node: fx.Node) -> bool:
    return node.op == "placeholder" and ("_parameters_" in str(node.target) or "_buffers_" in str(node.target))


def _module_name(node: fx.Node) -> str:
    """The innermost module of the user's own (torch.nn's are steps of it) that a node belongs to: `layers.0.attention`."""
    if node.op in ("placeholder", "output"):
        return f"{node.op}s"
    for path, kind in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        owner = getattr(kind, "__module__", str(kind))
        if not owner.startswith("torch.nn"):
            return module_path(path) or "model"
    return "model"


def module_path(path: str) -> str:
    """`L['self'].layers[0].attn` and `L['self']._modules['layers']._modules['0']._modules['attn']` as `layers.0.attn`."""
    inner = re.sub(r"^L\['\w+'\]\.?", "", path)
    inner = re.sub(r"_modules\['(\w+)'\]", r"\1", inner)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", inner).strip(".")


def _called(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return str(target)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape)) or 'scalar'}"


def source_line(place: str) -> str:
    """The text of the user's line `path:line`, or nothing."""
    path, _, line = place.rpartition(":")
    return linecache.getline(path, int(line)).strip() if path and line.isdigit() else ""
