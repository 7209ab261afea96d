"""What a user may set: `torch.compile(model, backend="flashfuse", options={...})` and a few environment variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashfuse.errors import OptionError

Inner = str | Callable[..., Any]
INNER_NAMES = ("inductor", "aot_eager", "eager")
SDPA_CHOICES = ("auto", "always", "never")
KERNEL_CHOICES = ("auto", "portable", "hopper")


@dataclass(frozen=True)
class Options:
    """Validated options.

    inner: what compiles the rewritten graph: "inductor" (default), "aot_eager", "eager", or a backend callable.
    strict: raise StrictError where an attention is left alone or flashfuse itself fails (also FLASHFUSE_STRICT=1).
    sdpa: what to do with F.scaled_dot_product_attention: "auto" takes only calls with a mask that can be computed from
        positions and vectors, "always" every call that is understood, "never" none.
    kernel: "portable" kernels run wherever Triton does, "hopper" ones on compute capability 9.0; "auto" takes those where they
        serve and are likely to be faster. Where "hopper" kernels cannot serve, portable ones do.
    dump: a folder to write every stage of every graph to (also FLASHFUSE_DUMP); None: no dump.
    inductor: all other options, passed on to Inductor, with torch.compile's `mode`.
    """

    inner: Inner = "inductor"
    strict: bool = False
    sdpa: str = "auto"
    kernel: str = "auto"
    dump: str | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tunes(self) -> bool:
        """Whether kernels are to be tuned at their first call: under the modes "max-autotune..." as Inductor's own are."""
        return (self.mode or "").startswith("max-autotune") or bool(self.inductor.get("max_autotune"))


_OWN = ("inner", "strict", "sdpa", "kernel", "dump")


def parse(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Options as given to torch.compile. Raises OptionError for names and values that do not exist."""
    given = dict(options or {})
    own = {name: given.pop(name) for name in _OWN if name in given}
    inner = own.get("inner", "inductor")
    if not callable(inner) and inner not in INNER_NAMES:
        raise OptionError(f"option inner={inner!r} is neither a callable nor one of {', '.join(INNER_NAMES)}"
                          + did_you_mean(str(inner), INNER_NAMES))  # fmt: skip
    strict = own.get("strict", os.environ.get("FLASHFUSE_STRICT") == "1")
    if not isinstance(strict, bool):
        raise OptionError(f"option strict={strict!r} must be True or False")
    sdpa = _one_of("sdpa", own.get("sdpa", "auto"), SDPA_CHOICES)
    kernel = _one_of("kernel", own.get("kernel", "auto"), KERNEL_CHOICES)
    dump = own.get("dump", os.environ.get("FLASHFUSE_DUMP") or None)
    if dump is not None and not isinstance(dump, (str, os.PathLike)):
        raise OptionError(f"option dump={dump!r} must be the path of a folder")
    if given:
        _check_inductor_names(given)
    return Options(inner, strict, sdpa, kernel, None if dump is None else os.fspath(dump), mode, given)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise OptionError(f"option {name}={value!r} is none of {', '.join(known)}" + did_you_mean(str(value), known))
    return str(value)


def _check_inductor_names(given: Mapping[str, Any]) -> None:
    from torch._inductor import config

    known = set(config.get_config_copy())
    for name in given:
        if name.replace("-", "_") not in known:
            raise OptionError(f"unknown option {name!r}" + did_you_mean(name, [*_OWN, *known])
                              + f"; flashfuse's own options are {', '.join(_OWN)}, all others are Inductor's")  # fmt: skip


def did_you_mean(word: str, known: Any) -> str:
    """`; did you mean 'strict'?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
