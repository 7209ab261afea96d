"""The dump of a graph: every stage as a file that runs by itself, the kernels that run, and a repro.

    dir/graph_0/
        0_captured.py       what Dynamo handed over
        1_normal_form.py    the same as functional ATen, as the matcher reads it
        2_match.txt         what was found, as `explain` tells it
        2_match.dot         the captured graph with every region and refusal coloured
        3_spec_0.py         what attention 0 computes; run: the op against the plain formula in float64
        5_rewritten.py      what the inner compiler gets
        repro.py            random inputs, eager against flashfuse, the differences
    dir/kernels/            the generated kernels; they are imported from here, and run by themselves

Sub-graphs of higher-order operators have folders of their own inside their graph's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from flashfuse.graph_source import GraphSource, known, mode_text, tensor_text
from flashfuse.options import Options
from flashfuse.patterns.attention import Match
from flashfuse.patterns.search import Site
from flashfuse.records import SiteRecord
from flashfuse.report_text import site_paragraphs
from flashfuse.stages import Fused


def write(result: Fused, options: Options) -> Path:
    """Write one graph's stages into a new folder of `options.dump` and return it. Raises OSError if that cannot be."""
    assert options.dump is not None
    top = Path(options.dump).expanduser().resolve()
    folder = _new_folder(top)
    _write_graph(result, folder, top, options)
    return folder


def _new_folder(top: Path) -> Path:
    top.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:  # other processes may dump here too
        try:
            (top / f"graph_{number}").mkdir()
            return top / f"graph_{number}"
        except FileExistsError:
            number += 1


def _write_graph(result: Fused, folder: Path, top: Path, options: Options) -> None:
    specs: dict[str, str] = {}  # text of a spec -> its name in the rewritten graph's file
    for number, (site, record) in enumerate(_fused(result)):
        assert isinstance(site.found, Match)
        specs.setdefault(record.spec.to_text(), f"SPEC_{len(specs)}")  # type: ignore[union-attr]
        _write_spec(number, site.found, record, folder, top)
    _write_module(result.captured, folder / "0_captured.py", "The graph as Dynamo captured it.", {})
    if result.form is not None:
        title = "The same graph as functional ATen: what the matcher reads. It is never handed on."
        _write_module(_plain_module(result.form.graph), folder / "1_normal_form.py", title, {})
    paragraphs = site_paragraphs(result.record.sites) + ([result.record.failure] if result.record.failure else [])
    (folder / "2_match.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    (folder / "2_match.dot").write_text(_dot(result.captured, result.record.sites), encoding="utf-8")
    if result.module is not result.captured:
        _write_module(result.module, folder / "5_rewritten.py", "The graph that the inner compiler gets.", specs)
    (folder / "repro.py").write_text(_repro(options), encoding="utf-8")
    for name, sub in result.inner:
        (folder / name).mkdir(exist_ok=True)
        _write_graph(sub, folder / name, top, options)


def _plain_module(graph: fx.Graph) -> fx.GraphModule:
    """A traced graph whose function takes its inputs one by one."""
    copy = fx.Graph()
    outputs = copy.graph_copy(graph, {})
    copy.output(outputs)
    return fx.GraphModule(graph.owning_module or torch.nn.Module(), copy)


def _fused(result: Fused) -> list[tuple[Site, SiteRecord]]:
    """The graph's own sites that were fused; those of sub-graphs come after them in the record."""
    pairs = zip(result.sites, result.record.sites, strict=False)
    return [(site, record) for site, record in pairs if record.fused and isinstance(site.found, Match)]


def _write_module(module: fx.GraphModule, path: Path, title: str, specs: dict[str, str]) -> None:
    source = GraphSource(module, title)
    beside = f"{path.stem}_constants.pt"
    text = source.text(beside)
    for spec, name in specs.items():
        text = text.replace(repr(spec), name)
    shown = "".join(f"{name} = {spec!r}\n" for spec, name in specs.items())
    if shown:
        head, rest = text.split("\n\n\nclass ", 1)
        text = f"{head}\n\n{shown}\n\nclass {rest}"
    path.write_text(text, encoding="utf-8")
    if source.constants:
        torch.save(source.constants, path.with_name(beside))


# ------------------------------------------------------------------------------------------------ specs and kernels


def _write_spec(number: int, match: Match, record: SiteRecord, folder: Path, top: Path) -> None:
    from flashfuse.codegen.load import place_kernels, write_kernel

    shown = "\n".join(f"    {word:<6} {text}" for word, text in match.spec.describe())
    call = _call_text(match)
    program = "\n".join(f"    {line}" for line in match.spec.score.pretty().splitlines())
    lines = [
        f'"""What attention {number} computes, at {record.path or record.anchor}.', "", shown, "", "As a program:", "", program,
        '"""', "", "from flashfuse.reproduce import run_spec, tensor", "", call, "",
        'if __name__ == "__main__":', "    run_spec(SPEC, *inputs())",
    ]  # fmt: skip
    text = "\n".join(lines).replace("\\", "/") + "\n"
    (folder / f"3_spec_{number}.py").write_text(text, encoding="utf-8")
    tail = ("\n\n# " + "-" * 98 + " run by itself\nfrom flashfuse.reproduce import run_kernel, tensor  # noqa: E402\n\n"
            + call + '\n\nif __name__ == "__main__":\n    run_kernel(__file__, SPEC, *inputs())\n')  # fmt: skip
    kernels = top / "kernels"
    kernels.mkdir(exist_ok=True)
    place_kernels(match.spec, kernels, tail)
    write_kernel(match.spec, fast_tanh=record.device == "cuda" and record.dtype != "float32")


def _call_text(match: Match) -> str:
    """SPEC, and a function that makes random inputs of the op: query, key, value, captures, sizes."""
    B, H, G, M, N, D, E = (known(match.dims[letter]) for letter in "BHGMNDE")
    value = match.query.node.meta["val"]
    dtype = str(match.query.cast or value.dtype).removeprefix("torch.")
    rows = [_dense((B, H, M, D), dtype, value), _dense((B, G, N, D), dtype, value), _dense((B, G, N, E), dtype, value)]
    captures = []
    extents = {"b": B, "h": H}
    for each in match.captures:
        held = each.node.meta.get("val")
        if each.diagonals is not None:
            shape = (*(extents[letter] for letter in each.diagonals.letters), M + N - 1)
            held = torch.empty(shape, device="meta")
            captures.append(tensor_text(held).replace("meta", value.device.type))
            continue
        captures.append(tensor_text(held) if isinstance(held, torch.Tensor) else 'tensor((), (), "float32", "cpu")')
    sizes = [known(size) for size in match.sizes]
    made = ",\n        ".join([*rows, f"[{', '.join(captures)}]", repr(sizes)])
    return f"SPEC = {match.spec.to_text()!r}\n\n\ndef inputs():\n    return (\n        {made},\n    )\n"


def _dense(size: tuple[int, ...], dtype: str, like: torch.Tensor) -> str:
    stride = (size[1] * size[2] * size[3], size[2] * size[3], size[3], 1)
    return f"tensor({size}, {stride}, {dtype!r}, {like.device.type!r})"


def _repro(options: Options) -> str:
    chosen = {"inner": options.inner} if isinstance(options.inner, str) else {}
    chosen["sdpa"] = options.sdpa
    words = "".join(f", {name}={value!r}" for name, value in chosen.items())
    return f'''"""Random inputs through the captured graph, eagerly and with flashfuse: the largest differences.

Integer inputs are 0 or 1, so that they are valid positions in any table. FLASHFUSE_OVERRIDE=.. uses edited kernels.
"""

from flashfuse.reproduce import compare

if __name__ == "__main__":
    compare(__file__, {mode_text()}{words})
'''


# ------------------------------------------------------------------------------------------------ the graph as DOT text


def _dot(module: fx.GraphModule, sites: tuple[SiteRecord, ...]) -> str:
    """The graph in the DOT language: regions filled green, nodes where a search started or stopped red."""
    colours = {name: "palegreen" if site.fused else "lightcoral" for site in sites for name in site.region}
    lines = ["digraph captured {", "  node [shape=box, fontname=monospace]"]
    for node in module.graph.nodes:
        colour = f', style=filled, fillcolor={colours[node.name]}' if node.name in colours else ""
        lines.append(f'  "{node.name}" [label="{node.name}\\n{_called(node)}"{colour}]')
        lines += [f'  "{each.name}" -> "{node.name}"' for each in node.all_input_nodes]
    return "\n".join([*lines, "}"]) + "\n"


def _called(node: fx.Node) -> str:
    target = getattr(node.target, "__name__", str(node.target))
    return node.op if node.op in ("placeholder", "output") else str(target).replace('"', "'")
