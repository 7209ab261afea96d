"""A report as text for people: the user's file and line first, then what it is, or why it was left alone."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import torch

import flashfuse
from flashfuse.block_map import BlockMap, block_map
from flashfuse.ir.attention_spec import AttentionSpec, Capture, EmptyRows
from flashfuse.ir.score_words import Words, mask_words, score_words
from flashfuse.records import SiteRecord

_ROWS = {
    EmptyRows.IMPOSSIBLE: "",  # every query keeps a key: the ordinary case needs no line
    EmptyRows.ZERO: "a query that keeps no key gives zero",
    EmptyRows.EXACT: "a query that keeps no key gives what eager code gives",
}


def versions() -> str:
    """flashfuse, torch, triton, python and the device, on one line."""
    try:
        from importlib.metadata import version

        triton = f"  triton {version('triton')}"
    except ImportError:
        triton = "  without triton"
    own = f"flashfuse {flashfuse.__version__}  torch {torch.__version__}"
    return f"{own}{triton}  python {platform.python_version()}  {device_name()}"


def device_name() -> str:
    """`cuda sm_90`, or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda sm_{''.join(map(str, torch.cuda.get_device_capability()))}"


def site_paragraphs(sites: Sequence[SiteRecord]) -> list[str]:
    """Every site as a paragraph. Neighbours that read the same are shown once: layers of a model repeat."""
    groups: list[tuple[int, int, SiteRecord]] = []
    for number, site in enumerate(sites, 1):
        if groups and _same(groups[-1][2], site):
            groups[-1] = (groups[-1][0], number, site)
        else:
            groups.append((number, number, site))
    return ["\n".join(_site_lines(str(a) if a == b else f"{a}-{b}", site, several=a != b)) for a, b, site in groups]


def _same(a: SiteRecord, b: SiteRecord) -> bool:
    return a.fused == b.fused and _site_lines("", a, several=True) == _site_lines("", b, several=True)


def _site_lines(label: str, site: SiteRecord, *, several: bool) -> list[str]:
    return _fused_lines(label, site, several=several) if site.spec else _refused_lines(label, site)


# ------------------------------------------------------------------------------------------------ fused


def _fused_lines(label: str, site: SiteRecord, *, several: bool) -> list[str]:
    spec = site.spec
    assert spec is not None
    node = "" if several else f"{site.anchor}   "
    lines = [f"[{label}] FUSED       {site.where or site.anchor}   {node}{shape_text(site)}"]
    lines += [f"    {word:<8}{text}" for word, text in site_facts(site)]
    return lines


def site_facts(site: SiteRecord) -> list[tuple[str, str]]:
    """(word, text) pairs about a fused site: score, mask, sink, weight, reads, heads, rows, kernel, saved."""
    spec = site.spec
    if spec is None:
        return []
    facts = [("score", score_words(spec.split.kept, site.captures).text)]
    mask = mask_of(site)
    if mask is not None:
        skipped = skipped_text(site)
        name = ", ".join(label for label in mask.labels if label != "mask")
        facts.append(("mask", "   ".join(part for part in (mask.text, f"({name})" if name else "", skipped) if part)))
    names = tuple(name for name, _capture in _named(site, spec))
    for word, program in (("sink", spec.sink), ("weight", spec.weight)):
        if program is not None:
            facts.append((word, program.formula(captures=names)))
    if spec.captures:
        shown = [f"{name} ({capture.kind.value}, {capture.rank}-d)" for name, capture in _named(site, spec)]
        facts.append(("reads", ", ".join(shown)))
    dims = dict(site.dims)
    if dims["G"] != dims["H"]:
        facts.append(("heads", _heads_text(dims)))
    if _ROWS[spec.empty_rows]:
        facts.append(("rows", _ROWS[spec.empty_rows]))
    facts += site.notes
    facts.append(("kernel", kernel_text(site, spec)))
    if site.also_made:
        facts.append(("also", f"{site.also_made} are used elsewhere too; the original code still computes them"))
    saved = "" if site.also_made else saved_text(site)
    if saved:
        facts.append(("saved", f"{saved} of scores not written"))
    return facts


def mask_of(site: SiteRecord) -> Words | None:
    """The keep-predicate of a fused site in words; None if every key is kept."""
    if site.spec is None or site.spec.split.keep is None:
        return None
    return mask_words(site.spec.split.keep, site.captures)


def _named(site: SiteRecord, spec: AttentionSpec) -> list[tuple[str, Capture]]:
    names = site.captures or tuple(capture.name for capture in spec.captures)
    return list(zip(names, spec.captures, strict=True))


def _heads_text(dims: dict[str, str]) -> str:
    heads, groups = dims["H"], dims["G"]
    if heads.isdigit() and groups.isdigit() and int(groups):
        return f"{int(heads) // int(groups)} query heads share a key head; keys and values are not repeated"
    return f"{heads} query heads share {groups} key heads; keys and values are not repeated"


def site_map(site: SiteRecord) -> BlockMap | None:
    """The block map at the site's own lengths; None without a mask, with symbolic lengths, or if values decide."""
    dims = dict(site.dims)
    if site.spec is None or not (dims["M"].isdigit() and dims["N"].isdigit()):
        return None
    tile = _forward_tile(site)
    block_m, block_n = (tile.block_m, tile.block_n) if tile and site.device == "cuda" else (64, 64)
    return block_map(site.spec, int(dims["M"]), int(dims["N"]), block_m, block_n)


def skipped_text(site: SiteRecord) -> str:
    """How many key blocks are skipped, as far as that can be known before the call."""
    spec = site.spec
    if spec is None or spec.split.keep is None:
        return ""
    found = site_map(site)
    if found is not None:
        return f"skips {found.skipped:.0%} of the key blocks"
    if spec.certainty is None:
        return "skips blocks where its closed form allows"
    read = [name for place, (name, _capture) in enumerate(_named(site, spec)) if place in spec.split.keep.loads()]
    return f"skips blocks by the values of {', '.join(read)}" if read else ""


def kernel_text(site: SiteRecord, spec: AttentionSpec) -> str:
    """The file and tiles of a GPU's kernels, or what runs on the CPU."""
    if site.device != "cuda":
        from flashfuse.aten_flash import computes

        return "torch's CPU flash kernel" if computes(spec) else "in chunks of queries on the CPU: exact, linear in memory"
    from flashfuse.codegen.load import module_path

    file = str(module_path(spec, fast_tanh=site.dtype != "float32"))
    home = os.path.expanduser("~")
    tile = _forward_tile(site)
    shown = file.replace(home, "~", 1) if file.startswith(home) else file
    return shown + ("" if tile is None else f"   forward {tile.block_m}x{tile.block_n}x{tile.warps}w")


def _forward_tile(site: SiteRecord):  # type: ignore[no-untyped-def]
    """The first choice of the plan for this site on this machine's GPU; None on a CPU."""
    dims = dict(site.dims)
    if site.spec is None or site.device != "cuda" or not torch.cuda.is_available():
        return None
    if not (dims["D"].isdigit() and dims["E"].isdigit()):
        return None
    from flashfuse.codegen.plan import kernel_plan

    itemsize = torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()
    width = max(16, int(dims["D"]), int(dims["E"]))
    return kernel_plan(torch.cuda.get_device_capability(), itemsize, width).forward[0]


def shape_text(site: SiteRecord) -> str:
    """`B=4 H=16 M=N=2048 D=E=64 bfloat16`."""
    dims = dict(site.dims)
    words = [f"B={dims['B']} H={dims['H']}"]
    if dims["G"] != dims["H"]:
        words.append(f"G={dims['G']}")
    words.append(f"M=N={dims['M']}" if dims["M"] == dims["N"] else f"M={dims['M']} N={dims['N']}")
    words.append(f"D=E={dims['D']}" if dims["D"] == dims["E"] else f"D={dims['D']} E={dims['E']}")
    return " ".join(words) + f" {site.dtype}"


def saved_bytes(site: SiteRecord) -> int | None:
    """Bytes of the scores [B, H, M, N], which are not written; None for symbolic lengths."""
    sizes = [dict(site.dims).get(letter, "") for letter in "BHMN"]
    if not all(size.isdigit() for size in sizes):
        return None
    total = torch.empty(0, dtype=getattr(torch, site.dtype)).element_size()
    for size in sizes:
        total *= int(size)
    return total


def saved_text(site: SiteRecord) -> str:
    """`0.5 GiB`, or nothing if it is not known or nothing."""
    total = saved_bytes(site)
    return bytes_text(total) if total else ""


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def bytes_text(total: float) -> str:
    """A number of bytes in the unit that suits it."""
    return next(f"{total / unit:.1f} {name}" for unit, name in _UNITS if total >= unit or unit == 1)


# ------------------------------------------------------------------------------------------------ refused


def _refused_lines(label: str, site: SiteRecord) -> list[str]:
    found = site.refusal
    assert found is not None
    lines = [
        f"[{label}] LEFT ALONE  {found.where or site.where or site.anchor}   {found.code} {found.entry.title}",
        f"    {found.entry.meaning}",
        f"    found   {found.found}, at {found.node}",
    ]
    if found.reached:
        lines.append(f"    reached {reached_text(found.reached)}")
    if found.entry.hint:
        lines.append(f"    hint    {found.entry.hint}")
    lines.append(f"    more    python -m flashfuse why {found.code}")
    return lines


def reached_text(reached: Sequence[str]) -> str:
    """The way from the softmax to where the search stopped: `softmax <- masked_fill <- div; then stopped`."""
    return " <- ".join(name.split(".")[0] for name in reached) + "; then stopped"
