"""The backend: captured graph -> normal form -> matches -> rewritten graph -> inner compiler.

`torch.compile(model, backend="flashfuse")` arrives here through the entry point `torch_dynamo_backends`; no import of
flashfuse is needed. Whatever goes wrong inside flashfuse ends in the graph that the inner compiler would have got anyway
and one warning.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from flashfuse.commentary import tell
from flashfuse.errors import StrictError
from flashfuse.options import Options, parse
from flashfuse.patterns.attention import Match
from flashfuse.patterns.normal_form import NormalForm, captured_value, is_opaque
from flashfuse.patterns.normalise import normalise
from flashfuse.patterns.search import Site, find_attention, refusal
from flashfuse.patterns.user_code import user_place
from flashfuse.patterns.user_names import capture_names
from flashfuse.records import GraphRecord, SiteRecord
from flashfuse.refusal import CATALOGUE, Refusal, Refused
from flashfuse.rewrite import Rewriter
from flashfuse.stages import Fused

log = logging.getLogger("flashfuse")


def flashfuse(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a captured graph. The signature is that of a torch.compile backend.

    Raises OptionError for options that do not exist, and with `strict` StrictError where an attention is left alone.
    """
    chosen = parse(options, mode)
    result = fuse(module, chosen)
    if chosen.dump is not None:
        _dump(result, chosen)
    if chosen.strict:
        _insist(result.record)
    if chosen.tunes:
        _tune(result.module)
    compiled = compile_inner(result.module, example_inputs, chosen)
    count(result.record)  # only now: Dynamo may give this capture up and start over
    tell(result)
    return compiled


def _tune(module: fx.GraphModule) -> None:
    """Have the kernels of every attention in the graph and its sub-graphs tuned when they first run."""
    attention = getattr(torch.ops.flashfuse, "attention", None)
    if attention is None:
        return
    from flashfuse.codegen import tuning
    from flashfuse.ir.attention_spec import from_text

    graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.target is attention.default]
    tuning.request(from_text(node.args[5]).key for node in calls)


def _dump(result: Fused, options: Options) -> None:
    from flashfuse import dump

    try:
        folder = dump.write(result, options)
        log.info("dump in %s", folder)
    except Exception as error:  # a dump never stands in the way of the model
        log.info("the dump failed", exc_info=True)
        warn(f"no dump of a graph in {options.dump} ({_in_words(error)})")


# ------------------------------------------------------------------------------------------------ the pipeline


def fuse(module: fx.GraphModule, options: Options) -> Fused:
    """Replace every attention of a captured graph and of its sub-graphs. Never raises for what it finds there."""
    inner = {node: _fuse_subgraphs(module, node, options) for node in module.graph.nodes if is_opaque(node)}
    below = tuple((name, sub) for subs in inner.values() for name, sub in subs.items())
    nested = tuple(site for subs in inner.values() for sub in subs.values() for site in sub.record.sites)
    writers = {node for node, subs in inner.items() if not subs or any(sub.writes_inputs for sub in subs.values())}
    try:
        form, sites = read(module, options, writers)
    except Exception as error:
        log.info("graph could not be read", exc_info=True)
        failure = f"FF104 {CATALOGUE['FF104'].title}: {_in_words(error)}"
        if _may_hold_attention(module):
            warn(f"a graph could not be read ({failure}) and is compiled without flashfuse")
        whole = _with_subgraphs(module, inner)
        return Fused(whole, GraphRecord(nested, failure), writes_inputs=True, captured=module, inner=below)
    rewritten, records = rewrite(module, form, sites, options)
    whole = _with_subgraphs(rewritten, inner)
    record = GraphRecord((*records, *nested))
    return Fused(whole, record, bool(form.written_inputs), module, form, tuple(sites), below)


def read(module: fx.GraphModule, options: Options, writers: set[fx.Node]) -> tuple[NormalForm, list[Site]]:
    """Normal form and sites of one graph."""
    form = normalise(module, writes_of=lambda node: node in writers)
    return form, find_attention(
        form.graph, requires_grad=lambda node: _requires_grad(form, node), overwritten=form.overwritten,
        hidden=form.hidden, unfit=form.unfit, sdpa=options.sdpa,
    )  # fmt: skip


def rewrite(
    module: fx.GraphModule, form: NormalForm, sites: list[Site], options: Options
) -> tuple[fx.GraphModule, list[SiteRecord]]:
    """Replace the matches; fence the refused from Inductor's own matcher. The same module if nothing changed."""
    if not sites:
        return module, []
    from flashfuse.inductor_lowerings import register_lowerings

    fences = options.inner == "inductor" and register_lowerings()
    from flashfuse.codegen import kernel_choice

    for site in sites:
        if isinstance(site.found, Match):
            kernel_choice.ask(site.found.spec.key, options.kernel)
    rewriter = Rewriter(module, form)
    records = [_replace(rewriter, site) for site in sites]
    rewriter.sweep()
    records = [_with_remainder(rewriter, site, record) for site, record in zip(sites, records, strict=True)]
    unsafe = {s.anchor for s, r in zip(sites, records, strict=True) if r.also_made or (r.refusal and not _is_safe(r.refusal))}
    if unsafe and fences:
        for anchor in unsafe:
            rewriter.fence(anchor)
    return (rewriter.finish() if rewriter.changed else module), records


def _with_remainder(rewriter: Rewriter, site: Site, record: SiteRecord) -> SiteRecord:
    """The record with what the original code still computes because others use it."""
    if not record.fused or not isinstance(site.found, Match) or site.found.product is site.found.output:
        return record
    made = [word for word, node in (("scores", site.found.product), ("probabilities", site.anchor)) if rewriter.still_made(node)]
    return replace(record, also_made=made[-1] if made else "")


def _replace(rewriter: Rewriter, site: Site) -> SiteRecord:
    found = site.found
    if isinstance(found, Match):
        try:
            return _fused_record(rewriter, site, found)
        except Refused as refused:
            found = refusal(site.anchor, refused)
        except Exception as error:
            log.info("a match could not be rewritten", exc_info=True)
            found = refusal(site.anchor, Refused("FF501", site.anchor, _in_words(error)))
            warn(f"the attention at {site.where or site.anchor} is compiled without flashfuse ({_in_words(error)})")
    region = rewriter.form.captured_names(str(site.anchor), found.node)
    return SiteRecord(str(site.anchor), site.where, refusal=found, path=user_place(site.anchor), region=region)


def _fused_record(rewriter: Rewriter, site: Site, match: Match) -> SiteRecord:
    """Replace a match and say what was done."""
    names = capture_names(rewriter.form, [None if side.seed else side.node for side in match.captures])
    region = rewriter.replace(match)
    dims = tuple((letter, str(size)) for letter, size in match.dims.items())
    value = match.query.node.meta["val"]
    dtype = str(match.query.cast or value.dtype).removeprefix("torch.")
    return SiteRecord(
        str(site.anchor), site.where, dims, dtype, spec=match.spec, path=user_place(site.anchor),
        device=value.device.type, captures=names, region=tuple(str(node) for node in region), notes=_notes(rewriter, match),
    )  # fmt: skip


def _notes(rewriter: Rewriter, match: Match) -> tuple[tuple[str, str], ...]:
    """What a reader must know about a site besides its kernel."""
    notes: list[tuple[str, str]] = []
    if match.statistic is not None and match.statistic.node in rewriter.given:
        notes.append(("lse", "the logsumexp that is taken of the same scores is the kernel's own"))
    if match.query.more:
        widths = [str(side.view.merge[3]) for side in (match.query, *match.query.more) if side.view is not None]
        notes.append(("joined", f"{len(widths)} products are one, of head dims {' + '.join(widths)}"))
    if not match.terms:
        return tuple(notes)
    names = capture_names(rewriter.form, [factor.node for factor in match.factors])
    signs = {"mul": " * ", "div": " / "}
    times = "".join(signs[factor.name] + name for factor, name in zip(match.factors, names, strict=True))
    return (*notes, ("sum", f"one of {len(match.terms)} outputs that are added up, times {match.scale:g}{times}"),)


def _is_safe(found: Refusal) -> bool:
    return found.safe_for_inductor or found.code == "FF103" or found.code == "FF102"


def _requires_grad(form: NormalForm, node: fx.Node) -> bool:
    """Whether a value of the normal form needs a gradient, by the captured values that it comes from."""
    if not form.gradients:
        return False
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        hidden = form.hidden(current)
        if current in seen or (current in form.without_grad and not hidden):
            continue
        seen.add(current)
        held = [captured_value(o) for o in form.origins.get(current, []) if hidden or not o.path]
        known = [value for value in held if value is not None]
        if known:
            if any(value.requires_grad for value in known):
                return True
            continue
        stack.extend(current.all_input_nodes)
    return False


# ------------------------------------------------------------------------------------------------ sub-graphs


def _fuse_subgraphs(module: fx.GraphModule, node: fx.Node, options: Options) -> dict[str, Fused]:
    """Sub-graphs of a higher-order operator, each fused by itself."""
    found = {}
    for argument in node.all_input_nodes:
        if argument.op != "get_attr":
            continue
        sub = getattr(module, str(argument.target), None)
        if isinstance(sub, fx.GraphModule):
            found[str(argument.target)] = fuse(sub, options)
    return found


def _with_subgraphs(module: fx.GraphModule, inner: dict[fx.Node, dict[str, Fused]]) -> fx.GraphModule:
    changed = {
        name: sub.module
        for subs in inner.values()
        for name, sub in subs.items()
        if sub.module is not getattr(module, name)
    }
    if not changed:
        return module
    copy = fx.GraphModule(module, module.graph)
    for name, sub in changed.items():
        setattr(copy, name, sub)
    return copy


# ------------------------------------------------------------------------------------------------ outcome


def count(record: GraphRecord) -> None:
    """Add a compiled graph's sites to torch._dynamo.utils.counters["flashfuse"]."""
    counters = torch._dynamo.utils.counters["flashfuse"]
    for site in record.sites:
        if site.refusal is not None and site.refusal.code == "FF101":
            counters["not_attention"] += 1
            continue
        counters["fused" if site.fused else "refused"] += 1
        if site.also_made:
            counters[f"{site.also_made} also made"] += 1


def _insist(record: GraphRecord) -> None:
    left = [s.refusal for s in record.sites if s.refusal is not None and s.refusal.code not in ("FF101", "FF102")]
    if record.failure or left:
        raise StrictError("strict: " + (record.failure or "; ".join(str(each) for each in left)))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _may_hold_attention(module: fx.GraphModule) -> bool:
    return any("softmax" in str(node.target) or "attention" in str(node.target) for node in module.graph.nodes)


def warn(message: str) -> None:
    """One clear warning, shown once for one message."""
    warnings.warn(f"flashfuse: {message}", stacklevel=3)


def compile_inner(module: fx.GraphModule, example_inputs: list[Any], options: Options) -> Callable[..., Any]:
    """Hand the graph to the inner compiler, with torch.compile's mode and Inductor's options."""
    if callable(options.inner):
        return options.inner(module, example_inputs)
    if options.inner == "eager":
        return module.forward
    from torch._dynamo.backends.registry import lookup_backend

    compiler = lookup_backend(options.inner)
    if options.inner != "inductor":
        return compiler(module, example_inputs)
    patches = dict(options.inductor)
    if options.mode not in (None, "default"):
        from torch._inductor import list_mode_options

        patches = {**list_mode_options(options.mode), **patches}
    return compiler(module, example_inputs, config_patches=patches or None)
