"""The Hopper forward: compiled here without a GPU, run on one by `pytest -m gpu tests/codegen/test_hopper.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, pair_bias
from specs import Case, Program, dense_attention, make_inputs
from test_gpu import BIG, order_id

from flashfuse.codegen import hopper, hopper_check, hopper_order, hopper_tiles, kernel_choice, launch, load, ptxas
from flashfuse.codegen.descriptors import describable
from flashfuse.codegen.hopper_tiles import SMALL_TILES, TILES, Dims, HopperTile, draws, kind_of, parts, row_of
from flashfuse.codegen.order import Order
from flashfuse.ir.attention_spec import AttentionSpec, EmptyRows
from flashfuse.ir.score_ops import Kind

SCRIPT = Path(__file__).parent / "compile_hopper.py"
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")


# ------------------------------------------------------------------------------------------------ without a GPU


@pytest.mark.skipif(bool(hopper.missing()), reason="this Triton has another Gluon")
def test_softmax_stands_under_a_product(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"FLASHFUSE_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    wanted = {"causal_d64": 3, "causal_window_d64": 3, "plain_d128": 2, "causal_d192": 2, "causal_d256": 2,
              "causal_dropout_d64": 3, "bias_d64": 2}  # fmt: skip  # consumers
    compiled = ("64:causal", "64:window", "128:plain", "192x128:causal", "256:causal", "64:dropout", "64:bias:1")
    command = [sys.executable, str(SCRIPT), "bf16", *compiled]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert list(reports) == [f"flashfuse_hopper_forward_{name}" for name in wanted]
    for name, consumers in wanted.items():
        report = reports[f"flashfuse_hopper_forward_{name}"]
        assert report["shared"] <= 227 * 1024, report
        assert report["spilled"] <= hopper._MOST_SPILLED, report
        assert not report["advisories"], report
        assert report["overlaps"] == consumers, report
        assert not report["slow_casts"], report
    assert reports["flashfuse_hopper_forward_bias_d64"]["loads_ahead"] >= 2


def test_ptxas_tells_of_serialised_products() -> None:
    said = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\n"
    said += "ptxas info    : Used 168 registers\n    8 bytes stack frame, 640 bytes spill stores, 4 bytes spill loads\n"
    assert ptxas.parsed(said) == ptxas.PtxasReport(168, 640, (said.splitlines()[0].removeprefix("ptxas info    : "),))


def test_what_tma_cannot_read() -> None:
    tensor = torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16)
    assert describable(tensor)
    assert describable(tensor.transpose(1, 2))
    assert describable(tensor[:1])  # the stride of one element is never used
    assert not describable(tensor[..., 1:])
    assert not describable(tensor[:, :1].expand(2, 4, 64, 64))
    assert not describable(torch.zeros(2, 4, 64, 65, dtype=torch.bfloat16)[..., :64])
    assert not describable(tensor[:0])


def a_call(**facts: object) -> launch.Call:
    return SimpleNamespace(**facts)  # type: ignore[return-value]


class ShownAsCuda(torch.Tensor):
    is_cuda = True


def test_sections_divide_the_heads_and_fit_the_cache() -> None:
    for heads in (1, 7, 12, 32, 128):
        for bytes_a_head in (1 << 18, 1 << 20, 1 << 25):
            number = hopper_order.heads_that_fit(heads, bytes_a_head)
            assert heads % number == 0
            assert number == 1 or number * bytes_a_head <= hopper_order.L2_BYTES
    call = a_call(masked=False, B=1, H=8, G=8, N=512, D=64, E=64, key=torch.zeros(1, dtype=torch.bfloat16))
    assert hopper.section(call, TILES[(64, 64)][0], 132) == 1


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192, 16384, 32768])
def test_sections_load_all_programs_evenly(head_dim: int, length: int) -> None:
    heads, tile, programs = max(16384 // length, 1) * 2048 // head_dim, TILES[(head_dim, head_dim)][0], 132
    call = a_call(masked=True, B=1, H=heads, G=heads, M=length, N=length, D=head_dim, E=head_dim,
                  key=torch.zeros(1, dtype=torch.bfloat16))  # fmt: skip
    number = hopper.section(call, tile, programs)
    assert heads % number == 0
    load = hopper_order.evenness(heads, number, -(-length // tile.block_m), programs, tile.block_m / tile.block_n)
    assert load > 0.92
    assert number * length * 4 * head_dim <= 2 * hopper_order.L2_BYTES


def test_sections_in_step_with_the_programs_would_be_uneven() -> None:
    assert hopper_order.evenness(64, 8, 16, 132, 2) < 0.7  # 128 tiles a section: head dim 256, 2048 keys
    assert hopper_order.heads_of_section(64, 2 << 20, 16, 132, 2) == 2


def test_kinds_of_specs_have_tiles_of_their_own() -> None:
    specs = {case.name: case.spec for case in CASES}
    names = ("plain", "causal", "window", "chunks", "documents", "documents_causal", "padding", "padding_zero", "dropout")
    kinds = {name: kind_of(specs[name]) for name in names if kind_of(specs[name])}
    assert kinds == {"window": "window", "chunks": "window", "dropout": "dropout",
                     "documents": "documents", "documents_causal": "documents"}  # fmt: skip
    assert row_of(specs["window"], (64, 64)) == ((64, 64), SMALL_TILES[(64, 64)])
    assert row_of(specs["causal"], (64, 64)) == ((64, 64), TILES[(64, 64)])
    assert row_of(specs["window"], (192, 128)) == ((192, 128), TILES[(192, 128)])  # no row of its own
    assert row_of(specs["window"], (320, 64)) == ((320, 64), ())


def test_a_bias_of_each_element_is_left_to_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that was found faster; a table by distance, a vector of keys and a mask's elements are no such bias."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(hopper, "missing", lambda: "reached")

    def refusal(spec: AttentionSpec, head_dim: int, eager: bool = False) -> str:
        query = torch.zeros(1, 2, 512, head_dim, dtype=torch.bfloat16).as_subclass(ShownAsCuda)
        tensors = dict.fromkeys(("query", "key", "value"), query)
        facts = {"padded": (head_dim, head_dim), "D": head_dim, "E": head_dim, "B": 1, "H": 2, "M": 512, "N": 512}
        return hopper.refusal(a_call(spec=spec, **tensors, **facts), eager=eager)

    p = Program()
    by_element = p.s + p.capture("bias", Kind.FLOAT, p.zero, p.h, p.m, p.n)
    looked_up = p.load(p.declare("table", Kind.FLOAT, 1), p.load(p.declare("index", Kind.INT, 2), p.m, p.n))
    for score in (by_element, p.s + looked_up):
        spec = p.spec(score, EmptyRows.EXACT)
        assert spec.reads_elements
        assert refusal(spec, 64) == "with a bias of its own for each element it was found slower"
        assert refusal(spec, 64, eager=True) == refusal(spec, 128) == "reached"
    q = Program()
    by_distance = q.s + q.capture("table", Kind.FLOAT, q.h, (q.n - q.m) + (q.M - 1))
    by_key = q.s + q.capture("bias", Kind.FLOAT, q.b, q.n)
    masked = q.masked(q.load(q.declare("keep", Kind.BOOL, 2), q.m, q.n), q.s, float("-inf"))
    for score in (q.s, by_distance, by_key, masked):
        spec = q.spec(score, EmptyRows.EXACT)
        assert not spec.reads_elements
        assert refusal(spec, 64) == "reached"


def test_kinds_serve_where_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {case.name: case.spec for case in CASES}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(hopper, "missing", lambda: "reached")
    query = torch.zeros(1, 2, 512, 64, dtype=torch.bfloat16).as_subclass(ShownAsCuda)
    tensors = dict.fromkeys(("query", "key", "value"), query)
    facts = {**tensors, "padded": (64, 64), "D": 64, "E": 64, "B": 1, "H": 2, "M": 512, "N": 512}
    window, documents = (a_call(spec=specs[name], **facts) for name in ("window", "documents"))
    monkeypatch.setattr(hopper, "SERVED", frozenset())
    assert hopper.refusal(window) == "with its window it was not found faster"
    assert hopper.refusal(window, eager=True) == "reached"
    monkeypatch.setattr(hopper, "SERVED", frozenset({("window", (64, 64))}))
    assert hopper.refusal(window) == "reached"
    assert hopper.refusal(documents) == "with its documents it was not found faster"
    assert hopper.refusal(a_call(spec=specs["padding"], **facts)) == "reached"
    assert hopper.refusal(a_call(spec=specs["sinks_window"], **facts)) == "its ranges of keys have gaps"


def test_what_serves_is_what_doctor_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_tiles, "SERVED", frozenset({("window", (64, 64)), ("dropout", (192, 128))}))
    found = hopper_tiles.serving()
    assert {(tile, dims) for tile, dims, dropout in found if not dropout} >= {
        (tile, dims) for dims, tiles in TILES.items() for tile in tiles
    } | {(tile, (64, 64)) for tile in SMALL_TILES[(64, 64)]}
    assert [facts[:2] for facts in found if facts[2]] == [(tile, (192, 128)) for tile in TILES[(192, 128)]]


def test_head_dims_are_sums_of_powers_of_two() -> None:
    assert {dim: parts(dim) for dim in (33, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257)} == {
        33: (64,), 64: (64,), 65: (64, 32), 96: (64, 32), 97: (128,), 128: (128,),
        129: (128, 64), 192: (128, 64), 193: (256,), 256: (256,), 257: (256, 128),
    }  # fmt: skip
    assert row_of(next(case for case in CASES if case.name == "plain").spec, (96, 64))[0] == (96, 96)


@pytest.mark.parametrize("table", [TILES, SMALL_TILES], ids=["usual", "small"])
def test_tiles_fit_a_multiprocessor(table: dict[Dims, tuple[HopperTile, ...]]) -> None:
    for (D, E), tiles in table.items():
        for tile in tiles:
            queries = tile.queries * tile.block_m * D + tile.staged * tile.block_m * E
            assert 2 * (queries + tile.stages * tile.block_n * (D + E)) < 227 * 1024, tile
            warps = 4 * (tile.consumers + 1)
            assert 32 * (warps - 4) * tile.registers + 4 * 32 * 24 <= 65536 // warps // 32 // 8 * 8 * 32 * warps, tile


def test_a_tile_that_fails_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_passed_over", {})
    monkeypatch.setattr(hopper, "_failed", {})
    spec = next(case for case in CASES if case.name == "window").spec
    call, other = a_call(spec=spec, D=64, E=64), a_call(spec=spec, D=128, E=128)
    launched = []

    def fails(call: launch.Call, out: object, stats: object, tile: HopperTile) -> None:
        launched.append(tile)
        raise RuntimeError("out of resources")

    monkeypatch.setattr(hopper, "launch", fails)
    for _tile in SMALL_TILES[(64, 64)]:
        assert (spec.key, (64, 64)) not in hopper._failed
        assert not hopper.forward(call, torch.zeros(0), torch.zeros(0))
    assert launched == list(SMALL_TILES[(64, 64)])
    assert "out of resources" in hopper._failed[(spec.key, (64, 64))]
    assert hopper.tile_of(other) is SMALL_TILES[(128, 128)][0]


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_the_checked_specs_are_sound(dropout: bool) -> None:
    spec = hopper_check.window_spec(dropout)
    spec.verify()
    assert kind_of(spec) == ("dropout" if dropout else "window")
    assert draws(spec) == dropout


def test_short_causal_attention_is_left_to_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """At head dim 64, where it was found faster up to 2048 keys; a mask that all queries see alike makes no short tiles."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(hopper, "missing", lambda: "reached")
    specs = {case.name: case.spec for case in CASES}

    def refusal(name: str, length: int, head_dim: int, eager: bool = False) -> str:
        query = torch.zeros(1, 2, length, head_dim, dtype=torch.bfloat16).as_subclass(ShownAsCuda)
        tensors = dict.fromkeys(("query", "key", "value"), query)
        facts = {"padded": (head_dim, head_dim), "D": head_dim, "E": head_dim, "B": 1, "H": 2, "M": length, "N": length}
        return hopper.refusal(a_call(spec=specs[name], **tensors, **facts), eager=eager)

    assert refusal("causal", 2048, 64) == refusal("softcap", 512, 64) == "few keys or queries"
    assert refusal("causal", 2049, 64) == refusal("causal", 512, 128) == refusal("causal", 512, 64, eager=True) == "reached"
    assert refusal("plain", 512, 64) == refusal("padding", 512, 64) == "reached"


def test_programs_that_take_long_to_compile_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(hopper, "missing", lambda: "reached")
    specs = {case.name: case.spec for case in CASES}
    query = torch.zeros(1, 2, 512, 64, dtype=torch.bfloat16).as_subclass(ShownAsCuda)
    for name, expected in (("sin_cos_erf", "would take long"), ("padding", "reached"), ("plain", "reached")):
        facts = {"query": query, "key": query, "value": query, "spec": specs[name], "padded": (64, 64), "D": 64, "E": 64}
        call = a_call(**facts, B=1, H=2, M=512, N=512)
        assert expected in hopper.refusal(call), name


def test_a_call_off_hopper_is_refused_with_a_reason() -> None:
    case = next(case for case in CASES if case.name == "causal")
    inputs = make_inputs(case, torch.float16)
    call = launch.Call(case.spec, inputs.query, inputs.key, inputs.value, (), ())
    assert not hopper.takes(call)
    assert "compute capability" in hopper.refusal(call)


def test_a_term_of_a_sum_is_left_to_the_kernels_that_give_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(next(case for case in CASES if case.name == "causal_exact").spec, wide=True)
    half = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float16)
    call = SimpleNamespace(spec=spec, query=half, value=half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert hopper.refusal(call) == "its output is float32"  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", ["", "results differ by 3.1"])
def test_the_check_is_made_once_and_remembered(outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(hopper, "_trust", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hopper_check, "identity", lambda *facts: "word")
    monkeypatch.setattr(hopper_check, "fault", lambda *facts: asked.append(facts) or outcome)
    for _process in range(2):
        hopper._trust.clear()
        for _call in range(2):
            if outcome:
                with pytest.warns(UserWarning, match="differ by 3.1") if not hopper._trust else nullcontext():
                    assert outcome in hopper.distrust(torch.device("cuda", 0), TILES[(64, 64)][0], (64, 64))
            else:
                assert hopper.distrust(torch.device("cuda", 0), TILES[(64, 64)][0], (64, 64)) == ""
    assert len(asked) == 1


def test_nothing_is_checked_within_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_trust", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in hopper.distrust(torch.device("cuda", 0), TILES[(64, 64)][0], (64, 64))
    assert not hopper._trust


def test_remembered_text_lies_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    assert load.remembered("name.txt", lambda: "first") == "first"
    assert load.remembered("name.txt", lambda: "second") == "first"
    assert (tmp_path / "answers" / "name.txt").read_text() == "first"


# ------------------------------------------------------------------------------------------------ on a GPU


def forced(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The Hopper forward's result, whatever the size."""
    inputs = make_inputs(case, dtype, device="cuda")
    kernel_choice.ask(case.spec.key, "hopper")
    try:
        call = launch.Call(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes)
        if not hopper.takes(call):
            pytest.skip(hopper.refusal(call, eager=True))
        out = launch.forward(case.spec, inputs.query, inputs.key, inputs.value, inputs.captures, case.sizes)[0]
        assert (case.spec.key, hopper.dims_of(call)) not in hopper._failed, hopper._failed
    finally:
        kernel_choice.ask(case.spec.key, "auto")
    return out


def compare(case: Case, dtype: torch.dtype) -> None:
    """The rule of `test_kernels.compare_with_eager`, for the output."""
    out = forced(case, dtype).double()
    inputs = make_inputs(case, dtype, device="cuda")
    exact, eager = (dense_attention(case, inputs, kind)[0].double() for kind in (case.reference, dtype))
    assert torch.equal(out.isnan(), exact.isnan())
    out, exact, eager = (tensor.nan_to_num(0.0) for tensor in (out, exact, eager))
    rounding = torch.finfo(dtype).eps * 0.25 * exact.abs().max() + 1e-6
    assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_program_within_twice_the_error_of_eager(case: Case, head_dim: int) -> None:
    compare(dataclasses.replace(case, shape=(*case.shape[:5], head_dim, head_dim)), torch.bfloat16)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (96, 96), (128, 64), (192, 128), (192, 192), (192, 256), (256, 128),
                                       (256, 256)],
                         ids=lambda dims: "{}x{}".format(*dims))  # fmt: skip
@pytest.mark.parametrize("name", sorted(BIG))
def test_several_tiles_within_twice_the_error_of_eager(name: str, head_dims: tuple[int, int]) -> None:
    case = next(case for case in CASES if case.name == name)
    compare(dataclasses.replace(case, shape=(*BIG[name][:5], *head_dims)), torch.float16)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", ["plain", "causal", "window", "chunks", "softcap", "alibi", "dropout", "sinks_causal"])
def test_lengths_that_blocks_divide(name: str, head_dim: int) -> None:
    case = next(case for case in CASES if case.name == name)
    compare(dataclasses.replace(case, shape=(4, 2, 1, 640, 640, head_dim, head_dim)), torch.bfloat16)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("length", [640, 611])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("order", [Order(), Order(4, swapped=True), Order(2, swapped=True)], ids=order_id)
def test_batches_that_share_a_bias(order: Order, head_dim: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "order_of", lambda call, heads, size: order)
    compare(pair_bias(length, head_dim), torch.bfloat16)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dims", TILES, ids=lambda dims: "{}x{}".format(*dims))
@pytest.mark.parametrize("table", [TILES, SMALL_TILES], ids=["usual", "small"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_the_check_passes_here(table: dict[Dims, tuple[HopperTile, ...]], dims: Dims, dropout: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for tile in table.get(dims, ()):
        assert hopper_check.fault(device, tile, dims, dropout) == "", tile


@pytest.mark.gpu
@needs_hopper
def test_a_wrong_kernel_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hopper.launch

    def wrong(call: launch.Call, out: torch.Tensor, stats: torch.Tensor, tile: HopperTile, programs: int) -> object:
        compiled = right(call, out, stats, tile, programs)
        out[0, 0, 100] *= 1.5
        return compiled

    monkeypatch.setattr(hopper, "launch", wrong)
    device = torch.device("cuda", torch.cuda.current_device())
    assert "differ" in hopper_check.fault(device, TILES[(64, 64)][0], (64, 64), False)


@pytest.mark.gpu
@needs_hopper
def test_the_same_bits_every_time() -> None:
    case = next(case for case in CASES if case.name == "causal")
    case = dataclasses.replace(case, shape=(2, 8, 8, 1500, 1500, 128, 128))
    first = forced(case, torch.bfloat16)
    for _ in range(250):
        assert torch.equal(forced(case, torch.bfloat16), first)
