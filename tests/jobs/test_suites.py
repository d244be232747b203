"""Jobs of several parts: a TOML file of them, what each part takes, and the keys of their rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import shares, spec, suites

SUITE = """
summary = "two parts"
story = "evaluate"
[parameters]
model = "tiny"
batch_size = 4
[parts.eval-mmlu]
sample = 7
[parts.eval-gsm8k]
samples = 2
"""


def load(text: str) -> spec.Job:
    """The job of that text."""
    Path("mine.toml").write_text(text)
    return spec.find("mine", [Path()])


def test_a_part_has_its_own_parameters_and_those_of_all() -> None:
    """What the job sets counts for every part; all else is set by the name of the part's task, and filled in."""
    job = load(SUITE)
    params = job.fill({"batch_size": "8", "mmlu.shots": "0", "gsm8k.limit": "3"})
    document = {"params": params, "parts": [{"task": part.task, "takes": part.takes()} for part in job.parts]}
    mmlu, gsm8k = suites.parts(document)
    assert (mmlu["task"], mmlu["params"]["sample"], mmlu["params"]["shots"], mmlu["limit"]) == ("mmlu", 7, 0, None)
    assert (gsm8k["task"], gsm8k["params"]["samples"], gsm8k["params"]["shots"], gsm8k["limit"]) == ("gsm8k", 2, 0, 3)
    assert {part["params"]["batch_size"] for part in (mmlu, gsm8k)} == {8}
    assert "reranker" not in gsm8k["params"]
    assert [part["limit"] for part in suites.parts({**document, "limit": 5})] == [5, 5]
    assert suites.name_in(gsm8k, "samples") == "gsm8k.samples"
    plain = {"task": "gsm8k", "params": {"samples": 1}}
    assert suites.parts(plain) == [plain]


def test_keys_of_parts_begin_with_their_task() -> None:
    """Where all examples of a run are listed they are called by their keys, of which each part makes its own rows."""
    job = load(SUITE)
    takes = [{"task": part.task, "takes": part.takes()} for part in job.parts]
    document = {"params": job.fill({}), "parts": takes}
    mmlu, gsm8k = suites.parts(document)
    names = [shares.listed(part, "7") for part in (mmlu, gsm8k)]
    assert names == ["mmlu/test/7", "gsm8k/test/7"]
    keys = shares.Keys(document)
    assert [keys.rows(name) for name in names] == [["mmlu/test/7#0"], ["gsm8k/test/7#0", "gsm8k/test/7#1"]]
    plain = shares.Keys({"task": "gsm8k", "params": {"split": "test", "samples": 2}})
    assert (plain.example("7"), plain.rows("7")) == ("gsm8k/test/7", ["gsm8k/test/7#0", "gsm8k/test/7#1"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("eval-mmlu", "eval-mmmlu", "did you mean eval-mmlu"),
        ("eval-mmlu", "baseline", "has parts itself"),
        ("eval-mmlu", "mine", "has parts itself"),
        ("eval-mmlu", "train-lora", "has no task"),
        ("sample = 7", "samplex = 7", "unknown parameter 'samplex': did you mean sample"),
        ("sample = 7", 'sample = "x"', "is not a whole number"),
        ("sample = 7", "batch_size = 7", "is set for all parts"),
        ("batch_size = 4", "lr = 0.1", "no part has a parameter 'lr'"),
        ("[parts.eval-mmlu]\nsample = 7", "parts = 3", "unknown key|is not TOML|'parts'"),
        ('story = "evaluate"', 'story = "evaluate"\ntask = "mmlu"', "each part has the task"),
        ('story = "evaluate"', 'story = "train"', "belongs to the story"),
        ('story = "evaluate"', 'story = "evaluate"\nfrozen = "yes"', "'frozen' is true or false"),
    ],
)
def test_faults_of_a_suite_are_named(old: str, new: str, said: str) -> None:
    """A part that is no evaluation, a parameter that it has not, or that is not its own: each with its reason."""
    assert old in SUITE
    with pytest.raises(spec.SpecError, match=said):
        load(SUITE.replace(old, new, 1))


def test_two_parts_of_one_task_are_refused() -> None:
    """Their rows would have the same keys, and one of each pair would be lost."""
    catalogue = (spec.CATALOG / "eval-mmlu.toml").read_text()
    Path("other.toml").write_text(catalogue.replace('name = "eval-mmlu"', 'name = "other"'))
    with pytest.raises(spec.SpecError, match="two parts have the task mmlu"):
        load(SUITE + "[parts.other]\n")


def test_a_value_for_all_parts_suits_every_part() -> None:
    """An engine that a part does not know is refused, and the part is named."""
    job = load(SUITE.replace("batch_size = 4", 'engine = "auto"'))
    assert job.fill({"engine": "hf"})["engine"] == "hf"
    with pytest.raises(spec.SpecError, match="mmlu: engine='vllm'"):
        job.fill({"engine": "vllm"})
