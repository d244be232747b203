"""GSM8K: what each rule finds and scores, the examples made of records, and the chat sent."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import tasks
from worker.failures import BadRecord
from worker.tasks import gsm8k

GOLD = "He makes 130,000-60,000=$<<130000-60000=70000>>70,000.\n#### 70000"
CASES = (
    # what the completion does, the completion, then 1 or 0 for numeric (ours), strict, flexible (lm-eval 0.4.13's)
    ("as the reference writes it", "He makes 70,000.\n#### 70000", 1, 1, 1),
    ("thousands separator", "#### 70,000", 1, 1, 1),
    ("no space after the mark", "####70000", 1, 0, 1),
    ("two spaces after the mark", "####  70000", 1, 0, 1),
    ("currency", "#### $70,000", 1, 0, 1),
    ("needless decimals", "#### 70000.00", 1, 0, 0),
    ("final dot", "#### 70000.", 1, 1, 1),
    ("unit after the number", "#### 70000 dollars", 1, 1, 1),
    ("prose with currency and decimals", "The answer is $70,000.00", 1, 0, 0),
    ("prose with final dot", "The answer is 70000.", 1, 0, 1),
    ("boxed", r"So it is \boxed{70000}", 1, 0, 1),
    ("boxed, then prose with a number", r"\boxed{70,000} in 2 years", 1, 0, 0),
    ("prose with a later number", "He makes 70000 dollars in 2 years", 0, 0, 0),
    ("runs on into a second question", "#### 70000\n\nQuestion: Tom has 3 apples.\nAnswer: He has 3", 1, 1, 0),
    ("two marks, the last one right", "#### 5\nLet me check that.\n#### 70000", 1, 0, 1),
    ("two marks, the first one right", "#### 70000\nLet me check that.\n#### 5", 0, 1, 0),
    ("wrong number", "#### 7000", 0, 0, 0),
    ("negative", "#### -70000", 0, 0, 0),
    ("bold", "#### **70000**", 1, 0, 1),
    ("mark without a number after it", "He makes 70000.\n#### ", 1, 0, 1),
    ("nothing", "", 0, 0, 0),
    ("no number", "I cannot answer that.", 0, 0, 0),
)


@pytest.mark.parametrize(("text", "expected"), [(case[1], case[2:]) for case in CASES], ids=[case[0] for case in CASES])
def test_every_kind_of_completion_scores_as_the_table_says(text: str, expected: tuple[int, int, int]) -> None:
    """Each kind of completion gets the numeric score we mean and the two scores the reference tool gives."""
    assert tuple(gsm8k.score(text, GOLD).scores[rule] for rule in gsm8k.RULES) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 00070", "70"),
        ("#### -0.0", "0"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### -$5.50", "-5.5"),
        (r"#### -\$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 12%", "12"),
        ("#### .5", "0.5"),
        ("#### 3/4", "0.75"),
        ("#### 2 1/2", "2.5"),
        ("#### 4/6", "2/3"),
        ("#### -1/3", "-1/3"),
        ("#### 5/0", "5/0"),
        ("#### 6/3 hours", "2"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{2\dfrac{1}{2}}", "2.5"),
        (r"\boxed{70{,}000 \text{ dollars}}", "70000"),
        (r"$70\,000$", "70000"),
        (r"\boxed{x_1 = 5} and so on, 7 times", "5"),
        (r"\boxed{\text{none}} of the 9", "9"),
        (r"\boxed{12", "12"),
        ("70\N{NARROW NO-BREAK SPACE}000", "70000"),
        ("They are 1,2,3", "3"),
        ("It is 10-3", "3"),
        ("(4)-3", "3"),
        ("It is 16 - 20 = -4.", "-4"),
        ("#### Step 4: add up\n3+4=7", "7"),
        ("#### Final Answer\n\\boxed{70000} in 2 years", "70000"),
        ("The answer is 8.\n#### Done", "8"),
        ("1" * 5000, "1" * 5000),
        ("1,234,567.8900", "1234567.89"),
    ],
)
def test_a_number_is_found_and_written_one_way(text: str, number: str) -> None:
    """Every spelling of a number comes out as its one canonical string."""
    assert gsm8k.canonical_number(text) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.sampled_from(["{:,}", "{}", "{}0", "${:,}"]))
def test_spelling_does_not_change_a_number(value: object, spelling: str) -> None:
    """Separators, currency and trailing zeros never change which number is found."""
    plain = gsm8k.canonical_number(f"#### {value:f}")
    assert gsm8k.canonical_number("#### " + spelling.format(value)) == plain
    assert gsm8k.canonical_number(f"the answer is {plain}.") == plain


@given(st.text(alphabet="0123456789.,$-/ )ax", max_size=60))
def test_the_last_number_is_that_of_a_scan_of_the_whole_text(text: str) -> None:
    """Looking only where the last digit stands finds the same number as scanning all of the text."""
    scanned = [found.span() for found in gsm8k._NUMBER.finditer(text)]
    last = gsm8k._last_number(text)
    assert (last and last.span()) == (scanned[-1] if scanned else None)


@given(st.text(alphabet="0123456789.,$-/# \n{}\\boxedfrac", max_size=200))
def test_any_text_is_scored(text: str) -> None:
    """No text makes a rule fail, and one with no answer scores 0.0, never null."""
    verdict = gsm8k.score(text, "5")
    assert all(score in (0.0, 1.0) for score in verdict.scores.values())
    assert all(verdict.scores[rule] == 0.0 for rule, answer in verdict.answers.items() if answer is None)


def test_equal_answers_are_equal_strings() -> None:
    """The headline answer of differently written equal numbers is one string, so that votes can be counted."""
    texts = ("#### 70,000", "#### $70000.00", r"\boxed{70000}", "It is 70000.")
    assert {gsm8k.score(text, GOLD).answers[gsm8k.HEADLINE] for text in texts} == {"70000"}


def test_a_target_without_number_is_not_scored_numerically() -> None:
    """A target that holds no number gives null, not zero, by the numeric rule."""
    assert gsm8k.score("#### 5", "unknown").scores["numeric"] is None


def test_the_module_is_a_task() -> None:
    """The registry gives the module with all that a task has, and its headline is one of its rules."""
    task = tasks.get("gsm8k")
    assert task.NAME == "gsm8k"
    assert task.HEADLINE in task.RULES
    assert set(task.score("1", "1").scores) == set(task.RULES)


RECORD = {"question": "How many?", "answer": "3*4=<<3*4=12>>12\n#### 1,012"}


def test_an_example_holds_problem_target_and_clean_solution() -> None:
    """A record becomes an example whose solution has lost its calculator annotations and kept its marked answer."""
    (example,) = gsm8k.examples([{**RECORD, "subject": "counting"}])
    assert (example.problem, example.target, example.subject) == ("How many?", "1,012", "counting")
    assert example.solution == "3*4=12\n#### 1,012"


def test_ids_come_from_the_content_and_repeats_are_numbered() -> None:
    """Ids are the question's digest, whatever stands around it; a repeated question gets a suffix."""
    other = {"question": "Other?", "answer": "#### 1"}
    digest = hashlib.sha256(b"How many?").hexdigest()[:12]
    ids = [example.id for example in gsm8k.examples([other, RECORD, RECORD, RECORD])]
    assert ids[1:] == [digest, f"{digest}-2", f"{digest}-3"]
    assert gsm8k.examples([RECORD])[0].id == digest


def test_given_ids_are_kept() -> None:
    """An id that a record brings is used as it is, a whole number too."""
    records = [{**RECORD, "id": "a-1"}, {**RECORD, "id": 0}]
    assert [example.id for example in gsm8k.examples(records)] == ["a-1", "0"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"answer": "#### 1"}, "'question'"),
        ({"question": "Q"}, "'answer'"),
        ({"question": "Q", "answer": None}, "'answer'"),
        ({"question": " ", "answer": "#### 1"}, "'question'"),
        ({"question": ["Q"], "answer": "#### 1"}, "'question'"),
        ({"question": "Q", "answer": "so it is\n#### none"}, "no gold number"),
        ({"question": "Q", "answer": "It is 5 of the 7."}, "no gold number"),
        ({"question": "Q", "answer": 1.5}, "'answer'"),
        ({**RECORD, "id": "a b"}, "'a b'"),
        ({**RECORD, "id": "x" * 101}, "id"),
        ({**RECORD, "id": "first"}, "row 1"),
    ],
)
def test_a_bad_record_is_named(record: dict[str, object], words: str) -> None:
    """A record that cannot be used is refused by its row, counted from 1, and by what is wrong with it."""
    with pytest.raises(BadRecord) as failed:
        gsm8k.examples([{**RECORD, "id": "first"}, record])
    assert "row 2" in failed.value.message
    assert words in failed.value.message


@pytest.mark.parametrize("answer", [12, "12", "$1,012", "12.5", "50%"])
def test_a_bare_number_is_a_gold_answer(answer: object) -> None:
    """An answer that is nothing but a number needs no mark; as a shot it is shown with one."""
    (example,) = gsm8k.examples([{"question": "Q", "answer": answer}])
    assert (example.target, example.solution) == (str(answer), f"#### {answer}")


def test_zero_shot_is_the_bare_question() -> None:
    """Without shots and instruction, the chat is one user turn holding the question and nothing else."""
    (example,) = gsm8k.examples([RECORD])
    assert gsm8k.messages(example, []) == [{"role": "user", "content": "How many?"}]


def test_shots_come_first_and_carry_the_instruction() -> None:
    """Shots are earlier turns with their clean solutions, and an instruction follows every question on a new line."""
    shot, example = gsm8k.examples([RECORD, {"question": "And now?", "answer": "#### 1"}])
    assert gsm8k.messages(example, [shot], instruction="Think.") == [
        {"role": "user", "content": "How many?\nThink."},
        {"role": "assistant", "content": "3*4=12\n#### 1,012"},
        {"role": "user", "content": "And now?\nThink."},
    ]
