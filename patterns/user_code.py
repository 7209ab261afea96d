"""Words for a node: what it calls, and the line of the user's code that made it."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'^\s*File "(.+)", line (\d+)', re.MULTILINE)


def describe(node: fx.Node) -> str:
    """What a node calls, as the ATen name."""
    if node.op == "output":
        return "the graph's output"
    return str(node.target) if node.op == "call_function" else f"{node.op} {node.target}"


def user_place(node: fx.Node) -> str:
    """`/home/me/file.py:41`: the user's code that made a node, or an empty string."""
    places = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not places:
        return ""
    file, line = places[-1]
    return f"{file.replace(chr(92), '/')}:{line}"


def user_line(node: fx.Node) -> str:
    """`file.py:41` of the user's code that made a node, or an empty string."""
    return user_place(node).rsplit("/", 1)[-1]
