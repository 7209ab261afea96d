"""Tuning: the fastest right tile is taken, and kept on disk for the next process; damaged or foreign files are not believed."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from flashfuse.codegen import grids, launch, tuning
from flashfuse.codegen.plan import KernelPlan, Tile, kernel_plan, tuning_candidates

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES
from specs import make_inputs

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter")

SLOW, FAST, WRONG, LARGE = Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 16, 1, 1), Tile(64, 64, 1, 1)


@dataclass
class Bench:
    """A forward whose tiles are timed by a table, and spoilt where a test says so."""

    launched: list[Tile] = field(default_factory=list)
    milliseconds: dict[Tile, float] = field(default_factory=lambda: {SLOW: 2.0, FAST: 1.0, WRONG: 0.1, LARGE: 0.1})
    spoil: Callable[[torch.Tensor], Any] = torch.Tensor.zero_
    timed: int = 0

    def run(self, case_name: str = "causal") -> torch.Tensor:
        case = replace(next(c for c in CASES if c.name == case_name), shape=(1, 2, 2, 20, 20, 16, 16))
        inputs = make_inputs(case, torch.float32)
        self.launched.clear()
        return launch.forward(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes)[0]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Every spec of `causal` is to be tuned, results go to a new folder, and one tile is wrong, another too large."""
    bench, usual, plain_forward = Bench(), kernel_plan(None, 4, 16), grids.forward
    plan = replace(usual, forward=(SLOW, FAST, WRONG, LARGE))

    def forward(call: launch.Call, tile: Tile, out: torch.Tensor, stats: torch.Tensor, *, low: bool) -> Any:
        bench.launched.append(tile)
        if tile == LARGE:
            raise OutOfResources(2, 1, "shared memory")
        compiled = plain_forward(call, tile, out, stats, low=low)
        if tile == WRONG:
            bench.spoil(out)
        return compiled

    def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
        bench.timed += 1
        run()
        return bench.milliseconds[bench.launched[-1]]

    monkeypatch.setattr(grids, "forward", forward)
    monkeypatch.setattr(launch, "kernel_plan", lambda *facts: plan)
    monkeypatch.setattr(launch, "tuning_candidates", getattr)
    monkeypatch.setattr(launch, "_chosen", {})
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "_requested", set())
    monkeypatch.setattr(tuning, "_known", {})
    tuning.request([next(c for c in CASES if c.name == "causal").spec.key])
    return bench


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def forget() -> None:
    """What a new process does not have."""
    tuning._known.clear()
    launch._chosen.clear()


def test_the_fastest_right_tile_is_taken_and_kept(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = bench.run()
    assert bench.launched[-1] == FAST
    assert bench.timed == 2
    assert "gives another result" in caplog.text
    second = bench.run()
    assert bench.launched == [FAST]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert bench.timed == 2
    forget()
    bench.run()
    assert bench.launched == [FAST]  # from the disk
    assert bench.timed == 2
    (file,) = files(tmp_path)
    assert json.loads(file.read_text())["key"]["kernel"] == "forward"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out.mul_(1.001),
        lambda out: out[..., -1, :].fill_(float("nan")),
        lambda out: out[0, 0, 0].fill_(float("inf")),
        lambda out: out.fill_(float("nan")),
    ],
    ids=["a little", "a row", "infinite", "unwritten"],
)
def test_a_wrong_candidate_is_rejected(bench: Bench, spoil: Callable[[torch.Tensor], Any]) -> None:
    bench.spoil = spoil
    bench.run()
    assert bench.launched[-1] == FAST


def test_a_right_candidate_with_other_rounding_is_taken(bench: Bench) -> None:
    bench.spoil = lambda out: out.mul_(1 + 2**-20)
    bench.run()
    assert bench.launched[-1] == WRONG


def test_no_gain_no_change(bench: Bench) -> None:
    bench.milliseconds[FAST] = 1.99
    bench.run()
    assert bench.launched[-1] == SLOW


def test_candidates_that_spill_are_not_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "spills", lambda compiled: 60 if bench.launched[-1] == FAST else 0)
    bench.run()
    assert bench.launched[-1] == SLOW


def test_only_what_was_asked_for_is_tuned(bench: Bench, tmp_path: Path) -> None:
    bench.run("plain_gqa")
    assert bench.launched == [SLOW]
    assert not bench.timed
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"key": 1}',
        lambda text: text.replace('"block_m": 16', '"block_m": 4096'),  # no candidate
        lambda text: text.replace('"warps"', '"wraps"'),
        lambda text: text.replace('"triton": "', '"triton": "0'),  # of another version, under this one's name
    ],
)
def test_a_damaged_file_is_as_good_as_none(bench: Bench, tmp_path: Path, damage: Callable[[str], str]) -> None:
    bench.run()
    (file,) = files(tmp_path)
    intact = file.read_text()
    file.write_text(damage(intact))
    assert file.read_text() != intact
    forget()
    bench.run()
    assert bench.timed == 4
    assert bench.launched[-1] == FAST
    assert json.loads(file.read_text()) == json.loads(intact)


@pytest.mark.parametrize("what", ["torch", "triton", "text", "device"])
def test_another_version_tunes_anew(bench: Bench, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    forget()
    key_of = tuning.key_of
    monkeypatch.setattr(tuning, "key_of", lambda *given: {**key_of(*given), what: "another"})
    bench.run()
    assert bench.timed == 4
    assert len(files(tmp_path)) == 2


def test_lengths_share_results(bench: Bench) -> None:
    case = next(c for c in CASES if c.name == "causal")
    keys = []
    for length in (33, 64, 65):
        q = torch.zeros(2, 2, length, 16)
        call = launch.Call(case.spec, q, q, q, [], case.sizes)
        keys.append(tuning.key_of(call, "forward", "tf32"))
    assert keys[0] == keys[1] != keys[2]
    turned = torch.zeros(2, 64, 2, 16).transpose(1, 2)
    call = launch.Call(case.spec, turned, turned, turned, [], case.sizes)
    assert tuning.key_of(call, "forward", "tf32") != keys[1]


def test_processes_may_write_at_the_same_time(bench: Bench, tmp_path: Path) -> None:
    key: tuning.Key = {"kernel": "forward", "N": 64}
    tiles = [Tile(16 * size, 16, 1, 1) for size in range(1, 9)]
    failures: list[object] = []

    def work(tile: Tile) -> None:
        for _ in range(50):
            tuning._keep(key, tile, {str(tile): 1.0})
            found = tuning._read(tmp_path / f"{tuning._name(key)}.json", key)
            if found not in tiles:
                failures.append(found)

    threads = [threading.Thread(target=work, args=(tile,)) for tile in tiles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(files(tmp_path)) == 1  # no temporary file is left


def test_a_folder_that_cannot_be_written(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path / "file")
    bench.run()
    bench.run()
    assert bench.launched == [FAST]


def test_gradients_are_tuned_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "row_and_column")
    inputs = make_inputs(case, torch.float32)
    tensors, needs = (inputs.query, inputs.key, inputs.value), case.needs
    out, stats = launch.forward(case.spec, *tensors, inputs.captures, case.sizes)

    def gradients() -> list[torch.Tensor]:
        return launch.backward(case.spec, inputs.grad_out, *tensors, out, stats, inputs.captures, case.sizes, needs)

    expected = gradients()
    usual = kernel_plan(None, 4, 16)
    split = replace(usual.grad_key_value[0], split=True)
    plan = replace(usual, grad_query=(*usual.grad_query, WRONG), grad_key_value=(*usual.grad_key_value, split))
    monkeypatch.setattr(launch, "kernel_plan", lambda *facts: plan)
    taken: list[tuple[str, Tile]] = []
    monkeypatch.setattr(tuning, "_keep", lambda key, tile, times: taken.append((str(key["kernel"]), tile)))
    times = iter((2.0, 1.0, 2.0, 1.0))
    monkeypatch.setattr(tuning, "milliseconds", lambda run, device: next(times))
    tuning.request([case.spec.key])
    for mine, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    assert taken == [("grad_query", WRONG), ("grad_key_value", split)]


def test_every_plan_has_candidates_of_its_own() -> None:
    plan: KernelPlan = kernel_plan((9, 0), 2, 128)
    for kernel in ("forward", "grad_query", "grad_key_value"):
        candidates = tuning_candidates(plan, kernel)
        assert candidates[0] == getattr(plan, kernel)[0]
        assert 4 <= len(candidates) == len(set(candidates)) <= 10
