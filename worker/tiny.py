"""The built-in tiny chat model: a Qwen2 of 0.2 million parameters, trained on generated problems within a minute."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from jobs import durable, locks, rundir
from worker import problems
from worker.failures import DiskFull, WorkerFailure
from worker.problems import Problem

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONTEXT_TOKENS = 2048

_TEMPORARY = ".tiny-training-"
_WAIT_S = 1800.0
"""How long to wait for another process that trains; a busy machine with two slow cores may need minutes."""

_NOTE_STEPS = 100
_TOKENIZER_PROBLEMS = 2000
_ROLE_REPEATS = 50  # often enough for each role to become one token
_SORTED_BATCHES = 4


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights follow from; a changed recipe is another model, in another folder.

    Wider initial weights, a shorter memory of AdamW and a smaller RoPE base than usual let a model this small learn
    arithmetic within 800 steps, measured on the held-out problems.
    """

    version: int = 1
    """Raised when this module trains another way with the same numbers."""
    seed: int = 0
    steps: int = 800
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    adam_betas: tuple[float, float] = (0.9, 0.98)
    gradient_norm: float = 1.0
    vocabulary_size: int = 512
    layers: int = 2
    hidden_size: int = 96
    heads: int = 4
    key_value_heads: int = 2
    feed_forward_size: int = 192
    initializer_range: float = 0.06
    rope_theta: float = 1000.0


RECIPE = Recipe()

Note = Callable[[str], None]
Sample = tuple[list[int], list[int]]
"""Token ids of a prompt with its generation prompt, and of the answer with its end token."""


# --- the folder ------------------------------------------------------------------------------------------------------


def ensure(models_dir: Path, note: Note, recipe: Recipe = RECIPE) -> Path:
    """The folder of the trained model in `models_dir`, trained once per recipe and checked against its manifest.

    A damaged folder is moved aside (`….damaged-N`) and the model trained again. Processes that ask at once wait for
    the first; WorkerFailure when it takes longer than half an hour, DiskFull when the model does not fit.
    """
    folder = models_dir / name(recipe)
    if folder.is_dir() and rundir.damage(folder) is None:
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    with _alone(models_dir, note):
        for leftover in models_dir.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        if folder.is_dir():
            reason = rundir.damage(folder)
            if reason is None:
                return folder
            aside = _move_aside(folder)
            note(f"the built-in model is damaged ({reason}): moved to {aside.name}, training it again")
        _make(folder, note, recipe)
    return folder


def name(recipe: Recipe = RECIPE) -> str:
    """The folder's name: a digest of the recipe, the tokenizer's text, and the start of the endless training text."""
    text = [[problem.question, problem.solution] for problem in itertools.islice(problems.training(recipe.seed), 500)]
    identity = json.dumps([asdict(recipe), CHAT_TEMPLATE, list(_tokenizer_texts()), text])
    return f"tiny-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def save_tokenizer(folder: Path, recipe: Recipe = RECIPE) -> None:
    """Write tokenizer, chat template, config.json and generation_config.json, the same bytes as beside the weights."""
    tokenizer = build_tokenizer(recipe)
    tokenizer.save_pretrained(folder)
    _config(tokenizer, recipe).save_pretrained(folder)
    _generation_config(tokenizer).save_pretrained(folder)


@contextlib.contextmanager
def _alone(models_dir: Path, note: Note) -> Iterator[None]:
    """Hold the lock of everyone who trains in this folder; WorkerFailure when another does for too long."""
    path = models_dir / ".tiny.lock"
    descriptor = locks.take(path)
    if descriptor is None:
        note("waiting for another process that is training the built-in model")
        descriptor = locks.take(path, _WAIT_S)
    if descriptor is None:
        raise WorkerFailure(
            f"Another process has held {path} for {_WAIT_S / 60:.0f} minutes, so the built-in model is not there yet.",
            f"See who it is with: fuser -v {path}",
        )
    try:
        yield
    finally:
        os.close(descriptor)


def _move_aside(folder: Path) -> Path:
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.damaged-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.damaged-{number}"))


def _make(folder: Path, note: Note, recipe: Recipe) -> None:
    """Train into a temporary folder beside and rename it when every byte is on the disk: whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder.parent))
    try:
        durable.replace_whole(temporary / "model.safetensors", _weights(train(recipe, note)))
        save_tokenizer(temporary, recipe)
        files = sorted(temporary.iterdir())
        for file in files:
            with durable.opened(file, os.O_RDWR) as descriptor:
                durable.sync(descriptor)
        durable.save_json(
            temporary / rundir.MANIFEST, {file.name: rundir.entry_of(file.read_bytes()) for file in files}
        )
        temporary.rename(folder)
        durable.sync_folder(folder.parent)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(f"No space is left in {folder.parent} for the built-in model (2 MB).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weights(model: Any) -> bytes:
    """The weights as safetensors. Not by save_pretrained, which shows progress bars and hides that the disk is full."""
    from safetensors.torch import save

    tied = "lm_head.weight"  # the embedding under its other name
    return save({key: tensor for key, tensor in model.state_dict().items() if key != tied}, {"format": "pt"})


# --- tokenizer and configuration -------------------------------------------------------------------------------------


def build_tokenizer(recipe: Recipe = RECIPE) -> Any:
    """A byte-level BPE tokenizer, Qwen2's but for the vocabulary, with the chat template; each digit is a token.

    It has to be Qwen2's: transformers 5 gives a Qwen2 model that class whatever tokenizer.json says, and the class
    normalizes (NFC) and splits text its own way.
    """
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    special = {"eos_token": END, "pad_token": PAD, "unk_token": None}
    backend = Qwen2Tokenizer(**special).backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=recipe.vocabulary_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_tokenizer_texts(), trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        extra_special_tokens=[START],
        model_max_length=CONTEXT_TOKENS,
        **special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _tokenizer_texts() -> Iterator[str]:
    for problem in itertools.islice(problems.training(0), _TOKENIZER_PROBLEMS):
        yield problem.question
        yield problem.solution
    yield from ["system\nuser\nassistant\n"] * _ROLE_REPEATS


def _config(tokenizer: Any, recipe: Recipe) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=len(tokenizer),
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.hidden_size,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        intermediate_size=recipe.feed_forward_size,
        initializer_range=recipe.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _generation_config(tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)


# --- training --------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, note: Note) -> Any:
    """The trained model: fp32 on one CPU thread, the same weights for the same recipe on the same machine.

    AdamW with a linear warm-up and decay; the loss is the mean cross-entropy of the answers' tokens alone.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    tokenizer = build_tokenizer(recipe)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(_config(tokenizer, recipe)).train()
        model.generation_config = _generation_config(tokenizer)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=recipe.adam_betas, weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
        started_s = time.monotonic()
        for step, samples in enumerate(itertools.islice(_batches(tokenizer, recipe), recipe.steps)):
            if step % _NOTE_STEPS == 0:
                note(_progress(step, recipe.steps, time.monotonic() - started_s))
            optimizer.zero_grad()
            _loss(model, samples, tokenizer.pad_token_id).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
            optimizer.step()
            schedule.step()
    return model.eval()


def _loss(model: Any, samples: list[Sample], pad_id: int) -> Any:
    """Mean cross-entropy of the answer tokens (B samples, T positions, N answer tokens in all, H hidden size).

    Padding is on the right, where causal attention never looks from a position that counts, so no mask is needed;
    logits are made for the positions that predict answer tokens alone.
    """
    import torch

    rows = [prompt + answer[:-1] for prompt, answer in samples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])  # (B, T)
    predicting = [
        number * width + len(prompt) - 1 + offset
        for number, (prompt, answer) in enumerate(samples)
        for offset in range(len(answer))
    ]
    targets = torch.tensor([token for _, answer in samples for token in answer])  # (N,)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    logits = model.lm_head(hidden.flatten(0, 1)[predicting])  # (N, V)
    return torch.nn.functional.cross_entropy(logits, targets)


def _batches(tokenizer: Any, recipe: Recipe) -> Iterator[list[Sample]]:
    """Batches of new problems without end, each of similar lengths so that little is padding, in a shuffled order."""
    stream = problems.training(recipe.seed)
    random = Random(recipe.seed)  # noqa: S311 -- shuffles batches
    encode = _encoder(tokenizer)
    size = recipe.batch_size
    while True:
        samples = sorted(encode(list(itertools.islice(stream, size * _SORTED_BATCHES))), key=_length)
        batches = [samples[at : at + size] for at in range(0, len(samples), size)]
        random.shuffle(batches)
        yield from batches


def _length(sample: Sample) -> int:
    return len(sample[0]) + len(sample[1])


def _encoder(tokenizer: Any) -> Callable[[list[Problem]], list[Sample]]:
    """Encodes problems as the chat template would render them: one user turn, the question and nothing else.

    The template is rendered once and split around the question, since rendering it for every problem would take longer
    than a tenth of the training; the tokens are the same because the question stands between a newline and `END`.
    """
    chat = [{"role": "user", "content": "QUESTION"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer.encode(part) for part in text.split("QUESTION"))

    def encode(batch: list[Problem]) -> list[Sample]:
        questions = tokenizer([problem.question for problem in batch])["input_ids"]
        answers = tokenizer([problem.solution for problem in batch])["input_ids"]
        return [
            (before + question + after, [*answer, tokenizer.eos_token_id])
            for question, answer in zip(questions, answers, strict=True)
        ]

    return encode


def _rate(step: int, recipe: Recipe) -> float:
    """The share of the learning rate at a step: up over the warm-up, down to zero at the end."""
    return min(1.0, (step + 1) / recipe.warmup_steps) * (1 - step / recipe.steps)


def _progress(step: int, steps: int, elapsed_s: float) -> str:
    if step == 0:
        return f"training the built-in model, once: {steps} steps"
    left_s = elapsed_s / step * (steps - step)
    return f"training the built-in model: step {step} of {steps}, about {left_s:.0f} s left"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread inside the block: matrices this small only lose time to a second one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
