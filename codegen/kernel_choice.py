"""Which kernels the user asked for: `options={"kernel": ...}`, noted for each spec while its graph is compiled."""

from __future__ import annotations

_asked: dict[str, str] = {}


def ask(spec_key: str, kernel: str) -> None:
    """From now on calls of the spec take "auto", "portable" or "hopper" kernels; the last word counts."""
    _asked[spec_key] = kernel


def asked(spec_key: str) -> str:
    """What was asked for; "auto" if nothing was."""
    return _asked.get(spec_key, "auto")
