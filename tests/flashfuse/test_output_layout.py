"""Outputs lie in memory as eager's do, so that what a model does with them by `view` or `as_strided` is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

B, H, M, N, D, E = 2, 3, 5, 7, 8, 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1)


def viewed_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Einsum's result lies heads first; only so can it be viewed like this."""
    return torch.einsum("bhmn,bhne->bmhe", probabilities(q, k), v).transpose(1, 2).view(B, H, M * E)


def heads_outermost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhmn,bhne->hbme", probabilities(q, k), v)


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values before queries, which no layout of the op is."""
    return (v.mT @ probabilities(q, k).mT).view(B, -1)


def read_by_strides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.as_strided(torch.einsum("bhmn,bhne->mbhe", probabilities(q, k), v), (B * H * M * E,), (1,)) + 0


def groups_and_queries_alike(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the two axes that only the queries have the longer one is taken for the queries."""
    q, k, v = q[:, None, :, :2], k[:, :1, None], v[:, :1, None]
    out = (probabilities(q, k) @ v).reshape(B, H, 2, E)
    return out.view(-1).mul(0.5)


def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhmn,bhne->bmhe", probabilities(q, k), v).reshape(B, M, H * E)


def transposed_and_copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (probabilities(q, k) @ v).transpose(1, 2).contiguous()


def copied_and_kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = probabilities(q, k) @ v
    return out.transpose(1, 2).contiguous(), out


def cloned_as_it_is(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (probabilities(q, k) @ v).transpose(1, 2).clone()


def logsumexp_in_its_own_order(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bhmd,bhnd->bmhn", q, k)
    return torch.einsum("bmhn,bhne->bmhe", scores.softmax(-1), v), scores.logsumexp(-1)


FORMS = [viewed_back, heads_outermost, turned, read_by_strides, groups_and_queries_alike, copied, transposed_and_copied,
         copied_and_kept, cloned_as_it_is, logsumexp_in_its_own_order]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_outputs_lie_as_eager_ones(form: Callable, dynamic: bool) -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((B, H, M, D), (B, H, N, D), (B, H, N, E))]
    function = torch.compile(form, backend="flashfuse", options={"inner": "aot_eager"}, dynamic=dynamic)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            wanted, found = ([*each] if isinstance(each, tuple) else [each] for each in (form(*leaves), function(*leaves)))
        assert [each.stride() for each in found] == [each.stride() for each in wanted]
        if gradients:
            wanted += torch.autograd.grad(sum(each.sin().sum() for each in wanted), leaves)
            found += torch.autograd.grad(sum(each.sin().sum() for each in found), leaves)
        torch.testing.assert_close(found, wanted)
    assert torch._dynamo.utils.counters["flashfuse"]["refused"] == 0


def kernels_layout(form: Callable, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which layout the op was asked for its result."""
    from flashfuse.patterns import attention

    asked, read = [], attention.out_layout
    monkeypatch.setattr(attention, "out_layout", lambda *facts: asked.append(read(*facts)) or asked[-1])
    torch.compile(form, backend="flashfuse", options={"inner": "aot_eager"})(
        *(torch.randn(shape) for shape in ((B, H, M, D), (B, H, N, D), (B, H, N, E)))
    )
    (layout, _view, order), *_ = asked
    return layout if order is None else f"{layout}, copied"


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        (copied, "bmhe"),
        (transposed_and_copied, "bmhe"),
        (copied_and_kept, "bhme"),
        (cloned_as_it_is, "bhme"),
        (turned, "bhme, copied"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_copy_that_follows_is_saved(form: Callable, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_layout(form, monkeypatch) == layout
