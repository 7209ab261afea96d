"""The exceptions that flashfuse raises. A refusal is not an error: see `flashfuse.refusal`."""

from __future__ import annotations


class FlashfuseError(Exception):
    """Base of everything that flashfuse raises on purpose."""


class OptionError(FlashfuseError):
    """An option that does not exist or has a value that it cannot have; the message says what it may be."""


class StrictError(FlashfuseError):
    """With `options={"strict": True}`: an attention was left alone, or flashfuse itself failed."""


class InternalError(FlashfuseError):
    """An invariant of flashfuse does not hold. The backend turns it into a fallback with one warning."""


class UnsupportedError(FlashfuseError):
    """Kernels cannot run on these tensors; the message says why. The operator then runs without them."""
