"""Kernel modules on disk: written once by content hash, imported from there, so that the dump is the file that ran.

They lie in the cache folder or, while dumping, in the dump. A file of the same name in `$FLASHFUSE_OVERRIDE` is imported
instead: an edited kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from flashfuse.codegen import kernel_choice
from flashfuse.codegen.emit import module_text
from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec

log = logging.getLogger("flashfuse")

_modules: dict[tuple[str, bool, bool], ModuleType] = {}
_placed: dict[str, tuple[Path, str]] = {}  # key of a spec -> the folder for its kernels, and a tail for their text


def cache_folder() -> Path:
    """$FLASHFUSE_CACHE_DIR, or flashfuse's folder in the user's cache."""
    named = os.environ.get("FLASHFUSE_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "flashfuse"


def kernel_module(spec: AttentionSpec, fast_tanh: bool = False, hopper: bool = False) -> ModuleType:
    """The imported module of a spec; `__file__` is where its text lies. `hopper`: of its kernels for Hopper."""
    fast_tanh = fast_tanh and spec.score.uses("tanh")
    known = _modules.get((spec.key, fast_tanh, hopper))
    if known is None:
        known = _import(_overriding(spec, fast_tanh, hopper) or write_kernel(spec, fast_tanh, hopper))
        _modules[(spec.key, fast_tanh, hopper)] = known
    return known


def write_kernel(spec: AttentionSpec, fast_tanh: bool = False, hopper: bool = False) -> Path:
    """Write the module of a spec where it belongs (the dump, or the cache) and return the path."""
    fast_tanh = fast_tanh and spec.score.uses("tanh")
    text = module_text(spec, fast_tanh, hopper)
    if spec.key not in _placed:
        return write_module(text)
    folder, tail = _placed[spec.key]
    path = folder / _kernel_name(spec, fast_tanh, hopper)
    if path.exists() and not _is_generated(path.read_text(encoding="utf-8")):
        log.warning("%s was edited and is left alone; FLASHFUSE_OVERRIDE=%s uses it", path, folder)
        return write_module(text)
    write_atomically(path, _sealed(text + tail))
    return path


def _kernel_name(spec: AttentionSpec, fast_tanh: bool, hopper: bool) -> str:
    """A kernel file's name in a dump: by what it computes, not by the user's lines in its comments."""
    return f"attention_{spec.key}{'_hopper' if hopper else ''}{'_fast_tanh' if fast_tanh else ''}.py"


_SEAL = "\n# as generated: "


def _sealed(text: str) -> str:
    """The text with its own hash, so that an edit can be told from an older version."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _is_generated(text: str) -> bool:
    return text == _sealed(text.rsplit(_SEAL, 1)[0])


def place_kernels(spec: AttentionSpec, folder: Path, tail: str) -> None:
    """From now on write and import the kernels of a spec in `folder`, with `tail` after their text."""
    if spec.key not in _placed:
        _placed[spec.key] = (folder, tail)
        for known in [known for known in _modules if known[0] == spec.key]:
            del _modules[known]


def use_file(spec: AttentionSpec, path: Path) -> None:
    """Take this file for the kernels of a spec, portable ones or those for Hopper, whatever its text; they serve from now on."""
    module = _import(path)
    hopper = hasattr(module, "flashfuse_hopper_forward")
    for each in (False, True):
        _modules[(spec.key, each, hopper)] = module
    kernel_choice.ask(spec.key, "hopper" if hopper else "portable")


def _overriding(spec: AttentionSpec, fast_tanh: bool, hopper: bool) -> Path | None:
    """The file in $FLASHFUSE_OVERRIDE that stands for this module, if there is one."""
    found = _found(spec, fast_tanh, hopper)
    if found is None:
        return None
    log.info("kernel from %s", found)
    if not hopper and _is_edited(found) and not _is_edited(_found(spec, fast_tanh, True)):
        kernel_choice.note_edited(spec.key)
    return found


def _found(spec: AttentionSpec, fast_tanh: bool, hopper: bool) -> Path | None:
    named = os.environ.get("FLASHFUSE_OVERRIDE")
    found = sorted(Path(named).expanduser().rglob(_kernel_name(spec, fast_tanh, hopper))) if named else []
    return found[0] if found else None


def _is_edited(path: Path | None) -> bool:
    return path is not None and not _is_generated(path.read_text(encoding="utf-8"))


def module_path(spec: AttentionSpec, fast_tanh: bool = False) -> Path:
    """Where the module of a spec lies, or will lie when it is first needed."""
    return cache_folder() / _file_name(module_text(spec, fast_tanh and spec.score.uses("tanh")))


def _file_name(text: str) -> str:
    return f"attention_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"


def write_module(text: str) -> Path:
    """Write a module's text under its content hash and return the path; an intact file is left alone."""
    name = _file_name(text)
    failures: list[str] = []
    for folder in (cache_folder(), Path(tempfile.gettempdir()) / f"flashfuse_{os.getuid()}"):
        path = folder / name
        try:
            if _intact(path, text):
                return path
            write_atomically(path, text)
            return path
        except OSError as error:
            failures.append(f"{folder}: {error}")
    raise InternalError("no folder to write a kernel to: " + "; ".join(failures))


def _intact(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except FileNotFoundError:
        return False


def remembered(name: str, find: Callable[[], str]) -> str:
    """What `find` said when it was first asked on this machine; the text lies in the cache folder, as answers/`name`."""
    path = cache_folder() / "answers" / name
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        said = find()
    with contextlib.suppress(OSError):  # then it is found again next time
        write_atomically(path, said)
    return said


def write_atomically(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _import(path: Path) -> ModuleType:
    name = f"flashfuse_kernels.{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise InternalError(f"cannot import {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # Triton and inspect look functions' modules up by name
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
