"""Rows per second of the transformers engine against a plain `generate` loop, and texts that depend on the batch."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from figures import Figure, show

from worker import models, plan, prompts, sources, tasks, tiny
from worker.generators import Prompt, Sampling
from worker.generators.hf import HfGenerator

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
"""The real problems, where a developer has them beside the project."""
SAMPLES = 5
MAX_NEW_TOKENS, MAX_NEW_TOKENS_ENDLESS = 400, 96
PLAIN_BATCH = 16
ROUNDS = 3
BATCHES = (1, 16, 64)
WARM_UP_ROWS = 64

Texts = dict[str, str]
"""The text of each completion, by key."""


@dataclass(frozen=True)
class Workload:
    """The first problems of a dataset, each asked `SAMPLES` times. `endless`: no row ends before its last token."""

    name: str
    dataset: str
    problems: int
    endless: bool = False

    @property
    def sampling(self) -> Sampling:
        """How both sides draw."""
        return Sampling(0.7, 0.9, MAX_NEW_TOKENS_ENDLESS if self.endless else MAX_NEW_TOKENS)


WORKLOADS = (
    Workload("generated problems", sources.GENERATED, 200),
    Workload("GSM8K", str(GSM8K), 80),
    Workload(f"GSM8K, all to {MAX_NEW_TOKENS_ENDLESS} tokens", str(GSM8K), 20, endless=True),
)
TEXTS = Workload("texts", sources.GENERATED, 120)


def main() -> Iterator[Figure | str]:
    """Every figure of this part."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    loaded = load("float32")
    yield (
        f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} thread, "
        f"the built-in model of {loaded.parameters / 1e6:.2f} million parameters, {ROUNDS} rounds in turn"
    )
    for workload in WORKLOADS:
        if workload.dataset == str(GSM8K) and not GSM8K.is_file():
            yield f"{workload.name}: skipped, shared/data/gsm8k is not beside the project"
            continue
        yield from speed(workload, without_end(load("float32")) if workload.endless else loaded)
    for dtype, most in (("float32", None), ("float64", 0.0)):
        yield texts_that_differ(load(dtype), dtype, most)


def load(dtype: str) -> models.LoadedModel:
    """The built-in model, trained once in the clone's `build` folder; on the CPU, so that computers compare."""
    folder = tiny.ensure(ROOT / "build" / "models", print)
    return models.load_model(models.ModelRequest(str(folder), dtype=dtype, device="cpu"))


def without_end(loaded: models.LoadedModel) -> models.LoadedModel:
    """The same model with nothing that ends a completion: a batch that is never refilled is then at its best."""
    loaded.tokenizer.eos_token = tiny.PAD
    loaded.model.generation_config.eos_token_id = loaded.tokenizer.pad_token_id
    return loaded


def asked(workload: Workload, loaded: models.LoadedModel) -> list[Prompt]:
    """The prompts of a workload as an evaluation would send them, in file order."""
    task, renderer = tasks.get("gsm8k"), prompts.Renderer(loaded.tokenizer)
    examples = task.examples(sources.load(sources.Source(workload.dataset, "test", None)).rows)[: workload.problems]
    found = []
    for example in examples:
        ids = renderer.ids(task.messages(example, ()))
        keys = [f"gsm8k/test/{example.id}#{sample}" for sample in range(SAMPLES)]
        found += [Prompt(key, ids, plan.seed_of(0, key)) for key in keys]
    return found


@dataclass(frozen=True)
class Loop:
    """Makes completions one way or the other: with a model, drawn so, so many rows at a time."""

    loaded: models.LoadedModel
    sampling: Sampling
    batch_size: int | None
    """None is auto, which only our engine knows."""


def ours(loop: Loop, wanted: list[Prompt]) -> Texts:
    """The completions of our engine."""
    engine = HfGenerator(loop.loaded, loop.batch_size, print)
    return {prompt.key: completion.text for prompt, completion in engine.generate(wanted, loop.sampling)}


def plain(loop: Loop, wanted: list[Prompt]) -> Texts:
    """The completions of the loop everyone writes first: batches in file order, left-padded, through `generate`."""
    tokenizer, texts = loaded.tokenizer, []
    with torch.inference_mode():
        for start in range(0, len(wanted), batch_size):
            ids = [list(prompt.token_ids) for prompt in wanted[start : start + batch_size]]
            batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
            made = loaded.model.generate(
                **batch,
                do_sample=True,
                temperature=SAMPLING.temperature,
                top_p=SAMPLING.top_p,
                top_k=0,  # off, as in our engine; left out, it would be 50
                max_new_tokens=SAMPLING.max_new_tokens,
            )
            texts += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {prompt.key: text for prompt, text in zip(wanted, texts, strict=True)}


def speed(workload: Workload, loaded: models.LoadedModel) -> Iterator[Figure | str]:
    """Ours against the plain loop: the median over the rounds, in each of which all run, every time in another order."""
    wanted = asked(workload, loaded)
    loops: dict[str, Callable[[list[Prompt]], Texts]] = {
        "plain": lambda some: plain(loaded, PLAIN_BATCH, some),
        f"batch {PLAIN_BATCH}": lambda some: ours(loaded, PLAIN_BATCH, some),
        "batch auto": lambda some: ours(loaded, None, some),
    }
    for loop in loops.values():
        loop(wanted[:WARM_UP_ROWS])
    rates: dict[str, list[float]] = {name: [] for name in loops}
    lengths: dict[str, float] = {}
    for number in range(ROUNDS):
        for name in [*loops][number % len(loops) :] + [*loops][: number % len(loops)]:
            rate, texts = timed(loops[name], wanted)
            rates[name].append(rate)
            lengths[name] = statistics.mean(map(len, texts.values()))
    tokens_in = statistics.mean(len(prompt.token_ids) for prompt in wanted)
    yield (
        f"{workload.name}: {len(wanted)} rows, {tokens_in:.0f} tokens in; "
        f"characters out: {lengths['plain']:.0f} plain, {lengths['batch auto']:.0f} ours"
    )
    for name in [*loops][1:]:
        ratios = [ours / plain for ours, plain in zip(rates[name], rates["plain"], strict=True)]
        beside = f"{middle(rates[name])} against {middle(rates['plain'])} rows/s, {min(ratios):.2f} to {max(ratios):.2f}"
        yield Figure(f"{workload.name}, {name}", statistics.median(ratios), "times", beside, at_least=1.0)


def timed(loop: Callable[[list[Prompt]], Texts], wanted: list[Prompt]) -> tuple[float, Texts]:
    """Rows per second of one pass, and its texts."""
    gc.collect()
    began_s = time.perf_counter()
    texts = loop(wanted)
    return len(texts) / (time.perf_counter() - began_s), texts


def middle(rates: list[float]) -> str:
    """The median in whole rows."""
    return f"{statistics.median(rates):.0f}"


def texts_that_differ(loaded: models.LoadedModel, dtype: str, most: float | None) -> Figure:
    """The share of rows whose text is not the same at every batch size; beside it the plain loop from one seed."""
    wanted = asked(Workload("", sources.GENERATED, TEXT_PROBLEMS), loaded)
    seen = [ours(loaded, size, wanted) for size in BATCHES]
    beside = []
    for size in BATCHES[1:]:
        torch.manual_seed(0)
        beside.append(plain(loaded, size, wanted))
    name = f"{dtype}: texts that differ, batch {', '.join(map(str, BATCHES))}"
    words = f"plain loop, batch 16 and 64: {100 * differing(beside):.1f} %; {len(wanted)} rows"
    return Figure(name, 100 * differing(seen), "%", words, at_most=most)


def differing(several: list[Texts]) -> float:
    """The share of keys that do not have the same text in all."""
    return sum(len({texts[key] for texts in several}) > 1 for key in several[0]) / len(several[0])


if __name__ == "__main__":
    sys.exit(show(main()))
