"""flashfuse's own seconds in a whole compile of 24-layer models, on the CPU.

Each model is compiled from nothing in a process of its own, Inductor's caches off and its C++ compiler called from there.
Seconds are the processor's, of the process and its children, so that other load does not count. `own_seconds` is the time in
flashfuse's backend, from captured to rewritten graphs (Dynamo captures a model with dynamic shapes and Python floats twice),
`emit_seconds` what a GPU adds: planning, writing and importing the kernels of every distinct attention. `total_seconds` is the
first call less the second: Dynamo, flashfuse, AOTAutograd and Inductor. `share` is the first two over the total.

    python benchmarks/compile_time.py [--models llama,bert] [--ways infer-static] [--layers 24] [--out compile_time]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process

import torch
from measure import ResultFile, chosen

MODELS = ("llama", "bert")
WAYS = ("infer-static", "infer-dynamic", "train-static")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1000}
BATCH, LENGTH, PADDED = 2, 128, 28


@dataclass(frozen=True)
class Case:
    """One compile: a model's name, its layers, `train` or `infer`, `dynamic` or `static` shapes."""

    model: str
    layers: int
    direction: str
    shapes: str


def build(case: Case) -> torch.nn.Module:
    """The model as transformers has it, in eager attention, with random weights."""
    import transformers

    if case.model == "llama":
        config = transformers.LlamaConfig(num_hidden_layers=case.layers, num_key_value_heads=2, use_cache=False, **SMALL)
        model = transformers.LlamaModel._from_config(config, attn_implementation="eager")
    else:
        config = transformers.BertConfig(num_hidden_layers=case.layers, **SMALL)
        model = transformers.BertModel._from_config(config, attn_implementation="eager")
    return model.train(case.direction == "train")


def measure(case: Case) -> dict[str, Any]:
    """Compile and run one model in this process; a row of the result file."""
    from flashfuse import backend

    own: list[float] = []
    specs: list[Any] = []
    fuse = backend.fuse

    def timed(module: torch.fx.GraphModule, options: Any) -> Any:
        start = processor()
        found = fuse(module, options)
        own.append(processor() - start)
        specs.extend(site.spec for site in found.record.sites if site.spec is not None)
        return found

    backend.fuse = timed  # type: ignore[assignment]
    model = build(case)
    compiled = torch.compile(model, backend="flashfuse", dynamic=case.shapes == "dynamic")
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -PADDED:] = 0
    inputs = {"input_ids": torch.randint(5, 1000, (BATCH, LENGTH)), "attention_mask": mask}
    first, second = (run(compiled, inputs, case.direction == "train") for _ in range(2))
    distinct = {spec.key: spec for spec in specs}
    emitted, total = emit(list(distinct.values())), first - second
    return {
        **asdict(case), "captures": len(own), "fused": len(specs), "kernels": len(distinct),
        "own_seconds": round(sum(own), 2), "emit_seconds": round(emitted, 2), "total_seconds": round(total, 1),
        "share": round((sum(own) + emitted) / total, 4),
    }  # fmt: skip


def processor() -> float:
    """Seconds of the processor that this process and its children took so far."""
    return sum(os.times()[:4])


def run(compiled: Any, inputs: dict[str, torch.Tensor], train: bool) -> float:
    """Seconds of a forward, and in training a backward."""
    start = processor()
    with torch.set_grad_enabled(train):
        out = compiled(**inputs)[0]
    if train:
        out.square().mean().backward()
    return processor() - start


def emit(specs: list[Any]) -> float:
    """Seconds to plan, write and import the kernels of these specs, in an empty cache folder."""
    from flashfuse.codegen.load import kernel_module
    from flashfuse.codegen.plan import kernel_plan

    start = processor()
    for spec in specs:
        kernel_plan((9, 0), 2, 64)
        kernel_module(spec)
    return processor() - start


def cases(options: argparse.Namespace) -> list[Case]:
    """All that was asked for."""
    ways = [way.split("-") for way in chosen(options.ways, WAYS)]
    return [Case(model, options.layers, *way) for model in chosen(options.models, MODELS) for way in ways]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--case", default="", help="one case as JSON, measured in this process and printed")
    parser.add_argument("--out", default="compile_time", help="added to benchmarks/results/OUT.json")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    results = ResultFile(options.out, "cpu", batch=BATCH, length=LENGTH, dtype="torch.float32")
    for case in cases(options):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
            environment = {**os.environ, "FLASHFUSE_CACHE_DIR": folder}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        results.add(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
