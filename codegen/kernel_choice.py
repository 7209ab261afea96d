"""Which kernels the user asked for: `options={"kernel": ...}`, noted for each spec while its graph is compiled."""

from __future__ import annotations

_asked: dict[str, str] = {}
_edited: set[str] = set()  # keys of specs whose portable kernels somebody wrote himself


def ask(spec_key: str, kernel: str) -> None:
    """From now on calls of the spec take "auto", "portable" or "hopper" kernels; the last word counts."""
    _asked[spec_key] = kernel


def note_edited(spec_key: str) -> None:
    """The spec's portable kernels are somebody's own: "auto" means them from now on."""
    _edited.add(spec_key)


def asked(spec_key: str) -> str:
    """What was asked for; without a word "portable" for kernels that were edited, else "auto"."""
    said = _asked.get(spec_key, "auto")
    return "portable" if said == "auto" and spec_key in _edited else said


def known() -> tuple[str, ...]:
    """The keys of all specs that a word was said about: of every attention that was compiled."""
    return tuple(_asked)
