"""A graph as a Python file that runs by itself: its code, its constants, and random inputs of the same shapes.

What the file needs of flashfuse is in `flashfuse.reproduce`.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

_HINT = 16  # for a size of which nothing is known


@dataclass
class GraphSource:
    """The text of a graph's file. `constants` are tensors that the graph holds itself, to be saved beside it."""

    module: fx.GraphModule
    title: str
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def text(self, constants_file: str) -> str:
        """The whole file; it reads `constants_file` beside itself if there are constants."""
        imports: dict[str, Any] = {}
        classes = list(self._classes(self.module, "Graph", imports))
        parts = [f'"""{self.title}"""', _import_text(imports), *classes, self._inputs_text()]
        if self.constants:
            parts.insert(2, f"CONSTANTS = constants(__file__, {constants_file!r})")
        parts.append('if __name__ == "__main__":\n    run(Graph(), inputs(), ' + mode_text() + ")")
        return "\n\n\n".join(parts) + "\n"

    def _classes(self, module: fx.GraphModule, name: str, imports: dict[str, Any]) -> Iterator[str]:
        """The class of a graph, after those of its sub-graphs."""
        code = module.graph.python_code("self")
        imports.update(code.globals)
        made: list[str] = []
        for target in _attributes(module.graph):
            held = _held(module, target)
            if isinstance(held, fx.GraphModule):
                yield from self._classes(held, f"{name}_{_identifier(target)}", imports)
                made.append(f"hold(self, {target!r}, as_graph({name}_{_identifier(target)}()))")
            elif isinstance(held, torch.Tensor):
                constant = f"{name}.{target}"
                self.constants[constant] = held.detach()
                made.append(f"hold(self, {target!r}, CONSTANTS[{constant!r}])")
            else:
                made.append(f"hold(self, {target!r}, {held!r})")
        lines = ["super().__init__()", *made]
        body = "\n".join(f"    {line}" if line else "" for line in code.src.strip("\n").splitlines())
        yield f"class {name}(torch.nn.Module):\n    def __init__(self):\n        " + "\n        ".join(lines) + f"\n\n{body}"

    def _inputs_text(self) -> str:
        rows = [f"        {_input_text(node)},  # {node.target}" for node in self.module.graph.nodes if node.op == "placeholder"]
        return "def inputs():\n    return [\n" + "\n".join([*rows, "    ]"])


def _import_text(imports: dict[str, Any]) -> str:
    needed = {name: value for name, value in imports.items() if name not in ("torch", "__builtins__")}
    lines = [
        "import torch",
        "",
        "import flashfuse.attention_op",
        "import flashfuse.block_ranges",
        "import flashfuse.diagonals",
        "from flashfuse.reproduce import as_graph, constants, hold, run, tensor",
    ]
    block = _format_import_block(needed, sys_importer).strip()
    return "\n".join([*lines, *([block] if block else [])])


def _attributes(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")))


def _held(module: torch.nn.Module, target: str) -> Any:
    held: Any = module
    for part in target.split("."):
        held = getattr(held, part)
    return held


def _identifier(target: str) -> str:
    name = "".join(letter if letter.isalnum() else "_" for letter in target)
    return f"{name}_" if keyword.iskeyword(name) else name


def _input_text(node: fx.Node) -> str:
    """An expression that makes an input like the one that was captured, with random elements."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, torch.Tensor):
        weight = "_parameters_" in str(node.target) or isinstance(value, torch.nn.Parameter)
        width = known(value.shape[-1]) if weight and value.dim() else 1
        return tensor_text(value, std=max(1, width) ** -0.5)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return repr(known(value))
    return repr(value) if isinstance(value, (int, float, bool, str)) or value is None else "None"


def tensor_text(value: torch.Tensor, std: float = 1.0) -> str:
    """`tensor((2, 3), (3, 1), "float32", "cpu")`, with symbolic sizes as they were at the call."""
    size, stride = ([known(each) for each in each_of] for each_of in (value.shape, value.stride()))
    dtype = str(value.dtype).removeprefix("torch.")
    grad = ", grad=True" if value.requires_grad else ""
    spread = "" if std == 1.0 else f", std={std:.3g}"
    return f"tensor({tuple(size)}, {tuple(stride)}, {dtype!r}, {value.device.type!r}{grad}{spread})"


def known(number: Any) -> Any:
    """A symbolic number's value at the captured call, without adding a guard for it."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number
    hint = getattr(number.node, "hint", None)
    return _HINT if hint is None else type(hint)(hint)


def mode_text() -> str:
    """The modes that are on around the graph, as arguments of `reproduce.run`."""
    words = [f"grad={torch.is_grad_enabled()}"]
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
            words.append(f"autocast=({device!r}, {dtype!r})")
            break
    return ", ".join(words)
