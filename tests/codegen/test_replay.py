"""Repeating recorded launches: the same kernels on the tensors of the later call, never on those of the recorded one."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashfuse.codegen import launch, replay
from flashfuse.codegen.replay import Recording, Replay, Slot

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from specs import dense_attention, make_inputs
from test_kernels import run_kernels


def compiled() -> SimpleNamespace:
    """What the recorder needs of a compiled kernel."""
    return SimpleNamespace(packed_metadata=(), function=0, run=None)


FUNCTION = SimpleNamespace(arg_names=["x", "out", "inputs", "size", "BLOCK"])


def test_a_recording_replaces_tensors_by_their_roles():
    x, capture = torch.ones(2), torch.zeros(3, dtype=torch.bool)
    recording = Recording([x, capture], 0)
    out = torch.empty(2)
    recording.allocated(out)
    shown = capture.view(torch.int8)
    recording.shown(shown, capture)
    recording.launched(compiled(), 7, FUNCTION, (x, out, (shown, 1)), {"size": 2, "BLOCK": 16, "num_warps": 4})
    found = recording.finish([out])
    assert isinstance(found, Replay)
    (only,) = found.launches
    assert only.blocks == 7
    assert only.arguments == (Slot(0, False), Slot(0, True), (Slot(1, False), 1), 2, 16)
    assert found.results == (Slot(0, True),)


def test_what_cannot_be_repeated_is_not():
    x = torch.ones(2)
    unknown = Recording([x], 0)
    unknown.launched(compiled(), 1, FUNCTION, (x, torch.empty(2), ()), {})
    assert unknown.finish([x]) is None
    declared = Recording([x], 0)
    declared.sound = False
    assert declared.finish([x]) is None
    assert Recording([x], 0).finish([torch.empty(1)]) is None
    assert Recording([x], 0).finish([x]) is not None


def test_the_signature_sees_all_that_triton_specialises_on():
    x = torch.zeros(64, dtype=torch.float16)

    def signature(tensor: torch.Tensor) -> object:
        return replay.signature([tensor], [tensor.data_ptr()])

    base = signature(x[:16])
    assert signature(x[8:24]) == base
    assert signature(x[1:17]) != base
    assert signature(x[:32:2]) != base
    assert signature(x[:16].float()) != base


class Descriptor:
    """Like Triton's: a base and what else is known of it."""

    def __init__(self, base: torch.Tensor) -> None:
        self.base, self.block_shape = base, [1, 16]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays that allocate on the CPU, on a stream of their own."""
    monkeypatch.setattr(replay, "_driver", lambda: SimpleNamespace(get_current_stream=lambda device: ("stream", device)))
    monkeypatch.setattr(
        replay, "_empty_strided_cuda", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )


@pytest.mark.usefixtures("on_the_cpu")
def test_a_repeated_launch_takes_the_addresses_of_its_own_call():
    started: list[tuple[object, ...]] = []
    kernel = SimpleNamespace(packed_metadata="metadata", function="function", run=lambda *given: started.append(given))
    x, capture, out = torch.ones(2, 3), torch.zeros(5), torch.empty(3, 2).t()
    recording = Recording([x, capture], 0)
    recording.allocated(out)
    function = SimpleNamespace(arg_names=["x", "out", "inputs", "described", "mode", "BLOCK"])
    inputs = (capture, 1, (2, 3))
    recording.launched(kernel, 7, function, (x, out, inputs, Descriptor(capture), "tf32"), {"BLOCK": 16})
    found = recording.finish([out, x])
    assert found is not None
    for _ in range(2):
        given = [torch.ones(2, 3), torch.zeros(5)]
        results = found.repeat(given)
        assert results is not None
        new, same = results
        assert (new.shape, new.stride(), same) == (out.shape, out.stride(), given[0])
        *head, first, second, third, described, mode, block = started[-1]
        assert head == [7, 1, 1, ("stream", 0), "function", "metadata", None, None, None]
        places = [tensor.data_ptr() for tensor in (given[0], new, given[1])]
        assert (first, second, third, mode, block) == (places[0], places[1], (places[2], 1, (2, 3)), "tf32", 16)
        assert (described.base.data_ptr(), described.block_shape) == (places[2], [1, 16])


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 2, dtype=torch.float32),
        torch.zeros(2, 4, dtype=torch.float32).t(),
        torch.zeros(4, 4, dtype=torch.float32)[:, :3],
        torch.zeros(13, dtype=torch.float32)[1:].view(4, 3),
        torch.zeros(4, 3, dtype=torch.int32),
    ],
)
def test_a_tensor_of_another_signature_is_not_taken(other: torch.Tensor):
    started: list[object] = []
    kernel = SimpleNamespace(packed_metadata=(), function=0, run=lambda *given: started.append(given))
    like = torch.zeros(4, 3)
    recording = Recording([like], 0)
    recording.launched(kernel, 1, FUNCTION, (like, like, (), 1, 1), {})
    found = recording.finish([like])
    assert found is not None
    assert found.repeat([torch.zeros(4, 3)]) is not None
    assert found.repeat([other]) is None
    assert len(started) == 1


def test_the_cpu_is_never_repeated():
    calls = []
    for _ in range(3):
        replay.repeated("key", [torch.ones(1)], torch.device("cpu"), lambda recording: calls.append(recording) or [])
    assert calls == [None, None, None]


def test_nothing_keeps_a_calls_tensors_alive():
    """Without the garbage collector: a gradient that somebody else holds is copied by autograd, and memory grows."""
    case = next(case for case in CASES if case.name == "documents")
    inputs = make_inputs(case, torch.float32)
    gc.disable()
    try:
        call = launch.Call(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes)
        alive = weakref.ref(call)
        del call
        assert alive() is None
        recording = Recording([inputs.query], 0)
        scratch = torch.empty(2)
        recording.allocated(scratch)
        assert recording.finish([scratch]) is not None
        gone = weakref.ref(scratch)
        del scratch
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["causal", "window", "plain_gqa", "documents", "padding", "causal_additive", "softcap"])
def test_repeated_calls_on_a_gpu_are_right(name: str):
    """Fresh tensors at every call; the third and later calls are repeats."""
    case = next(case for case in CASES if case.name == name)
    assert replay.available()
    replay._replays.clear()
    for attempt in range(5):
        torch.manual_seed(attempt)
        inputs = make_inputs(case, torch.float16, device="cuda")
        out, gradients = run_kernels(case, inputs)
        reference, reference_gradients = dense_attention(case, inputs, torch.float64)
        for mine, best in zip([out, *gradients], [reference, *reference_gradients], strict=True):
            torch.testing.assert_close(mine.double(), best.double(), atol=2e-2, rtol=2e-2)
    assert any(found is not None for found in replay._replays.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_tensor_as_key_and_value_is_not_confused():
    case = next(case for case in CASES if case.name == "plain")
    x = [torch.randn(1, 2, 64, 32, device="cuda", dtype=torch.float16) for _ in range(6)]
    for q, k, v in ((x[0], x[1], x[1]), (x[0], x[2], x[2]), (x[0], x[3], x[4]), (x[0], x[4], x[5]), (x[0], x[5], x[1])):
        out, _ = launch.forward(case.spec, q, k, v, [], [])
        scores = launch.Call(case.spec, q, k, v, [], [])
        assert scores.B == 1
        weights = _weights(case, q, k)
        torch.testing.assert_close(out.double(), weights @ v.double(), atol=1e-2, rtol=1e-2)


def _weights(case, q, k):
    from flashfuse.ir.score_program import evaluate

    raw = q.double() @ k.double().mT
    (final,) = evaluate(case.spec.score, lambda statement, _operands: raw if statement.op == "score" else None)
    return final.softmax(-1)
