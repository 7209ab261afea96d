"""`explain` as a test in one's own CI: a change that costs a model its fused attention fails, with the line and the reason.

    pytest examples/explain_in_ci.py
"""

from __future__ import annotations

import torch
from sliding_window import Attention

import flashfuse


def test_every_attention_is_fused() -> None:
    report = flashfuse.explain(Attention(64, 4, window=32), torch.randn(2, 128, 64))
    assert not report.refusals, str(report)
    assert len(report.fused) == 1


def test_the_mask_is_what_we_mean() -> None:
    report = flashfuse.explain(Attention(64, 4, window=32), torch.randn(2, 128, 64))
    assert "n <= m and m - n < 32" in str(report)
