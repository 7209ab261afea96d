"""Range tables as nodes of the graph: one for all layers that share a mask, and for their backward. In the interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from flashfuse import attention_op
from flashfuse.backend import flashfuse
from flashfuse.block_ranges import run_block_ranges, wants_table
from flashfuse.errors import UnsupportedError
from flashfuse.inductor_lowerings import register_lowerings
from flashfuse.ir.attention_spec import AttentionSpec, Capture
from flashfuse.ir.block_table import BLOCK
from flashfuse.ir.score_builder import Builder
from flashfuse.ir.score_ops import Kind

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="triton was imported for the device"),
    pytest.mark.filterwarnings("ignore:flashfuse. the:UserWarning"),
]
B, H, S, D = 1, 1, 20, 8
LENGTHS = torch.tensor([13])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FLASHFUSE_INTERPRET", "1")
    monkeypatch.setenv("FLASHFUSE_STRICT", "1")
    monkeypatch.setattr(attention_op, "_warned", set())
    monkeypatch.setattr(attention_op, "_failed", {})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    from flashfuse.codegen.launches import Launches

    counts: Counter[str] = Counter()
    original = Launches.start

    def start(self: Launches, kernel: str, *positional: Any, **named: Any) -> Any:
        counts[kernel] += 1
        return original(self, kernel, *positional, **named)

    monkeypatch.setattr(Launches, "start", start)
    return counts


@pytest.fixture
def without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables by their kernels, attention in torch: the interpreter is slow."""
    from flashfuse.codegen import launch

    def forward(*given: Any) -> Any:
        tables = [each for each in given if isinstance(each, Tensor) and each.dtype is torch.int32]
        assert len(tables) == 1, "the call got no table"
        raise UnsupportedError("as the test wants it")

    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(launch, "backward", forward)


Score = Callable[[Tensor, Tensor], Tensor]


def padded(scores: Tensor, padding: Tensor) -> Tensor:
    return scores.masked_fill(~padding[:, None, None, :], float("-inf"))


class Layer(nn.Module):
    """Self-attention whose scores go through `score(scores, padding)`."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.project = nn.Linear(H * D, 3 * H * D)
        self.score = score

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        query, key, value = self.project(x).view(x.shape[0], x.shape[1], 3, H, D).permute(2, 0, 3, 1, 4)
        scores = self.score(query @ key.transpose(-2, -1) / D**0.5, padding)
        return x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Layers one behind another; `between` happens to the padding after each."""

    def __init__(self, *scores: Score, again: bool = False, between: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(score) for score in scores)
        self.again, self.between = again, between

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, padding, use_reentrant=False) if self.again else layer(x, padding)
            if self.between is not None:
                self.between(padding)
        return x


def check(model: nn.Module, length: int = S, compiled: nn.Module | None = None, grad: bool = True) -> nn.Module:
    """Compile with flashfuse and compare the output and the input's gradient with eager code in float64."""
    if compiled is None:
        compiled = torch.compile(model, backend=flashfuse, options={"inner": "aot_eager"}, fullgraph=True)
    x = torch.randn(B, length, H * D, requires_grad=grad)
    padding = torch.arange(length)[None, :] < LENGTHS.clamp(max=length)[:, None]
    found: list[list[Tensor]] = []
    for run, dtype in ((compiled, torch.float32), (model, torch.float64)):
        model.to(dtype)
        own = x.detach().to(dtype).requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            out = run(own, padding.clone())
        found.append([out.detach()])
        if grad:
            found[-1] += torch.autograd.grad(out.square().sum(), own)
    model.to(torch.float32)
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
    return compiled


def test_four_layers_make_one_table_for_both_directions(started: Counter[str]) -> None:
    check(Stack(*[padded] * 4))
    assert started["flashfuse_forward"] >= 4
    assert started["flashfuse_grad_key_value"] == 4
    assert started["flashfuse_grad_query"] >= 4
    assert started["flashfuse_block_table"] == started["flashfuse_block_bounds"] == 1


@pytest.mark.usefixtures("without_attention")
def test_scores_may_differ_but_masks_may_not(started: Counter[str]) -> None:
    def capped(scores: Tensor, padding: Tensor) -> Tensor:
        return padded(5 * torch.tanh(scores / 5), padding)

    def causal(scores: Tensor, padding: Tensor) -> Tensor:
        position = torch.arange(scores.shape[-1])
        return padded(scores, padding).masked_fill(position[None, :] > position[:, None], float("-inf"))

    check(Stack(padded, capped, causal, capped, causal), grad=False)
    assert started["flashfuse_block_table"] == 2


@pytest.mark.usefixtures("without_attention")
def test_a_mask_that_was_written_is_another_mask(started: Counter[str]) -> None:
    check(Stack(padded, padded, between=lambda padding: padding[:, 5:9].fill_(False)), grad=False)
    assert started["flashfuse_block_table"] == 2


@pytest.mark.usefixtures("without_attention")
def test_checkpointing_makes_it_again(started: Counter[str]) -> None:
    check(Stack(padded, padded, again=True))
    assert 1 <= started["flashfuse_block_table"] <= 4  # each region may make its own, and again


@pytest.mark.usefixtures("without_attention")
def test_lengths_may_be_symbolic(started: Counter[str]) -> None:
    model = Stack(padded, padded)
    compiled = torch.compile(model, backend=flashfuse, options={"inner": "aot_eager"}, dynamic=True)
    for length in (S, 17):
        started.clear()
        check(model, length, compiled)
        assert started["flashfuse_block_table"] == 1


def test_cpu_graphs_have_none(started: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHFUSE_INTERPRET")
    seen: list[Any] = []
    monkeypatch.setattr("flashfuse.block_ranges.run_block_ranges", lambda *given: seen.append(given))
    check(Stack(padded), grad=False)
    assert not started
    assert not seen


def spec_of_padding() -> AttentionSpec:
    b = Builder()
    keep = b.leaf("index", "n") < b.leaf("load", 0, Kind.INT, [b.leaf("index", "b")])
    keep = keep & b.leaf("load", 1, Kind.BOOL, [b.leaf("index", "n")])
    score = b.op("where", keep, b.leaf("score"), float("-inf"))
    return AttentionSpec(b.program(score), (Capture("lengths", Kind.INT, 1), Capture("real", Kind.BOOL, 1)))


def test_few_queries_want_none() -> None:
    assert wants_table(spec_of_padding(), CPU, 17)
    assert not wants_table(spec_of_padding(), CPU, 16)  # the keys are split over programs instead


def test_operator() -> None:
    arguments = ([torch.tensor([40, 25]), torch.arange(40) < 33], [], [2, H, 40, 40], spec_of_padding().to_text(), CPU)
    torch.library.opcheck(torch.ops.flashfuse.block_ranges, arguments)
    table = torch.ops.flashfuse.block_ranges(*arguments)
    assert table.shape == (2, 1, 2 * -(-40 // BLOCK), 6)
    assert table[0, 0].tolist() == [[0, 40, 0, 32, 0, 0]] * 2 + [[0, 40, 0, 40, 0, 0], [0, 40, 0, 0, 0, 0]]
    assert table[1, 0].tolist() == [[0, 32, 0, 0, 0, 0]] * 2 + [[0, 40, 0, 0, 0, 0], [40, 0, 0, 0, 0, 0]]


def test_compiled_code_calls_it_directly(started: Counter[str]) -> None:
    assert register_lowerings()
    text = spec_of_padding().to_text()

    def tables(lengths: Tensor, real: Tensor) -> Tensor:
        return torch.ops.flashfuse.block_ranges([lengths, real], [], [B, H, S, real.shape[0]], text, CPU)

    given = (LENGTHS, torch.arange(S) < 9)
    found, code = run_and_get_code(torch.compile(tables, fullgraph=True), *given)
    torch.testing.assert_close(found, tables(*given))
    assert "= flashfuse_run_block_ranges(" in code[0]
    assert started["flashfuse_block_table"] == 2


def test_without_kernels_everything_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHFUSE_INTERPRET")
    table = run_block_ranges([LENGTHS, torch.arange(S) < 3], [], [B, H, S, 9], spec_of_padding().to_text(), CPU)
    assert table.unique(dim=2).tolist() == [[[[0, 9, 0, 0, 0, 0], [0, S, 0, 0, 0, 0]]]] * B
