"""Repeating a call's launches without Triton's argument binding.

Triton binds and specialises every argument at every launch, some 50 microseconds with these argument lists. What it finds
depends only on shapes, strides, dtypes, alignment and constants. So the launches of a call are recorded once for each
such signature, with every tensor replaced by what it was in the call, and written down as a function that repeats them on the
tensors of later calls through the compiled kernels' own launcher.

That launcher is an internal of Triton: it is used only if this Triton calls it in exactly the known way.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import _empty_strided_cuda  # what Inductor's own code calls, half the time of the public one
except ImportError:

    def _empty_strided_cuda(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


_KNOWN_CALL = "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"


@cache
def available() -> bool:
    """Whether compiled kernels can be launched directly with this Triton."""
    try:
        from triton.runtime.jit import JITFunction

        return _KNOWN_CALL in inspect.getsource(JITFunction.run)
    except (ImportError, OSError, TypeError, AttributeError):
        return False


@dataclass(frozen=True)
class Slot:
    """Stands for the address of a tensor of the call: the given one of this number, or (`scratch`) the allocated one."""

    number: int
    scratch: bool


@dataclass(frozen=True)
class Described:
    """Stands for a TMA descriptor of a tensor of the call."""

    slot: Slot
    descriptor: Any

    def at(self, address: int) -> Any:
        """The descriptor for the tensor that lies there now; the launcher asks its base for nothing but the address."""
        moved = object.__new__(type(self.descriptor))
        moved.__dict__.update(self.descriptor.__dict__)
        moved.base = _Base(address)
        return moved


class _Base:
    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """One kernel launch; `arguments` are all of the kernel's parameters in order, tensors as slots."""

    kernel: Any
    blocks: int
    arguments: tuple[Any, ...]


def _without_base(descriptor: Any) -> Any:
    """A copy that keeps no tensor alive."""
    bare = copy.copy(descriptor)
    bare.base = None
    return bare


@dataclass(frozen=True)
class Allocation:
    """An uninitialised tensor that the call makes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Recording:
    """What one call does, in order: allocations, then launches. `results` are the slots of its scratch results."""

    given: Sequence[Tensor]
    device: int  # the number of the CUDA device
    allocations: list[Allocation] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    results: tuple[Slot, ...] = ()
    sound: bool = True  # False once something happened that cannot be repeated
    _slots: dict[int, Slot] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # so that no object's id is used again while recording

    def __post_init__(self) -> None:
        self._slots = {id(tensor): Slot(number, False) for number, tensor in enumerate(self.given)}

    def allocated(self, tensor: Tensor) -> None:
        """Note a tensor that the call made."""
        self._slots[id(tensor)] = Slot(len(self.allocations), True)
        self.allocations.append(Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype))
        self._kept.append(tensor)

    def shown(self, view: Tensor, tensor: Tensor) -> None:
        """Note that a view starts at the same address as a tensor of the call."""
        slot = self._slots.get(id(tensor))
        if slot is not None:
            self._slots[id(view)] = slot
            self._kept.append(view)

    def launched(self, kernel: Any, blocks: int, function: Any, positional: Sequence[Any], named: dict[str, Any]) -> None:
        """Note a launch of a compiled kernel."""
        names = function.arg_names
        if kernel is None or len(positional) > len(names) or not hasattr(kernel, "packed_metadata"):
            self.sound = False
            return
        values = [*positional, *(named.get(name) for name in names[len(positional) :])]
        self.launches.append(Launch(kernel, blocks, tuple(self._template(value) for value in values)))

    def _template(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._template(item) for item in value)
        if hasattr(value, "block_shape"):
            slot = self._template(value.base)
            return Described(slot, _without_base(value)) if isinstance(slot, Slot) else value
        if not isinstance(value, Tensor):
            return value
        slot = self._slots.get(id(value))
        if slot is None:
            self.sound = False
            return value
        return slot

    def finish(self, results: Sequence[Tensor]) -> Replay | None:
        """The replay, or None if the call cannot be repeated this way."""
        slots = [self._slots.get(id(tensor)) for tensor in results]
        self._slots.clear()
        self._kept.clear()
        if not self.sound or any(slot is None for slot in slots):
            return None
        given = tuple(Given(tuple(t.shape), t.stride(), t.dtype, t.data_ptr() & 15, t.get_device()) for t in self.given)
        return Replay(self.device, given, tuple(self.allocations), tuple(self.launches), tuple(slots))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Given:
    """What a replay asks of a tensor that it is given."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes from an aligned address
    device: int


@dataclass(frozen=True)
class Replay:
    """A recorded call, ready to be repeated on other tensors of the same signature."""

    device: int
    given: tuple[Given, ...]
    allocations: tuple[Allocation, ...]
    launches: tuple[Launch, ...]
    results: tuple[Slot, ...]

    @cached_property
    def repeat(self) -> Callable[[Sequence[Tensor]], list[Tensor] | None]:
        """The call on these tensors, on the current stream of the current CUDA device, which must be `device`; returns the
        results, or None, and does nothing, for tensors of another signature."""
        text, names = self.text()
        exec(compile(text, "<flashfuse replay>", "exec"), names)
        return names["repeat"]  # type: ignore[no-any-return]

    def text(self) -> tuple[str, dict[str, Any]]:
        """The function's text, and what its names mean."""
        names: dict[str, Any] = {"empty_strided": _empty_strided_cuda, "current_stream": _driver().get_current_stream}
        lines = [f"{', '.join(f'x{i}' for i in range(len(self.given)))}, = given"]
        for i, each in enumerate(self.given):
            tests = [f"x{i}.get_device() == {each.device}", f"x{i}.dtype is {_named(each.dtype, names)}"]
            tests += [f"x{i}.shape == {each.shape}", f"x{i}.stride() == {each.strides}"]
            lines += [f"if not ({' and '.join(tests)}):", "    return None"]
        lines += [f"at_x{i} = x{i}.data_ptr()" for i in range(len(self.given))]
        aligned = [f"at_x{i} & 15 == {each.offset}" for i, each in enumerate(self.given)]
        lines += [f"if not ({' and '.join(aligned)}):", "    return None"]
        for i, new in enumerate(self.allocations):
            lines += [
                f"y{i} = empty_strided({new.shape}, {new.strides}, {_named(new.dtype, names)})",
                f"at_y{i} = y{i}.data_ptr()",
            ]
        lines.append(f"stream = current_stream({self.device})")
        for start in self.launches:
            head = [_named(item, names) for item in (start.kernel.function, start.kernel.packed_metadata)]
            arguments = [str(start.blocks), "1", "1", "stream", *head, "None", "None", "None"]
            arguments += [_written(value, names) for value in start.arguments]
            lines.append(f"{_named(start.kernel.run, names)}({', '.join(arguments)})")
        lines.append(f"return [{', '.join(f'{_letter(slot)}{slot.number}' for slot in self.results)}]")
        return "def repeat(given):\n" + "".join(f"    {line}\n" for line in lines), names


def _letter(slot: Slot) -> str:
    return "y" if slot.scratch else "x"


def _named(value: Any, names: dict[str, Any]) -> str:
    """A name that means the value."""
    for name, known in names.items():
        if known is value:
            return name
    names[f"c{len(names)}"] = value
    return f"c{len(names) - 1}"


def _written(value: Any, names: dict[str, Any]) -> str:
    """An argument of a launch as text."""
    if isinstance(value, Slot):
        return f"at_{_letter(value)}{value.number}"
    if isinstance(value, Described):
        return f"{_named(value.at, names)}({_written(value.slot, names)})"
    if type(value) is tuple:
        return f"({''.join(f'{_written(item, names)}, ' for item in value)})"
    return repr(value) if value is None or type(value) in (bool, int, str) else _named(value, names)


_replays: dict[Any, Replay | None] = {}
_last: dict[Any, Replay] = {}  # by the call's key alone: tensors are most often as they were at the last call
_seen: set[Any] = set()


def signature(tensors: Sequence[Tensor], addresses: Sequence[int]) -> tuple[Any, ...]:
    """All that Triton's specialisation looks at."""
    facts: list[Any] = []
    for tensor, address in zip(tensors, addresses, strict=True):
        facts += (tensor.shape, tensor.stride(), tensor.dtype, address & 15)
    return tuple(facts)


def repeated(
    key: Any, given: Sequence[Tensor], device: torch.device, run: Callable[[Recording | None], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """Repeat a recorded call, or `run` it: plainly the first time, with a recording the second time.

    `run(recording)` makes the call; `key` must hold all that decides what it does besides the tensors' signature.
    """
    last = _last.get(key)
    if last is not None and last.device == torch.cuda.current_device() and not _hooked():
        results = last.repeat(given)
        if results is not None:
            return results
    if device.type != "cuda" or not available() or _hooked() or device.index != torch.cuda.current_device():
        return run(None)
    call = key
    key = (call, device.index, signature(given, [tensor.data_ptr() for tensor in given]))
    replay = _replays.get(key)
    results = None if replay is None else replay.repeat(given)
    if replay is not None and results is not None:
        _last[call] = replay
        return results
    if len({id(tensor) for tensor in given}) != len(given):
        return run(None)  # one tensor in two places: which of the two a launch took could not be told
    if key in _replays or key not in _seen:
        _seen.add(key)
        return run(None)
    recording = Recording(given, device.index)
    made = run(recording)
    _replays[key] = recording.finish(made)
    return made


def forget() -> None:
    """Record all calls anew."""
    _replays.clear()
    _last.clear()
    _seen.clear()


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches; then Triton's own way is taken."""
    runtime = _runtime_knobs()
    return _has_calls(runtime.launch_enter_hook) or _has_calls(runtime.launch_exit_hook)


def _has_calls(hook: Any) -> bool:
    return bool(getattr(hook, "calls", hook))


@cache
def _runtime_knobs() -> Any:
    from triton import knobs

    return knobs.runtime


@cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver.active
