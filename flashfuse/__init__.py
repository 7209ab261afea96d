"""flashfuse: `torch.compile(model, backend="flashfuse")` runs every softmax(QK^T)V as a generated flash attention kernel.

Nothing needs to be imported to use the backend. `flashfuse.explain(model, *args)` tells what it does with a model.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "explain"]


def __getattr__(name: str) -> Any:
    if name in ("explain", "Report"):
        from flashfuse import report

        return getattr(report, name)
    raise AttributeError(f"module 'flashfuse' has no attribute {name!r}")
