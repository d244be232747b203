"""Rows per second of the engines, each against the loop everyone writes first; texts that depend on the batch."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from figures import Figure, show

from worker import asking, models, prompts, sources, tasks, tiny
from worker.generators import Completion, Prompt, Sampling, hf
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
CHARACTERS_A_TOKEN = 4
"""Of English, with the vocabularies of today's models: what turns a written GSM8K solution into a length in tokens."""
RACED_PROBLEMS = 64
LARGER = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}
"""With 4 layers a random model of 6 million parameters: on a processor it is its arithmetic that takes the time."""
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
    yield real_lengths()
    yield from vllm_race()
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


def larger_model() -> Any:
    """A random model that takes longer for more rows."""
    torch.manual_seed(0)
    small = models.load_config(models.ModelRequest(str(tiny.ensure(ROOT / "build" / "models", print))))
    small.update({**LARGER, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
    return transformers.AutoModelForCausalLM.from_config(small).eval()


def real_lengths() -> Figure | str:
    """Ours against the plain loop at one batch size, in file order, each row as long as GSM8K's written solution."""
    if not GSM8K.is_file():
        return "GSM8K, lengths of its solutions: skipped, the problems are not beside the project"
    loaded = load("float32")
    both = Contest(models.LoadedModel(larger_model(), *list(vars(loaded).values())[1:]), SAMPLING)
    examples = tasks.get("gsm8k").examples(sources.load(sources.Source(str(GSM8K), "test", None)).rows)
    wanted = asked(Workload("", str(GSM8K), RACED_PROBLEMS), loaded)[::SAMPLES]
    lengths = {
        prompt.key: max(len(example.solution) // CHARACTERS_A_TOKEN, 1)
        for prompt, example in zip(wanted, examples, strict=False)
    }
    ratios = []
    for number in range(ROUNDS):
        loops: list[Callable[[], float]] = [
            lambda: ours_of(both, wanted, lengths),
            lambda: plain_of(both, wanted, lengths),
        ]
        took = [loop() for loop in (loops if number % 2 else loops[::-1])]
        fast, slow = took if number % 2 else took[::-1]
        ratios.append(slow / fast)
    words = (
        f"{min(ratios):.2f} to {max(ratios):.2f}; {len(wanted)} rows of {statistics.mean(lengths.values()):.0f} tokens"
    )
    words += f", the longest {max(lengths.values())}; random weights, 6 million parameters"
    name = f"GSM8K, lengths of its solutions, batch {PLAIN_BATCH}"
    return Figure(name, statistics.median(ratios), "times", words, at_least=1.5)


def ours_of(both: Contest, wanted: list[Prompt], lengths: dict[str, int]) -> float:
    """Seconds of our engine, where rows end by their length alone."""

    class Forced(hf.Ending):
        def completion(self, row: hf.Row, token: int) -> Completion | None:
            row.ids.append(token)
            return self._texts.completion(row.prompt, row.ids) if len(row.ids) >= lengths[row.prompt.key] else None

    with mock.patch.object(hf, "Ending", Forced):
        began_s = time.perf_counter()
        both.ours(wanted, PLAIN_BATCH)
        return time.perf_counter() - began_s


def plain_of(both: Contest, wanted: list[Prompt], lengths: dict[str, int]) -> float:
    """Seconds of the plain loop, which takes its own way of ending each row of a batch by its length."""

    class Forced(transformers.StoppingCriteria):
        def __init__(self, width: int, limits: list[int]) -> None:
            self._width, self._limits = width, torch.tensor(limits)

        def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
            return ids.shape[1] - self._width >= self._limits

    model, tokenizer = both.loaded.model, both.loaded.tokenizer
    began_s = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(wanted), PLAIN_BATCH):
            some = wanted[start : start + PLAIN_BATCH]
            ids = [list(prompt.token_ids) for prompt in some]
            batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
            limits = [lengths[prompt.key] for prompt in some]
            ending = Forced(batch["input_ids"].shape[1], limits)
            drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "eos_token_id": -1}
            made = model.generate(**batch, **drawn, max_new_tokens=max(limits), stopping_criteria=[ending])
            tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return time.perf_counter() - began_s


def vllm_race() -> Iterator[Figure | str]:
    """Our engine over vLLM against vLLM's own offline loop, both in its Python: `scripts/race_vllm.py`."""
    python = os.environ.get("GPU_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    if not Path(python).is_file() or not GSM8K.is_file():
        yield "vLLM: skipped, it is not here (scripts/test --all installs it; or set GPU_VLLM_PYTHON), or GSM8K is not"
        return
    with tempfile.TemporaryDirectory() as folder:
        larger_model().save_pretrained(folder)
        loaded = load("float32")
        loaded.tokenizer.save_pretrained(folder)
        wanted = asked(Workload("", str(GSM8K), RACED_PROBLEMS), loaded)
        lines = json.dumps([[prompt.key, prompt.token_ids, prompt.seed] for prompt in wanted])
        words = [python, str(ROOT / "scripts" / "race_vllm.py"), folder]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        done = subprocess.run(words, input=lines, env=env, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    ratios = [raw / ours for raw, ours in zip(told["raw_s"], told["ours_s"], strict=True)]
    first = statistics.median(first / ours for first, ours in zip(told["first_s"], told["ours_s"], strict=True))
    yield f"vLLM {told['version']}: {told['rows']} rows, {told['tokens']} tokens out, {told['differ']} texts differ"
    words_ = (
        f"{min(ratios):.2f} to {max(ratios):.2f}; {told['tokens'] / statistics.median(told['ours_s']):.0f} tokens/s"
    )
    yield Figure("vllm, of the throughput of LLM.generate", statistics.median(ratios), "times", words_, at_least=0.97)
    yield Figure("vllm, first row, of the whole time", 100 * first, "%", "LLM.generate: 100 %", at_most=5)


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
