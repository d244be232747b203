"""The built-in tiny model: trained once and whole, checked, repaired, and honest about what it was trained on."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jobs import durable, locks
from worker import problems, tiny
from worker.failures import WorkerFailure
from worker.generators import Prompt, Sampling
from worker.generators.hf import HfGenerator
from worker.models import ModelRequest, load_model
from worker.tasks import gsm8k

ROOT = Path(__file__).parent.parent.parent
QUICK = tiny.Recipe(steps=3, batch_size=4)
CALL = (
    "import os, signal, sys; from pathlib import Path; from worker import tiny\n"
    "def note(words):\n"
    "    print(words, flush=True)\n"
    "    if len(sys.argv) > 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    "print(tiny.ensure(Path(sys.argv[1]), note, tiny.Recipe(steps=3, batch_size=4)).name)\n"
)
"""A process of its own that asks for the quick model; with a second argument it dies in the middle of training."""
GENERATION_PROMPT = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickly trained model that tests read but do not touch."""
    return tiny.ensure(tmp_path_factory.mktemp("kept"), print, QUICK)


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """The same model in a models folder of the test's own."""
    return Path(shutil.copytree(kept, tmp_path / "models" / kept.name))


@pytest.fixture(scope="module")
def tokenizer(kept: Path) -> Any:
    return AutoTokenizer.from_pretrained(kept)


def ask(models_dir: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CALL, str(models_dir), *words], env=environment, stdout=subprocess.PIPE, text=True
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- trained once, whole or not at all -------------------------------------------------------------------------------


def test_a_trained_model_is_not_trained_again(folder: Path) -> None:
    """Asking again says nothing and writes nothing, not even a lock file."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said: list[str] = []
    assert tiny.ensure(folder.parent, said.append, QUICK) == folder
    assert said == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_manifest_names_every_file(kept: Path) -> None:
    """Every file but the manifest stands in it with its size, and weights, tokenizer and settings are all there."""
    listed = json.loads((kept / "MANIFEST.json").read_text())
    sizes = {path.name: path.stat().st_size for path in kept.iterdir() if path.name != "MANIFEST.json"}
    assert {file: entry["bytes"] for file, entry in listed.items()} == sizes
    assert {"model.safetensors", "tokenizer.json", "config.json", "generation_config.json"} <= set(listed)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_byte_is_found_said_and_repaired(folder: Path, file: str) -> None:
    """A damaged folder is kept aside under a free number, its damage said, and the same bytes are trained anew."""
    whole = contents(folder)
    (folder.parent / f"{folder.name}.damaged-1").mkdir()
    damaged = bytearray(whole[file])
    damaged[len(damaged) // 2] ^= 1
    (folder / file).write_bytes(damaged)
    said: list[str] = []
    assert tiny.ensure(folder.parent, said.append, QUICK) == folder
    assert contents(folder) == whole
    assert contents(folder.parent / f"{folder.name}.damaged-2")[file] == damaged
    assert file in said[0]
    assert "damaged-2" in said[0]


@pytest.mark.parametrize("file", ["model.safetensors", "MANIFEST.json"])
def test_a_missing_file_is_repaired(folder: Path, file: str) -> None:
    """A folder without one of its files, or without its manifest, is trained anew."""
    whole = contents(folder)
    (folder / file).unlink()
    tiny.ensure(folder.parent, print, QUICK)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b'{"config.json": 3}', b'{"..": {"bytes": 1, "sha256": ""}}', b"\xff"]
)
def test_a_manifest_of_another_form_counts_as_damage(folder: Path, manifest: bytes) -> None:
    """Whatever a manifest holds, it is compared or found unreadable, never a crash."""
    (folder / "MANIFEST.json").write_bytes(manifest)
    assert tiny.damage(folder) is not None


@pytest.mark.slow
def test_a_killed_training_leaves_nothing_that_looks_whole(tmp_path: Path, kept: Path) -> None:
    """SIGKILL in the middle leaves no model folder; the next call sweeps what is left and trains."""
    killed = ask(tmp_path / "models", "die")
    assert killed.wait(60) == -signal.SIGKILL
    killed.communicate()
    leftovers = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert leftovers
    assert not any(path.name == kept.name for path in leftovers)
    trained = tiny.ensure(tmp_path / "models", print, QUICK)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == [trained]
    assert contents(trained) == contents(kept)


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are synced while the final folder does not exist, and its parent is synced once it does."""
    synced: set[int] = set()
    parents: list[bool] = []
    folder = tmp_path / tiny.name(QUICK)
    sync, sync_folder = durable.sync, durable.sync_folder

    def spy(descriptor: int) -> None:
        assert not folder.exists()
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def spy_folder(path: Path) -> None:
        sync_folder(path)
        parents.extend([folder.exists()] if path == tmp_path else [])

    monkeypatch.setattr(durable, "sync", spy)
    monkeypatch.setattr(durable, "sync_folder", spy_folder)
    tiny.ensure(tmp_path, print, QUICK)
    assert {path.stat().st_ino for path in folder.iterdir()} <= synced
    assert parents[-1]


def test_an_interrupted_training_cleans_up(tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves only the lock file."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.ensure(tmp_path / "models", interrupt, QUICK)
    assert [path.is_file() for path in (tmp_path / "models").iterdir()] == [True]


@pytest.mark.slow
def test_two_processes_at_once_train_once(tmp_path: Path, kept: Path) -> None:
    """Both wait and say so; then one trains, and the other takes what it trained, which is also what we trained."""
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    with locks.held(models_dir / ".tiny.lock", 0):
        asking = [ask(models_dir) for _ in range(2)]
        waiting = [process.stdout.readline() for process in asking]  # type: ignore[union-attr]
    heard = [process.communicate(timeout=120)[0].splitlines() for process in asking]
    assert all("waiting" in words for words in waiting)
    assert sorted(map(len, heard)) == [1, 2]
    assert {words[-1] for words in heard} == {kept.name}
    assert contents(models_dir / kept.name) == contents(kept)


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another holds the lock for too long, a failure names the lock file."""
    monkeypatch.setattr(tiny, "_WAIT_S", 0.05)
    said: list[str] = []
    with locks.held(tmp_path / ".tiny.lock", 0), pytest.raises(WorkerFailure, match=r"\.tiny\.lock"):
        tiny.ensure(tmp_path, said.append, QUICK)
    assert len(said) == 1


def test_another_recipe_is_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, seed, template and training problems are all in the name."""
    names = [tiny.name(recipe) for recipe in (tiny.RECIPE, QUICK, tiny.Recipe(seed=9), tiny.Recipe(steps=9))]
    monkeypatch.setattr(tiny, "CHAT_TEMPLATE", tiny.CHAT_TEMPLATE + " ")
    names.append(tiny.name())
    monkeypatch.undo()
    monkeypatch.setattr(problems, "_NAMES", ("Zoe", *problems._NAMES[1:]))
    names.append(tiny.name())
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    assert tiny.name() == names[0]


# --- tokenizer and template ------------------------------------------------------------------------------------------


def test_the_tokenizer_alone_is_the_one_beside_the_weights(tmp_path: Path, kept: Path) -> None:
    """Without training, the same bytes but for weights and manifest are written, and both Auto classes load them."""
    tiny.save_tokenizer(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    whole = contents(kept)
    assert written == {file: whole[file] for file in whole if file not in ("model.safetensors", "MANIFEST.json")}
    loaded, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tiny.build_tokenizer().backend_tokenizer.to_str()
    assert len(loaded) == config.vocab_size
    assert config.max_position_embeddings >= 2048
    assert config.model_type == "qwen2"


def test_special_tokens_are_distinct(tokenizer: Any, kept: Path) -> None:
    """End and padding are two tokens; the generation settings and the tokenizer agree on both; there is no BOS."""
    settings = json.loads((kept / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eos_token_id]
    assert settings["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|pad|>", None)
    assert tokenizer("3 pens")["input_ids"] == tokenizer("3 pens", add_special_tokens=False)["input_ids"]


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    """Text of any script survives encoding and decoding, in Unicode's composed form, as with any Qwen2 tokenizer."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_every_byte_has_a_token(tokenizer: Any) -> None:
    """The 256 symbols that byte-level BPE writes bytes with are all in the vocabulary."""
    assert len(set(tiny._byte_alphabet())) == 256
    assert set(tiny._byte_alphabet()) <= set(tokenizer.get_vocab())


@given(number=st.integers(0, 10**12))
def test_digits_are_tokens_of_their_own(tokenizer: Any, number: int) -> None:
    """A number is as many tokens as it has digits, wherever it stands."""
    assert tokenizer.tokenize(str(number)) == list(str(number))
    assert [token for token in tokenizer.tokenize(f"Ada has {number}.") if token.isdigit()] == list(str(number))


def test_the_template_ends_in_one_generation_prompt(tokenizer: Any) -> None:
    """One generation prompt at the very end when asked for, none otherwise, over one and several turns."""
    turns = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3?"},
    ]
    for chat in (turns[:1], turns):
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        told = tokenizer.apply_chat_template(chat, tokenize=False)
        assert asked == told + GENERATION_PROMPT
        assert told.count(GENERATION_PROMPT) == len(chat) // 2
        assert told.count("<|im_end|>\n") == len(chat)


# --- training --------------------------------------------------------------------------------------------------------


def test_the_model_is_trained_on_the_prompts_it_will_be_asked(tokenizer: Any) -> None:
    """Training prompts are token for token what the GSM8K task sends; answers are solutions with their end token."""
    made = list(itertools.islice(problems.training(5), 200))
    samples = tiny._encoder(tokenizer)(made)
    for problem, (prompt, answer) in zip(made, samples, strict=True):
        [example] = gsm8k.examples([{"question": problem.question, "answer": problem.solution}])
        chat = gsm8k.messages(example, [])
        assert prompt == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(answer) == problem.solution + tokenizer.eos_token


def test_batches_hold_each_problem_of_the_stream_once(tokenizer: Any) -> None:
    """Sorting by length loses and repeats nothing."""
    batches = list(itertools.islice(tiny._batches(tokenizer, tiny.Recipe(batch_size=4)), 8))
    asked = [tokenizer.decode(prompt) for batch in batches for prompt, _ in batch]
    stream = [problem.question for problem in itertools.islice(problems.training(tiny.Recipe().seed), 32)]
    assert sorted(re.findall(r"user\n(.*)<\|im_end\|>", "".join(asked))) == sorted(stream)


def test_only_answer_tokens_count(kept: Path, tokenizer: Any) -> None:
    """The loss is transformers' own with every prompt and padding position left out, whatever the padding holds."""
    model = AutoModelForCausalLM.from_pretrained(kept)
    samples = next(tiny._batches(tokenizer, QUICK))
    width = max(len(prompt + answer) for prompt, answer in samples)
    padding = [width - len(prompt + answer) for prompt, answer in samples]
    ids = [[*p, *a, *[0] * more] for (p, a), more in zip(samples, padding, strict=True)]
    labels = [[*[-100] * len(p), *a, *[-100] * more] for (p, a), more in zip(samples, padding, strict=True)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
        assert tiny._loss(model, samples, 0).item() == pytest.approx(expected.item(), rel=1e-5)
        assert tiny._loss(model, samples, 7).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_leaves_torch_as_it_was() -> None:
    """The number of threads and the caller's random numbers are untouched."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(3)
    tiny.train(QUICK, print)
    try:
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.rand(4), expected)
    finally:
        torch.set_num_threads(threads)


def test_training_says_how_far_it_is() -> None:
    """Progress names the step and the time left, and begins with how many steps there will be."""
    said: list[str] = []
    tiny.train(tiny.Recipe(steps=201, batch_size=1), said.append)
    assert said[0] == "training the built-in model, once: 201 steps"
    assert [re.sub(r"about \d+ s", "about N s", words) for words in said[1:]] == [
        "training the built-in model: step 100 of 201, about N s left",
        "training the built-in model: step 200 of 201, about N s left",
    ]


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    """Near nothing at the first step, up over the warm-up, at most 1, and near nothing at the last step."""
    rates = [tiny._rate(step, tiny.RECIPE) for step in range(tiny.RECIPE.steps)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top == tiny.RECIPE.warmup_steps - 1
    assert 0 < rates[-1] < rates[0] < 0.1 < 0.9 < rates[top] <= 1


def test_the_model_answers_most_held_out_problems_and_is_weak_at_comparisons(models: Path) -> None:
    """Greedily over half of the test problems but not all; comparisons by far the fewest; five samples hold more."""
    examples = gsm8k.examples(problems.records("test"))[:250]
    loaded = load_model(ModelRequest(str(tiny.ensure(models, print))))
    assert 200_000 < loaded.parameters < 400_000
    greedy = marks(loaded, examples, Sampling(0.0, 1.0, 120), samples=1)
    sampled = marks(loaded, examples, Sampling(0.7, 0.9, 120), samples=5)
    by_subject: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        by_subject[str(example.subject)].append(greedy[example.id][0])
    means = {subject: sum(found) / len(found) for subject, found in by_subject.items()}
    mean = sum(means.values()) / len(means)
    assert 0.5 < mean < 0.9
    assert min(means, key=means.__getitem__) == "comparison"
    assert means["comparison"] < mean - 0.15
    oracle = sum(max(found) for found in sampled.values()) / len(examples)
    assert oracle > sum(map(sum, sampled.values())) / (5 * len(examples)) + 0.03


def marks(loaded: Any, examples: list[Any], sampling: Sampling, samples: int) -> dict[str, list[float]]:
    """The scores of each example's completions."""
    prompts = []
    for example in examples:
        chat = gsm8k.messages(example, [])
        ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompts += [Prompt(f"{example.id}#{sample}", tuple(ids), sample) for sample in range(samples)]
    targets = {example.id: example.target for example in examples}
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, completion in HfGenerator(loaded, None, print).generate(prompts, sampling):
        example_id = prompt.key.partition("#")[0]
        found[example_id].append(gsm8k.score(completion.text, targets[example_id]).scores["numeric"] or 0.0)
    return found
