"""GSM8K, grade-school word problems: prompts, the number found in a solution, and three rules to score it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from worker.failures import BadRecord
from worker.tasks import GENERATES, Example, Verdict
from worker.tasks.chats import chat
from worker.tasks.records import Ids, Record, read

NAME = "gsm8k"
VERSION = "1"
KIND = GENERATES
DATASET = "openai/gsm8k"
SAMPLE = "generated"
STOP: tuple[str, ...] = ()
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS: tuple[str, ...] = ()
RULES = ("numeric", "strict", "flexible")
"""`numeric` is ours; `strict` and `flexible` are strict-match and flexible-extract of lm-evaluation-harness 0.4.13."""
HEADLINE = "numeric"

_MARK = "####"
_HOLDS = "GSM8K rows hold 'question' and 'answer'."
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator annotations of Cobbe et al. 2021, e.g. <<3*4=12>>

# lm-evaluation-harness 0.4.13, lm_eval/tasks/gsm8k/gsm8k.yaml, task version 3: `filter_list` and `regexes_to_ignore`.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_FINAL_DOT = re.compile(r"\.$")

_NUMBER_PATTERN = r"""
    (?P<sign>(?<![\w)\]}])-)?          # after a word or a bracket it subtracts
    \$?
    (?:
        (?:(?P<whole>[0-9]{1,9})[ ])?  # 2 1/2
        (?P<over>[0-9]{1,9})/(?P<under>[0-9]{1,9})(?![0-9])
      | (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?P<decimals>\.[0-9]+)?
      | (?<![0-9])(?P<only_decimals>\.[0-9]+)
    )"""
_NUMBER_CHARACTERS = "0123456789 -$,./"  # whatever _NUMBER matches is made of these alone
_NUMBER = re.compile(_NUMBER_PATTERN, re.VERBOSE)
_NUMBER_FIRST = re.compile(r"\W*?" + _NUMBER_PATTERN, re.VERBOSE)
_LATEX_FRACTION = re.compile(r"([0-9]?)\\[dt]?frac\{ *([0-9]+) *\}\{ *([0-9]+) *\}")
_SPELLINGS = (
    ("\N{MINUS SIGN}", "-"),
    ("\N{NO-BREAK SPACE}", ","),  # between groups of three digits; anywhere else a comma does no harm
    ("\N{NARROW NO-BREAK SPACE}", ","),
    ("\N{THIN SPACE}", ","),
    ("{,}", ","),
    (r"\,", ","),
    (r"\!", ""),
    (r"\$", "$"),
)


def examples(records: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Every record (`question`, `answer` ending in `#### N`, perhaps `id` and `subject`) as an Example, in order.

    Without an `id`, the id comes from the question's SHA-256, so no filter or order changes it; the second record
    with the same question gets `-2`, and so on. Raises BadRecord naming the row, counted from 1, and what it lacks.
    """
    return read(records, _HOLDS, _example)


def messages(example: Example, shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
    """The chat: each shot as a user and an assistant turn, then the question alone.

    Zero-shot is the bare question: chat models of today reason and mark their answer unasked, and the numeric rule
    reads the usual marks. An `instruction` is appended to every question, the shots' too, after a newline.
    """
    return chat(example, shots, instruction, lambda shot: shot.solution or f"{_MARK} {shot.target}")


def score(completion: str, target: str) -> Verdict:
    """What each rule finds and how it scores: 1.0 for the gold number, else 0.0, also when nothing is found.

    The target may be a whole reference solution. A target without a number cannot be scored numerically: None.
    """
    number, plain = _gold_forms(target)
    answers: dict[str, str | None] = {
        "numeric": canonical_number(completion),
        "strict": _strict_match(completion),
        "flexible": _flexible_extract(completion),
    }
    scores: dict[str, float | None] = {
        rule: float(answer is not None and _without_ignored(answer) == plain) for rule, answer in answers.items()
    }
    scores["numeric"] = None if number is None else float(answers["numeric"] == number)
    return Verdict(answers, scores)


def gold(target: str) -> str:
    """The answer of a reference solution: what follows its last `####`; of any other text, the text itself."""
    return target.rpartition(_MARK)[2].strip()


@functools.lru_cache(maxsize=1024)  # the samples of one problem, which come one after the other
def _gold_forms(target: str) -> tuple[str | None, str]:
    """The answer of a reference solution as a canonical number, and as lm-evaluation-harness compares it."""
    reference = gold(target)
    return canonical_number(reference), _without_ignored(reference)


def canonical_number(text: str) -> str | None:
    """The number a text settles on, written in one way only, so that equal numbers are equal strings; None without one.

    It is the number right after the last `####`. Where something else follows (`#### Step 2`, a heading), what comes
    after the mark is read like a text without marks: the last number in the last `\\boxed{…}`, else the last number.
    Written without separators, currency and needless zeros; a fraction as a decimal where that is exact, else reduced.
    """
    text = _respelled(text)
    _, mark, after = text.rpartition(_MARK)
    found = _NUMBER_FIRST.match(after) if mark else None
    if found is None and mark:
        found = _settled(after)
    found = found or _settled(text)
    return None if found is None else _canonical(found)


def _example(record: Record, ids: Ids) -> Example:
    question, solution = record.text("question"), _solution(record)
    name = ids.take(record, question)
    return Example(name, question, gold(solution), record.label("subject"), solution)


def _solution(record: Record) -> str:
    """The reference solution as a model should write it: no calculator annotations, `#### N` last."""
    answer = record.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise BadRecord(f"row {record.row}: the field 'answer' must be a text ending in '#### N'")
    final = _respelled(gold(answer))
    found = _NUMBER_FIRST.match(final)
    if found is None or (_MARK not in answer and found.end() < len(final.rstrip(".%"))):
        raise BadRecord(
            f"row {record.row}: the field 'answer' has no gold number: {answer[-60:]!r}", "An answer ends in '#### N'."
        )
    return _ANNOTATION.sub("", answer) if _MARK in answer else f"{_MARK} {gold(answer)}"


def _strict_match(text: str) -> str | None:
    found = _STRICT.search(text)
    return found[1] if found else None


def _flexible_extract(text: str) -> str | None:
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else None


def _without_ignored(text: str) -> str:
    """The text as lm-evaluation-harness compares it: its `regexes_to_ignore` deleted in order, lower case."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return _FINAL_DOT.sub("", text).lower()


def _respelled(text: str) -> str:
    """The text with typographic and LaTeX spellings of numbers made plain."""
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    if "frac{" in text:
        text = _LATEX_FRACTION.sub(lambda found: f"{found[1]}{' ' if found[1] else ''}{found[2]}/{found[3]}", text)
    return text


def _settled(text: str) -> re.Match[str] | None:
    """The last number in the last `\\boxed{…}` of a text, else its last number."""
    box = _boxed(text)
    return (_last_number(box) if box is not None else None) or _last_number(text)


def _boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` holds, to its matching brace, or to the end of a text that was cut off."""
    _, box, after = text.rpartition(r"\boxed{")
    if not box:
        return None
    depth = 1
    for at, character in enumerate(after):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return after[:at]
    return after


def _last_number(text: str) -> re.Match[str] | None:
    """The last number of a text. Only the run of characters that holds its last digit is looked through."""
    last_digit = max(map(text.rfind, "0123456789"))
    run = len(text[: last_digit + 1].rstrip(_NUMBER_CHARACTERS))
    last = None
    for last in _NUMBER.finditer(text, run):  # noqa: B007 — the loop is for the last one
        pass
    return last


def _canonical(found: re.Match[str]) -> str:
    if found["over"] is not None:
        number = _canonical_fraction(int(found["whole"] or 0), int(found["over"]), int(found["under"]))
    else:  # by its digits, since a float would round and an int of thousands of digits is refused
        decimals = (found["decimals"] or found["only_decimals"] or "").rstrip("0").rstrip(".")
        number = ((found["digits"] or "").replace(",", "").lstrip("0") or "0") + decimals
    return "-" + number if found["sign"] and number != "0" else number


def _canonical_fraction(whole: int, over: int, under: int) -> str:
    """`whole + over/under` as a decimal where one is exact, else as a reduced fraction."""
    if under == 0:
        return f"{over}/0"  # equal to no gold number
    value = whole + Fraction(over, under)
    places = 0
    while places <= 30 and 10**places % value.denominator:  # 30 > log2(10**9): no more can help
        places += 1
    if places > 30:
        return f"{value.numerator}/{value.denominator}"
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits
