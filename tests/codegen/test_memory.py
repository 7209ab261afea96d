"""No kernel reads or writes outside the tensors of its launch: every address is checked in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashfuse.codegen import launch

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from decode_cases import DECODE_CASES
from specs import make_inputs
from test_kernels import run_kernels

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")

ODD = {  # lengths that no tile divides, over several tiles of the interpreter's plan
    "alibi": (1, 2, 1, 51, 53, 16, 16), "documents": (2, 2, 1, 75, 75, 16, 16), "causal_additive": (1, 2, 1, 45, 51, 24, 40),
    "padding_finite": (2, 2, 1, 75, 75, 16, 16), "row_and_column": None, "bias_causal": None, "dropout_gqa": None,
    "sinks_rows": None, "weight_matrix": None, "tensor_mask": None, "plain_dims": None,
    "decode_biases": None, "decode_odd": None, "decode_heads": None, "decode_nothing_finite": None,
}  # fmt: skip


class Watch:
    """The address ranges of the running launch's tensors, and the accesses outside of them."""

    def __init__(self) -> None:
        self.starts, self.ends = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.checked = 0

    def allow(self, tensors: list[torch.Tensor]) -> None:
        """The elements that the tensors' views span may be touched, and nothing else."""
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors)
        self.starts, self.ends = (np.array(each, np.int64) for each in zip(*spans, strict=True))

    def check(self, addresses: Any, mask: Any, itemsize: int, what: str) -> None:
        """Raise AssertionError at an unmasked address that lies in none of the ranges."""
        at = np.broadcast_to(addresses, mask.shape)[mask.astype(bool)].astype(np.int64)
        if at.size == 0:
            return
        self.checked += at.size
        reach = np.maximum.accumulate(self.ends)  # spans may overlap
        place = np.searchsorted(self.starts, at, side="right") - 1
        outside = (place < 0) | (at + itemsize > reach[np.maximum(place, 0)])
        assert not outside.any(), f"{what} of {int(outside.sum())} elements outside the tensors of the launch"


def _extent(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Every load and store of the interpreter, checked against the tensors of the launch that makes it."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = Watch()
    start, load, store = launch.Call.start, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_start(self: Any, kernel: str, blocks: int, *positional: Any, **named: Any) -> Any:
        found.allow(list(_tensors(positional)))
        return start(self, kernel, blocks, *positional, **named)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.check(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, "a load")
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.check(pointers.data, mask.data, value.data.itemsize, "a store")
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(launch.Call, "start", watched_start)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
    return found


@pytest.mark.parametrize("name", ODD)
def test_no_access_outside_the_tensors(name: str, watch: Watch) -> None:
    case = next(case for case in [*CASES, *DECODE_CASES] if case.name == name)
    case = dataclasses.replace(case, shape=ODD[name] or case.shape)
    run_kernels(case, make_inputs(case, torch.float32))
    assert watch.checked > 1000


def test_an_access_outside_is_noticed(watch: Watch) -> None:
    inside = torch.zeros(4)
    watch.allow([inside])
    watch.check(np.array([inside.data_ptr() + 12]), np.array([True]), 4, "a load")
    watch.check(np.array([inside.data_ptr() + 16]), np.array([False]), 4, "a load")
    for offset in (-4, 14, 16):
        with pytest.raises(AssertionError, match="outside"):
            watch.check(np.array([inside.data_ptr() + offset]), np.array([True]), 4, "a load")
