"""Writes that autograd does not see keep eager's gradients; writes into an attention's result and inputs are not lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

MASK = torch.ones(12, 12, dtype=torch.bool).triu(1)
READS_DATA = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"  # 2.11 cannot trace `.data`: FF104, safely left alone
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def run(function: Callable, inputs: list[Tensor]) -> list[Tensor | None]:
    """The output, the inputs afterwards and the gradients of those that need one."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    out = function(*leaves)
    if out.requires_grad:
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.detach() for leaf in leaves), *(leaf.grad for leaf in leaves)]


def compiled(function: Callable, inputs: list[Tensor]) -> tuple[list[Tensor | None], dict[str, int]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = run(torch.compile(function, backend="flashfuse", options={"inner": "aot_eager"}), inputs)
    return found, dict(torch._dynamo.utils.counters["flashfuse"])


def check(function: Callable, counts: dict[str, int], needs: str = "qkvb") -> None:
    """As eager code, outputs and gradients, with gradients of the inputs in `needs`; what happened to the attention."""
    shapes = [(2, 12, 16)] * 3 + [(2, 12, 12)] * (function.__code__.co_argcount - 3)
    inputs = [torch.randn(shape, requires_grad=name in needs) for name, shape in zip("qkvb", shapes, strict=False)]
    ours, counted = compiled(function, inputs)
    unread = function.__name__.startswith("data") and not READS_DATA
    assert counted == ({} if unread else counts)
    for mine, eager in zip(ours, run(function, inputs), strict=True):
        assert (mine is None) == (eager is None)
        torch.testing.assert_close(mine, eager, atol=2e-5, rtol=1e-4)


def data(q, k, v):
    x = q @ k.mT
    x.data.mul_(0.25)
    return x.softmax(-1) @ v


def data_copied(q, k, v):
    x = q @ k.mT
    x.data.copy_(x.tanh())
    return x.softmax(-1) @ v


def detached_copied(q, k, v):
    """The copied scores give the alias a gradient, which the scores themselves do not get from it."""
    x = q @ k.mT
    x.detach().copy_(x.tanh())
    return x.softmax(-1) @ v


def detached_view(q, k, v):
    x = q @ k.mT
    x.detach()[:, 0:].mul_(0.25)
    return x.softmax(-1) @ v


def data_beside_a_view(q, k, v):
    x = q @ k.mT
    y = x[:, :, :1]
    x.data.mul_(0.25)
    return x.softmax(-1) @ v + y.sum()


def without_grad(q, k, v):
    x = q @ k.mT
    with torch.no_grad():
        x.mul_(0.25)
    return x.softmax(-1) @ v


def data_of_the_query(q, k, v):
    y = q * 1.0
    y.data.mul_(0.25)
    return (y @ k.mT).softmax(-1) @ v


def data_of_the_query_afterwards(q, k, v):
    y = q * 1.0
    o = (y @ k.mT * 0.25).softmax(-1) @ v
    y.data.mul_(2.0)
    return o + y.sum()


def data_of_the_value_afterwards(q, k, v):
    y = v * 1.0
    o = (q @ k.mT * 0.25).softmax(-1) @ y
    y.data.mul_(2.0)
    return o


def data_of_the_bias(q, k, v, b):
    c = b * 1.0
    c.data.tanh_()
    return (q @ k.mT * 0.25 + c).softmax(-1) @ v


def bias_without_grad(q, k, v, b):
    c = b * 1.0
    with torch.no_grad():
        c.tanh_()
    return (q @ k.mT * 0.25 + c).softmax(-1) @ v


def data_of_an_input_afterwards(q, k, v, b):
    o = (q @ k.mT * 0.25 + b).softmax(-1) @ v
    b.data.mul_(2.0)
    return o


def data_of_the_probabilities(q, k, v):
    p = (q @ k.mT * 0.25).softmax(-1)
    p.data.mul_(2.0)
    return p @ v


def exchanged_storage(q, k, v):
    y = q * 1.0
    with torch.no_grad():
        y.set_((y * 0.25).detach())
    return (y @ k.mT).softmax(-1) @ v


UNSEEN = [data, data_copied, detached_copied, detached_view, data_beside_a_view, without_grad, data_of_the_query,
          data_of_the_query_afterwards, data_of_the_value_afterwards, data_of_the_bias, bias_without_grad,
          data_of_an_input_afterwards, data_of_the_probabilities, exchanged_storage]  # fmt: skip


@pytest.mark.parametrize("function", UNSEEN)
def test_an_attention_with_a_write_that_autograd_does_not_see_is_left_alone(function: Callable):
    check(function, {"refused": 1})


@pytest.mark.parametrize("function", [data, detached_copied, data_of_the_query, bias_without_grad, exchanged_storage])
def test_without_gradients_it_is_fused(function: Callable):
    check(function, {"fused": 1}, needs="")


def test_an_input_written_afterwards_is_no_failure():
    """Eager's backward does not read the query, which itself needs no gradient here; the kernel's would."""

    def function(q, k, v):
        o = (q @ k.mT * 0.25).softmax(-1) @ v
        with torch.no_grad():
            q.mul_(2.0)
        return o

    check(function, {"refused": 1}, needs="v")


# ------------------------------------------------------------------------------------------------ near misses


def seen(q, k, v):
    x = q @ k.mT
    x.mul_(0.25)
    return x.softmax(-1) @ v


def seen_in_a_view(q, k, v):
    x = q @ k.mT
    x[:, 0:].mul_(0.25)
    return x.softmax(-1) @ v


def seen_in_the_query(q, k, v):
    y = q * 1.0
    y.mul_(0.25)
    return (y @ k.mT).softmax(-1) @ v


def mask_without_grad(q, k, v):
    with torch.no_grad():
        mask = torch.zeros(12, 12)
        mask.masked_fill_(MASK, -1e9)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


def data_of_a_mask(q, k, v):
    mask = torch.zeros(12, 12)
    mask.data.masked_fill_(MASK, -1e9)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


def cache_without_grad(q, k, v):
    cache = torch.zeros_like(k)
    with torch.no_grad():
        cache.copy_(k)
    return (q @ cache.mT * 0.25).softmax(-1) @ v


def bias_read_before(q, k, v, b):
    c = b * 1.0
    o = (q @ k.mT * 0.25 + c.tanh()).softmax(-1) @ v
    return o + c.mul_(2.0).sum()


@pytest.mark.parametrize(
    "function",
    [seen, seen_in_a_view, seen_in_the_query, mask_without_grad, data_of_a_mask, cache_without_grad, bias_read_before],
)
def test_other_writes_do_not_matter(function: Callable):
    check(function, {"fused": 1})


# ------------------------------------------------------------------------------------------------ the result


def written_result(q, k, v):
    o = (q @ k.mT * 0.25).softmax(-1) @ v
    o.mul_(2.0)
    return o


def written_view_of_the_result(q, k, v):
    o = (q @ k.mT * 0.25).softmax(-1) @ v
    o[:, 1:3].zero_()
    return o


def data_of_the_result(q, k, v):
    o = (q @ k.mT * 0.25).softmax(-1) @ v
    o.data.mul_(2.0)
    return o


def returned_write(q, k, v):
    return ((q @ k.mT * 0.25).softmax(-1) @ v).relu_()


@pytest.mark.parametrize("needs", ["", "qkv"])
@pytest.mark.parametrize("function", [written_result, written_view_of_the_result, data_of_the_result, returned_write])
def test_what_is_written_into_the_result_stays(function: Callable, needs: str):
    """Also where nobody uses what the write returns, and without keeping the original attention for it."""
    check(function, {"fused": 1}, needs=needs)


# ------------------------------------------------------------------------------------------------ wider sources


def widened_and_scattered(q, k, v):
    x = q @ k.mT * 0.25
    return torch.slice_scatter(x, x.float().masked_fill(MASK | (torch.arange(12) < 1)[:, None], LOWEST), 2).softmax(-1) @ v


def filled_and_scattered(q, k, v):
    x = q @ k.mT * 0.25
    return torch.slice_scatter(x, x.masked_fill(MASK | (torch.arange(12) < 1)[:, None], -60000.0), 2).softmax(-1) @ v


@pytest.mark.parametrize("function", [widened_and_scattered, filled_and_scattered])
def test_what_is_scattered_over_scores_has_their_dtype(function: Callable):
    """The first row keeps no key; float32's lowest number is -inf in float16, and its row NaN. -60000 is a number."""
    inputs = [torch.randn(2, 12, 16, dtype=torch.float16) for _ in range(3)]
    ours, counted = compiled(function, inputs)
    assert counted == {"fused": 1}
    assert ours[0].isnan().any() == (function is widened_and_scattered)
    torch.testing.assert_close(ours[0], function(*inputs), atol=2e-3, rtol=2e-3, equal_nan=True)
