"""Kernel modules on disk: written once by content hash, imported from there, so that the dump is the file that ran."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from flashfuse.codegen.emit import module_text
from flashfuse.errors import InternalError
from flashfuse.ir.attention_spec import AttentionSpec

_modules: dict[tuple[str, bool], ModuleType] = {}


def cache_folder() -> Path:
    """$FLASHFUSE_CACHE_DIR, or flashfuse's folder in the user's cache."""
    named = os.environ.get("FLASHFUSE_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "flashfuse"


def kernel_module(spec: AttentionSpec, fast_tanh: bool = False) -> ModuleType:
    """The imported module of a spec; `__file__` is where its text lies."""
    fast_tanh = fast_tanh and spec.score.uses("tanh")
    known = _modules.get((spec.key, fast_tanh))
    if known is None:
        known = _import(write_module(module_text(spec, fast_tanh)))
        _modules[(spec.key, fast_tanh)] = known
    return known


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
            _write_atomically(path, text)
            return path
        except OSError as error:
            failures.append(f"{folder}: {error}")
    raise InternalError("no folder to write a kernel to: " + "; ".join(failures))


def _intact(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except FileNotFoundError:
        return False


def _write_atomically(path: Path, text: str) -> None:
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
