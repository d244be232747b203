"""Items per second where choices are weighed, against lm-evaluation-harness on the same model and items."""

from __future__ import annotations

import bz2
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from figures import Figure, show
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as shapes

from worker import likelihood, models, prompts, tasks, worked
from worker.generators.likelihood import HfWeigher

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
ROUNDS, BATCH, THREADS, TARGET = 3, 16, 1, 1.3
LAYERS, HIDDEN, HEADS, VOCABULARY = 4, 512, 8, 16_000
"""A random model of a shape that real ones have; one of a few thousand weights would measure overheads alone."""
START = "<s>"
HARNESS = os.environ.get("GPU_PARITY_PYTHON", str(ROOT / ".venv-parity" / "bin" / "python"))
THEIRS = """
import json, sys, time
import importlib.metadata
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

torch.set_num_threads(int(sys.argv[3]))
model = HFLM(pretrained=sys.argv[1], dtype="float32", device="cpu", batch_size=int(sys.argv[2]))
print(json.dumps(importlib.metadata.version("lm_eval")), flush=True)
for line in sys.stdin:
    pairs = json.load(open(json.loads(line)))
    requests = [Instance("loglikelihood", {}, (context, " " + choice), 0) for context, choice in pairs]
    began = time.monotonic()
    found = model.loglikelihood(requests, disable_tqdm=True)
    took = time.monotonic() - began
    json.dump([loglik for loglik, _ in found], open(json.loads(line) + ".out", "w"))
    print(json.dumps(took), flush=True)
"""
"""The harness in a process of its own, asked for one part after the other; the model is loaded once."""


@dataclass(frozen=True)
class Part:
    """Some items of a task, with so many shots."""

    name: str
    task: str
    shots: int
    items: int


PARTS = (
    Part("MMLU, 5 shots", "mmlu", 5, 24),
    Part("MMLU, 0 shots", "mmlu", 0, 64),
    Part("HellaSwag, 0 shots", "hellaswag", 0, 48),
)


def make_model(folder: Path) -> None:
    """A random Llama in float32, and a tokenizer that was trained on MMLU's own words."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((DATA / "mmlu" / "test").glob("*.csv"))[::4]]
    backend = Tokenizer(shapes.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [line for text in texts for line in text.splitlines()],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[START], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=START)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def scenes(path: Path) -> Path:
    """HellaSwag as JSON lines, made of the text file beside the project."""
    lines = bz2.decompress((DATA / "hellaswag" / "hellaswag_val_full.txt.bz2").read_bytes()).decode().split("\n")
    rows = [
        {"query": lines[at], "choices": lines[at + 2 : at + 6], "gold": lines[at + 1]}
        for at in range(0, len(lines) - 5, 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(part: Part, folder: Path) -> tuple[list[tasks.Example], list[str]]:
    """Examples and contexts; of MMLU half are of one subject and half of another, as neighbours in it are."""
    task: Any = tasks.get(part.task)
    dataset = str(DATA / "mmlu") if part.task == "mmlu" else str(folder / "hellaswag.jsonl")
    params = {"model": "", "dataset": dataset, "split": "test", "shots": part.shots, "shots_dataset": None}
    found, _ = worked.examples({**params, "subjects": None}, task)
    if part.task == "mmlu":
        by_subject = [[one for one in found if one.subject == name] for name in ("anatomy", "virology")]
        found = [one for group in by_subject for one in group[: part.items // 2]]
    shots = worked.shots({**params, "subjects": None}, task)
    found = found[: part.items]
    return found, [task.context(example, shots.of(example)) for example in found]


class Ours:
    """The engine, loaded once; what it is asked is tokenized anew in each round, as the harness does."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(THREADS)
        self._loaded = models.load_model(models.ModelRequest(str(folder), dtype="float32", device="cpu"))
        torch.set_num_threads(THREADS)
        self._renderer = prompts.Renderer(self._loaded.tokenizer, "none")

    def run(self, examples: list[tasks.Example], contexts: list[str]) -> tuple[float, list[float]]:
        """Seconds, and the log-likelihood of every choice in order."""
        began = time.monotonic()
        keys = [str(number) for number in range(len(examples))]
        queries = [query for query, _ in likelihood.Asking(self._renderer, 2048).choices(keys, examples, contexts)]
        weigher = HfWeigher(self._loaded, BATCH, 2048, print)
        found = {query.key: answer.logliks for query, answer in weigher.weigh(queries)}
        took = time.monotonic() - began
        return took, list(itertools.chain.from_iterable(found[key] for key in keys))


class Theirs:
    """The harness, waiting in a process of its own."""

    def __init__(self, folder: Path) -> None:
        words = [HARNESS, "-c", THEIRS, str(folder), str(BATCH), str(THREADS)]
        self._process = subprocess.Popen(words, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, cwd=folder)
        self.version = self._answer()

    def run(self, examples: list[tasks.Example], contexts: list[str]) -> tuple[float, list[float]]:
        """Seconds, and the log-likelihood of every choice in order."""
        pairs = [(text, choice) for text, one in zip(contexts, examples, strict=True) for choice in one.choices]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pairs.json"
            path.write_text(json.dumps(pairs), encoding="utf-8")
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(str(path)) + "\n")
            self._process.stdin.flush()
            return float(self._answer()), json.loads(Path(f"{path}.out").read_text(encoding="utf-8"))

    def _answer(self) -> Any:
        """The next line that is JSON; the harness prints others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line[:1] in '"0123456789':
                return json.loads(line)
        raise SystemExit(f"lm-evaluation-harness does not run: {HARNESS}")

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def measured(part: Part, ours: Ours, theirs: Theirs, folder: Path) -> Iterator[Figure | str]:
    """How many times as fast, in rounds that alternate; and how far apart the two are."""
    examples, contexts = asked(part, folder)
    times: list[tuple[float, float]] = []
    for number in range(ROUNDS):
        runs: dict[int, tuple[float, list[float]]] = {}
        for engine in ((ours, theirs), (theirs, ours))[number % 2]:
            runs[id(engine)] = engine.run(examples, contexts)
        mine, other = runs[id(ours)], runs[id(theirs)]
        times.append((mine[0], other[0]))
        apart = max(abs(a - b) for a, b in zip(mine[1], other[1], strict=True))
    own_s, their_s = (statistics.median(each) for each in zip(*times, strict=True))
    ratios = [round(b / a, 2) for a, b in times]
    yield Figure(
        part.name,
        their_s / own_s,
        "times",
        f"{len(examples) / own_s:.1f} against {len(examples) / their_s:.1f} items/s; {min(ratios)} to {max(ratios)}; "
        f"log-likelihoods at most {apart:.0e} apart",
        at_least=TARGET,
    )


def figures() -> Iterator[Figure | str]:
    """Every part, on one model."""
    if not (DATA / "mmlu").is_dir() or not Path(HARNESS).exists():
        yield "Not measured: no benchmark files beside the project, or no lm-evaluation-harness (scripts/test --all)."
        return
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        scenes(folder / "hellaswag.jsonl")
        ours, theirs = Ours(folder), Theirs(folder)
        yield (
            f"lm-evaluation-harness {theirs.version}, transformers {transformers.__version__}, torch "
            f"{torch.__version__}; a random Llama, {LAYERS} layers of {HIDDEN}, {VOCABULARY} tokens, float32, "
            f"{THREADS} thread; batch {BATCH}, tokenizing included; medians of {ROUNDS} rounds"
        )
        for part in PARTS:
            yield from measured(part, ours, theirs, folder)
        theirs.close()


if __name__ == "__main__":
    sys.exit(show(figures()))
