"""The order in which programs take batches, heads and blocks: those that read the same memory run next to each other.

Blocks of one head follow each other, since they read the same keys and values. A capture with an element for each query and
key, such as a bias of pairs, can be larger than all keys: where several batches or heads share it, their programs for one
block are neighbours, so that it is read from memory once and from the L2 cache by the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashfuse.codegen.hopper_order import L2_BYTES, heads_that_fit
from flashfuse.ir.attention_spec import AttentionSpec

if TYPE_CHECKING:
    from flashfuse.codegen.launch import Call

_read: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {}


@dataclass(frozen=True)
class Order:
    """`section`: batches and heads whose programs for one block are neighbours. `swapped`: they are counted with the batches
    running first (`h * B + b`), not the heads (`b * H + h`)."""

    section: int = 1
    swapped: bool = False


def bytes_of_keys(call: Call) -> int:
    """What a head of queries reads of keys and values; heads of a group share them."""
    return call.N * (call.D + call.E) * call.key.element_size() * call.G // call.H


def bytes_of_queries(call: Call) -> int:
    """What a head of keys reads of queries and of the output's gradient."""
    return call.M * (call.H // call.G) * (call.D + call.E) * call.query.element_size()


def order_of(call: Call, heads: int, bytes_a_head: int) -> Order:
    """For programs that own a block of one of `heads` heads of a batch and read `bytes_a_head` besides the captures."""
    shared = [_shared(call, capture, letters) for capture, letters in _squares(call.spec)]
    apart, lacking = max(shared, default=(0, ""))
    if apart <= L2_BYTES:
        return Order()
    count = (call.B if "b" in lacking else 1) * (heads if "h" in lacking else 1)
    section = heads_that_fit(count, bytes_a_head)
    return Order(section, swapped=section > 1 and lacking == "b")


def _shared(call: Call, capture: int, letters: tuple[str, ...]) -> tuple[int, str]:
    """Bytes of a capture that are read between two readings of the same element, head after head, and which of b and h share
    its elements."""
    tensor = call.captures[capture]
    real = {letter for letter, size, stride in zip(letters, tensor.shape, tensor.stride(), strict=True) if stride or size == 1}
    lacking = "".join(letter for letter, size in (("b", call.B), ("h", call.H)) if size > 1 and letter not in real)
    if not lacking or not {"m", "n"} <= real:
        return 0, ""
    return call.M * call.N * tensor.element_size() * (call.H if lacking == "b" else 1), lacking


def _squares(spec: AttentionSpec) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Loads of captures at both m and n: the capture, and the index of each of its dimensions if that is plain, else ""."""
    if spec.key not in _read:
        found: list[tuple[int, tuple[str, ...]]] = []
        for program, load in spec.statements:
            if load.op != "load":
                continue
            indices = [program.statements[operand] for operand in load.operands]
            letters = tuple(str(index.attribute) if index.op == "index" else "" for index in indices)
            if {"m", "n"} <= set(letters):
                found.append((int(load.attribute), letters))  # type: ignore[arg-type]
        _read[spec.key] = tuple(dict.fromkeys(found))
    return _read[spec.key]
