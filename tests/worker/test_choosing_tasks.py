"""MMLU, ARC and HellaSwag: examples of every form they are published in, what is asked, and which choice is taken."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import data_folder
from worker import sources, tasks, worked
from worker.failures import BadRecord, ConfigFailure
from worker.tasks import arc, choosing, hellaswag, mmlu

MMLU = {"question": " Which? ", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "us_foreign_policy"}
ARC = {
    "id": "Mercury_1",
    "question": "Which?",
    "choices": {"text": ["up", "down"], "label": ["1", "2"]},
    "answerKey": "2",
}
SCENE = {
    "activity_label": "Roofing",
    "ctx_a": "A [header] man",
    "ctx_b": "he WALKS",
    "endings": ["[step] on.", "off [title] Now  go.", "up", "x"],
    "label": "1",
}


def test_mmlu_is_asked_as_published() -> None:
    """Description, shots with their letters in order, the problem: exactly the words of the reference."""
    example, shot = mmlu.examples([{**MMLU, "id": "x"}, {**MMLU, "question": "What?", "answer": "D"}])
    assert mmlu.context(example, [shot]) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "What?\nA. a\nB. b\nC. c\nD. d\nAnswer: D\n\n"
        "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    assert (example.id, example.subject, example.target) == ("x", "us_foreign_policy", "2")
    assert example.choices == ("A", "B", "C", "D")


def test_mmlu_is_read_in_every_form() -> None:
    """The Hub's list, columns of the CSV files, lettered columns and letters as answers are one question."""
    columns = dict(zip(mmlu.COLUMNS, (MMLU["question"], "a", "b", "c", "d", "2"), strict=True))
    lettered = {"question": MMLU["question"], "A": "a", "B": "b", "C": "c", "D": "d", "answer": "C"}
    forms = [MMLU, {**columns, "subject": MMLU["subject"]}, {**lettered, "subject": MMLU["subject"]}]
    assert len({mmlu.examples([form])[0] for form in forms}) == 1


def test_only_subjects_that_are_there_can_be_taken() -> None:
    """`subjects` takes those named, in dataset order; a name that no record has is refused with the nearest one."""
    records = [{**MMLU, "subject": name} for name in ("virology", "anatomy", "virology", "law")]
    found = mmlu.examples(records, subjects="anatomy, virology")
    assert [example.subject for example in found] == ["virology", "anatomy", "virology"]
    with pytest.raises(ConfigFailure, match="no subject 'anatony': did you mean anatomy"):
        mmlu.examples(records, subjects="anatony")


def test_arc_takes_letters_digits_and_numbers() -> None:
    """The right choice is the one whose label is the key, or of ready-made rows the one numbered `gold`."""
    published, ready = arc.examples([ARC, {"query": "Question: Which?", "choices": ["up", "down"], "gold": 1}])
    assert (published.id, published.problem, published.target) == ("Mercury_1", "Question: Which?\nAnswer:", "1")
    assert (ready.problem, ready.choices, ready.target) == (published.problem, published.choices, published.target)
    assert arc.context(published, [ready]) == "Question: Which?\nAnswer: down\n\nQuestion: Which?\nAnswer:"


def test_scenes_are_cleaned_as_published() -> None:
    """Titles become full stops, brackets go, double spaces become one, and the second part begins with a capital."""
    (example,) = hellaswag.examples([SCENE])
    assert example.problem == "Roofing: A man He walks"
    assert example.choices == (" on.", "off. Now go.", "up", "x")
    assert example.target == "1"


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (mmlu, {"answer": None}, "row 2 has no field 'answer'"),
    (mmlu, {"subject": None}, "row 2 has no field 'subject'"),
    (mmlu, {"answer": 4}, "the choices are 0 to 3"),
    (mmlu, {"answer": True}, "the choices are 0 to 3"),
    (mmlu, {"choices": ["a", "b", "c"]}, "four choices"),
    (mmlu, {"question": " "}, "not empty"),
    (arc, {"answerKey": "C"}, "none of the labels 1, 2"),
    (arc, {"choices": ["up", "down"]}, "'text' and 'label'"),
    (arc, {"choices": {"text": ["up", ""], "label": ["1", "2"]}}, "not empty"),
    (hellaswag, {"label": ""}, "no label"),
    (hellaswag, {"label": "9"}, "the choices are 0 to 3"),
    (hellaswag, {"endings": ["a", "[b]", "c", "d"]}, "empty once it is cleaned"),
    (hellaswag, {"endings": "abcd"}, "a list of two choices"),
    (hellaswag, {"activity_label": None}, "row 2 has no field 'activity_label'"),
]


@pytest.mark.parametrize(("task", "change", "words"), BAD, ids=[f"{case[0].NAME} {case[2]}" for case in BAD])
def test_a_bad_row_is_refused_by_number_and_field(task: Any, change: dict[str, Any], words: str) -> None:
    """A row that lacks a field, or whose field cannot be, is named with what is wrong with it."""
    good = {mmlu: MMLU, arc: ARC, hellaswag: SCENE}[task]
    bad = {key: value for key, value in {**good, "id": "2", **change}.items() if value is not None}
    with pytest.raises(BadRecord) as failed:
        task.examples([good, bad])
    assert words in failed.value.message
    assert "row 2" in failed.value.message


def test_the_largest_likelihood_is_taken_whole_by_character_and_by_byte() -> None:
    """The three rules divide by nothing, characters and bytes; the first of equals wins."""
    assert choosing.answers([-4.0, -5.0, -5.5], ["ab", "abcd", "äöüß"]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}
    assert choosing.answers([-2.0, -2.0], ["a", "b"]) == {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    assert choosing.scores({"acc": 0, "acc_norm": 1}, 1) == {"acc": 0.0, "acc_norm": 1.0}


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if tasks.get(name).KIND == tasks.CHOOSES])
def test_generated_problems_fit_every_task_that_chooses(name: str) -> None:
    """The built-in model's problems come with choices that each task can weigh, no id twice, shots apart from tests."""
    task = tasks.get(name)
    found, shots = (
        task.examples(sources.load(sources.Source("generated", split, with_choices=True)).rows)
        for split in ("test", task.SHOTS_SPLIT)
    )
    assert len({example.id for example in found}) == len(found) == 500
    assert not {example.id for example in found} & {example.id for example in shots}
    rights = [int(example.target) for example in found]
    assert all(0.15 < rights.count(place) / 500 < 0.35 for place in range(4))


def params(**settings: Any) -> dict[str, Any]:
    return {"model": "m", "split": "test", "subjects": None, "shots": 5, "shots_dataset": None, **settings}


def test_the_published_folder_of_mmlu_is_read_whole() -> None:
    """57 subjects, 14,042 questions, five shots each in order, ids that are all different."""
    folder = data_folder("mmlu")
    asked = params(dataset=str(folder))
    found, records = worked.examples(asked, mmlu)
    assert len(found) == 14_042 == len({example.id for example in found})
    assert len({example.subject for example in found}) == 57
    shots = worked.shots(asked, mmlu)
    anatomy = next(example for example in found if example.subject == "anatomy")
    assert [shot.subject for shot in shots.of(anatomy)] == ["anatomy"] * 5
    assert "embryological origin of the hyoid bone" in shots.of(anatomy)[0].problem
    assert records.name == f"{folder} (test)"


def test_one_file_of_mmlu_tells_its_subject_by_its_name(tmp_path: Path) -> None:
    """A file with or without header is read alike; without a place for shots the refusal says what to do."""
    lines = (data_folder("mmlu") / "test" / "anatomy_test.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    bare, headed = tmp_path / "bare" / "anatomy_test.csv", tmp_path / "anatomy_test.csv"
    bare.parent.mkdir()
    headed.write_text("".join(lines), encoding="utf-8")
    bare.write_text("".join(lines[1:]), encoding="utf-8")
    first, second = (worked.examples(params(dataset=str(path)), mmlu)[0] for path in (bare, headed))
    assert first == second
    assert {example.subject for example in first} == {"anatomy"}
    with pytest.raises(ConfigFailure, match="no split dev") as refused:
        worked.shots(params(dataset=str(headed)), mmlu)
    assert "--set shots=0" in refused.value.hint


def test_too_few_shots_of_a_subject_are_said() -> None:
    """More shots than a subject has are refused, with the number there are."""
    pool = mmlu.examples([{**MMLU, "answer": 0}, {**MMLU, "question": "What?"}])
    with pytest.raises(ConfigFailure, match="2 worked examples of us_foreign_policy") as refused:
        worked.Shots(pool, 3, by_subject=True).of(pool[0])
    assert refused.value.hint == "--set shots=2"


def test_the_published_files_of_arc_and_hellaswag_are_read() -> None:
    """All 1,172 questions of ARC challenge, and all 10,042 scenes, become examples with ids of their own."""
    path = data_folder("arc_challenge") / "arc_challenge_llmfoundry.jsonl"
    found = arc.examples(sources.load(sources.Source(str(path))).rows)
    assert len({example.id for example in found}) == len(found) == 1172
    lines = bz2.decompress((data_folder("hellaswag") / "hellaswag_val_full.txt.bz2").read_bytes()).decode().split("\n")
    scenes = [
        {"query": lines[at], "choices": lines[at + 2 : at + 6], "gold": lines[at + 1]}
        for at in range(0, len(lines) - 5, 6)
    ]
    assert len(hellaswag.examples(json.loads(json.dumps(scenes)))) == 10_042
