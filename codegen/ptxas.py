"""What ptxas says of a kernel's PTX: the only place where it tells of matrix instructions that it made to wait for each other."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass


@dataclass(frozen=True)
class PtxasReport:
    """Registers and spilled bytes a thread; `advisories` are ptxas' C75xx: serialised matrix instructions."""

    registers: int
    spilled: int
    advisories: tuple[str, ...]


def assembler() -> str:
    """The path of the ptxas that Triton uses."""
    from triton import knobs

    return str(knobs.nvidia.ptxas.path)


def report(ptx: str, target: str) -> PtxasReport:
    """Assemble again, aloud. `target` is the architecture, such as "sm_90a". Raises OSError where ptxas cannot run."""
    handle, path = tempfile.mkstemp(suffix=".ptx")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(ptx)
        command = [assembler(), "-v", f"--gpu-name={target}", path, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    finally:
        os.unlink(path)
    return parsed(said)


def parsed(said: str) -> PtxasReport:
    """The report from ptxas' output."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    advisories = re.findall(r"\(?C75\d\d[^\n]*", said)
    return PtxasReport(max(registers, default=0), max(spilled, default=0), tuple(advisories))
