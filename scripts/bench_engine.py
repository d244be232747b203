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

from worker import asking, models, prompts, sources, tasks, tiny
from worker.generators import Prompt, Sampling
from worker.generators.hf import HfGenerator

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
"""The real problems, where a developer has them beside the project."""
SAMPLES = 5
SAMPLING, SAMPLING_ENDLESS = Sampling(0.7, 0.9, max_new_tokens=400), Sampling(0.7, 0.9, max_new_tokens=96)
PLAIN_BATCH = 16
ROUNDS = 3
WARM_UP_ROWS = 64
BATCHES = (1, 16, 64)
"""Sizes whose texts are compared."""

Texts = dict[str, str]
"""The text of each completion, by key."""


@dataclass(frozen=True)
class Workload:
    """The first problems of a dataset, each asked `SAMPLES` times.

    `endless`: no row ends before its last token, so that a batch that is never refilled is at its best.
    """

    name: str
    dataset: str
    problems: int
    endless: bool = False


WORKLOADS = (
    Workload("generated problems", sources.GENERATED, 200),
    Workload("GSM8K", str(GSM8K), 60),
    Workload("GSM8K, none ends early", str(GSM8K), 20, endless=True),
)
COMPARED = Workload("texts", sources.GENERATED, 120)


@dataclass(frozen=True)
class Contest:
    """One model and one way of drawing, for both loops."""

    loaded: models.LoadedModel
    sampling: Sampling

    def ours(self, wanted: list[Prompt], batch_size: int | None) -> Texts:
        """The completions of our engine; `batch_size` None is auto."""
        engine = HfGenerator(self.loaded, batch_size, print)
        return {prompt.key: completion.text for prompt, completion in engine.generate(wanted, self.sampling)}

    def plain(self, wanted: list[Prompt], batch_size: int) -> Texts:
        """The completions of the loop everyone writes first: batches in file order, left-padded, through `generate`."""
        tokenizer = self.loaded.tokenizer
        texts: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(wanted), batch_size):
                ids = [list(prompt.token_ids) for prompt in wanted[start : start + batch_size]]
                batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
                made = self.loaded.model.generate(
                    **batch,
                    do_sample=True,
                    temperature=self.sampling.temperature,
                    top_p=self.sampling.top_p,
                    top_k=0,  # off, as in our engine; left out, it would be 50
                    max_new_tokens=self.sampling.max_new_tokens,
                )
                texts += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return {prompt.key: text for prompt, text in zip(wanted, texts, strict=True)}


def main() -> Iterator[Figure | str]:
    """Every figure of this part."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    size = load("float32").parameters / 1e6
    yield (
        f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} thread, "
        f"the built-in model of {size:.2f} million parameters; medians of {ROUNDS} rounds"
    )
    for workload in WORKLOADS:
        if Path(workload.dataset).is_absolute() and not Path(workload.dataset).is_file():
            yield f"{workload.name}: skipped, {GSM8K.relative_to(ROOT.parent)} is not beside the project"
        else:
            yield from speed(workload)
    yield texts_that_differ("float32", None)
    yield texts_that_differ("float64", 0.0)


def load(dtype: str) -> models.LoadedModel:
    """The built-in model, trained once in the clone's `build` folder; on the CPU, so that computers compare."""
    folder = tiny.ensure(ROOT / "build" / "models", print)
    return models.load_model(models.ModelRequest(str(folder), dtype=dtype, device="cpu"))


def contest(workload: Workload) -> Contest:
    """The model and the drawing for a workload; when it is endless, a token that never comes is the one that ends."""
    loaded = load("float32")
    if not workload.endless:
        return Contest(loaded, SAMPLING)
    loaded.tokenizer.eos_token = tiny.PAD
    loaded.model.generation_config.eos_token_id = loaded.tokenizer.pad_token_id
    return Contest(loaded, SAMPLING_ENDLESS)


def asked(workload: Workload, loaded: models.LoadedModel) -> list[Prompt]:
    """The prompts of a workload as an evaluation would send them, in file order."""
    task, renderer = tasks.get("gsm8k"), prompts.Renderer(loaded.tokenizer)
    examples = task.examples(sources.load(sources.Source(workload.dataset, "test", None)).rows)[: workload.problems]
    found = []
    for example in examples:
        ids = renderer.ids(task.messages(example, ()))
        keys = [f"gsm8k/test/{example.id}#{sample}" for sample in range(SAMPLES)]
        found += [Prompt(key, ids, asking.seed_of(0, key)) for key in keys]
    return found


def speed(workload: Workload) -> Iterator[Figure | str]:
    """Ours against the plain loop: the median over rounds in each of which all run, every time in another order."""
    both = contest(workload)
    wanted = asked(workload, both.loaded)
    loops: dict[str, Callable[[list[Prompt]], Texts]] = {
        "plain": lambda some: both.plain(some, PLAIN_BATCH),
        f"batch {PLAIN_BATCH}": lambda some: both.ours(some, PLAIN_BATCH),
        "batch auto": lambda some: both.ours(some, None),
    }
    for loop in loops.values():
        loop(wanted[:WARM_UP_ROWS])
    rates: dict[str, list[float]] = {name: [] for name in loops}
    lengths: dict[str, float] = {}
    for number in range(ROUNDS):
        turn = number % len(loops)
        for name in [*loops][turn:] + [*loops][:turn]:
            rate, texts = timed(loops[name], wanted)
            rates[name].append(rate)
            lengths[name] = statistics.mean(map(len, texts.values()))
    tokens_in = statistics.mean(len(prompt.token_ids) for prompt in wanted)
    yield (
        f"{workload.name}: {len(wanted)} rows of {tokens_in:.0f} tokens in, "
        f"{lengths['batch auto']:.0f} characters out (plain loop: {lengths['plain']:.0f})"
    )
    slow = rates.pop("plain")
    for name, fast in rates.items():
        ratios = [ours / plain for ours, plain in zip(fast, slow, strict=True)]
        words = f"{statistics.median(fast):.0f} against {statistics.median(slow):.0f} rows/s"
        words += f"; {min(ratios):.2f} to {max(ratios):.2f} times"
        yield Figure(f"{workload.name}, {name}", statistics.median(ratios), "times", words, at_least=1.0)


def timed(loop: Callable[[list[Prompt]], Texts], wanted: list[Prompt]) -> tuple[float, Texts]:
    """Rows per second of one pass, and its texts."""
    gc.collect()
    began_s = time.perf_counter()
    texts = loop(wanted)
    return len(texts) / (time.perf_counter() - began_s), texts


def texts_that_differ(dtype: str, at_most: float | None) -> Figure:
    """The share of rows whose text is not the same at every batch size; beside it, the plain loop from one seed."""
    both = Contest(load(dtype), SAMPLING)
    wanted = asked(COMPARED, both.loaded)
    share = differing([both.ours(wanted, size) for size in BATCHES])
    plain = []
    for size in BATCHES[1:]:
        torch.manual_seed(0)
        plain.append(both.plain(wanted, size))
    name = f"{dtype}: texts that differ, batch {', '.join(map(str, BATCHES))}"
    words = f"plain loop, one seed, batch {BATCHES[1]} and {BATCHES[2]}: {differing(plain):.1f} %; {len(wanted)} rows"
    return Figure(name, share, "%", words, at_most=at_most)


def differing(several: list[Texts]) -> float:
    """The share, in percent, of keys that do not have the same text in all."""
    return 100 * sum(len({texts[key] for texts in several}) > 1 for key in several[0]) / len(several[0])


if __name__ == "__main__":
    sys.exit(show(main()))
