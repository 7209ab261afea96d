"""Kernel modules that tests emit go to a folder of their own."""

from __future__ import annotations

import pytest

from flashfuse.codegen import load


@pytest.fixture(autouse=True, scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Emit into a temporary folder and forget modules that came from elsewhere."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
    patch.setattr(load, "_modules", {})
