"""MATH, competition problems with answers in LaTeX: prompts, levels and subjects, and two rules to score a solution."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import spec
from worker import grading
from worker.failures import BadRecord, ConfigFailure
from worker.tasks import GENERATES, Example, Verdict, lacking
from worker.tasks.chats import chat
from worker.tasks.records import Ids, Record, read

NAME = "math"
VERSION = "1"
KIND = GENERATES
DATASET = "HuggingFaceH4/MATH-500"
SAMPLE = "generated"
STOP: tuple[str, ...] = ()
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS = ("subjects", "levels")
RULES = ("math_verify", "exact_match")
"""`math_verify` is that of minerva_math in lm-evaluation-harness 0.4.13; `exact_match` is ours: the answer found in the
text, both sides normalised by the list of Minerva, equal strings. (Theirs of that name asks for a fixed sentence.)"""
HEADLINE = "math_verify"

TIMEOUT_S = 30.0
"""For one reply; the package gives up by itself after 5 s for each text and 5 s for the comparison."""
_ANSWER_CHARACTERS = 200
_HOLDS = "MATH rows hold 'problem' and 'solution' (or 'answer'), and perhaps 'subject' (or 'type') and 'level'."
_LEVEL = re.compile(r"(?:Level )?([0-9]+)")
_SAID = re.compile(r"(?i:final answer|answer) is:?\s*(.+?)\.?(?: I hope it is correct.*)?$", re.MULTILINE)
_IN_DOLLARS = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$", re.DOTALL)

# Lewkowycz et al. 2022 (Minerva), appendix D: what is replaced and removed before answers are compared.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "points", "feet"),
    *("minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
)
_REMOVED = (
    *("\\ldots", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"),
    *(r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots", r"\left", r"\right", r"\!", r"\,"),
)
_UNIT = re.compile(rf"(?<![\\a-z])(?:{'|'.join(_UNITS)})(?![a-z])")
_WRAPPED = re.compile(r"\\(?:text|textbf|overline|boxed|mathrm)\{(.*?)\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac(?:([^{\s])([^{\s])|\{([^{}]*)\}([^{\s]))")
_SHORT_ROOT = re.compile(r"\\sqrt([^{\[])")
_GROUPS = re.compile(r"-?\d{1,3}(,\d{3})+")


def examples(
    records: Sequence[Mapping[str, Any]], *, subjects: str | None = None, levels: str | None = None
) -> list[Example]:
    """Every record of these subjects and levels (commas between them; None: of all) as an Example, in order.

    The target is the whole reference solution where there is one: its last `\\boxed{…}` holds the answer. Raises
    BadRecord naming the row and what it lacks, ConfigFailure for a subject or level that no record has.
    """
    found = read(records, _HOLDS, _example)
    chosen = _only(found, "subjects", subjects, lambda example: example.subject)
    return _only(chosen, "levels", levels, lambda example: example.level)


def messages(example: Example, shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
    """The chat: each shot as a user and an assistant turn, then the problem alone, the instruction after each."""
    return chat(example, shots, instruction, lambda shot: shot.solution or shot.target)


def score(completion: str, target: str) -> Verdict:
    """What each rule finds and how it scores: 1.0 for an answer equal to the target's, else 0.0.

    `math_verify` is None where the package is not installed, and 0.0 for a reply it cannot judge within its limits.
    """
    answer, gold = extracted(completion), extracted(target)
    answers: dict[str, str | None] = {"math_verify": None, "exact_match": None if answer is None else normal(answer)}
    scores: dict[str, float | None] = {
        "math_verify": None,
        "exact_match": None if gold is None else float(answer is not None and normal(answer) == normal(gold)),
    }
    if lacking(NAME):
        return Verdict(answers, scores)
    try:
        found, score = grading.grade("mathematics", [completion, target], TIMEOUT_S)
    except grading.Unfinished as why:
        return Verdict(answers, {**scores, "math_verify": 0.0}, notes={"math_verify": str(why)})
    return Verdict({**answers, "math_verify": found}, {**scores, "math_verify": score})


def prepare() -> None:
    """In the child that may be killed: import what `judge` needs, and read one formula, which builds its tables."""
    judge(["$1$", "$1$"])


def judge(question: list[str]) -> tuple[str | None, float | None]:
    """In that child: the answer that math_verify reads in a completion, and 1.0 where it equals the target's.

    None where the target itself cannot be read. The order matters: `verify` asks whether the second fits the first.
    """
    from math_verify import parse, verify

    completion, target = question
    gold, found = parse(target), parse(completion)
    answer = str(found[0])[:_ANSWER_CHARACTERS] if found else None
    return answer, float(verify(gold=gold, target=found)) if gold else None


def extracted(text: str) -> str | None:
    """The answer a text settles on: its last `\\boxed{…}`, else what follows its last mark or `answer is`, else its
    last formula.

    Of a text without any of them, a short line that is all there is; None for other texts.
    """
    box = boxed(text)
    if box is not None:
        return box
    if "####" in text:  # as GSM8K marks it
        return text.rpartition("####")[2].strip().partition("\n")[0] or None
    said = _SAID.findall(text)
    if said:
        inside = _IN_DOLLARS.findall(said[-1])
        return str(inside[-1] if inside else said[-1])
    formulas = _IN_DOLLARS.findall(text)
    if formulas:
        return str(formulas[-1])
    return text.strip() if text.strip() and "\n" not in text.strip() and len(text) <= _ANSWER_CHARACTERS else None


def boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` or `\\fbox{…}` holds; to the end of the text where its brace is never closed."""
    _, _, after = text.rpartition(r"\fbox" if text.rfind(r"\fbox") > text.rfind(r"\boxed") else r"\boxed")
    if after == text:
        return None
    if not after.startswith("{"):
        return after.split("$")[0].strip() or None
    depth = 0
    for place, character in enumerate(after):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return after[1:place]
    return after[1:]


def normal(answer: str) -> str:
    """An answer without units, spaces and wrappers, fractions and roots with braces, thousands without commas."""
    answer = answer.split("=")[-1] if answer.count("=") == 1 else answer
    answer = _UNIT.sub("", answer)
    for written, plain in _REPLACED:
        answer = answer.replace(written, plain)
    for written in _REMOVED:
        answer = answer.replace(written, "")
    answer = _WRAPPED.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(_with_braces, answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    answer = _SHORT_ROOT.sub(r"\\sqrt{\1}", answer).replace("$", "").rstrip(".")
    return answer.replace(",", "") if _GROUPS.fullmatch(answer) else answer


def _with_braces(found: re.Match[str]) -> str:
    over, under = (found[1], found[2]) if found[1] else (found[3], found[4])
    return f"\\frac{{{over}}}{{{under}}}"


def _example(record: Record, ids: Ids) -> Example:
    fields = record.fields
    problem = record.text("question" if "problem" not in fields and "question" in fields else "problem")
    solution, target = _solution(record)
    unique = fields.get("unique_id")
    if isinstance(unique, str) and fields.get("id") is None:
        record = Record({**fields, "id": unique.removesuffix(".json").replace("/", "-")}, record.row, _HOLDS)
    return Example(
        id=ids.take(record, problem),
        problem=problem,
        target=target,
        subject=record.label("subject" if "subject" in fields else "type"),
        solution=solution,
        level=_level(record),
    )


def _solution(record: Record) -> tuple[str | None, str]:
    """The reference solution, where there is one, and the target; BadRecord where no answer is marked in it."""
    fields = record.fields
    if fields.get("solution") is not None:
        solution = record.text("solution")
        if boxed(solution) is None and fields.get("answer") is None:
            raise BadRecord(f"row {record.row}: the field 'solution' has no \\boxed answer", _HOLDS)
        if boxed(solution) is not None:
            return solution, solution
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise BadRecord(f"row {record.row}: the field 'answer' must be a text or a number", _HOLDS)
    text, mark, last = str(answer).rpartition("####")  # as GSM8K marks it
    target = f"\\boxed{{{last.strip()}}}"
    return (f"{text.strip()}\n{target}" if mark else None), target


def _level(record: Record) -> str | None:
    """The level as its number; MATH writes `Level 2`, MATH-500 writes 2."""
    given = record.fields.get("level")
    if given is None:
        return None
    found = _LEVEL.fullmatch(str(given))
    return found[1] if found else str(given)


def _only(found: list[Example], name: str, wanted: str | None, value: Any) -> list[Example]:
    """The examples whose value is among those wanted; ConfigFailure for one that none has."""
    if wanted is None:
        return found
    known = {str(value(example)) for example in found}
    names = [word.strip() for word in str(wanted).split(",") if word.strip()]
    for word in names:
        if word not in known:
            raise ConfigFailure(
                f"{name}={wanted}: no problem has {word!r}: {spec.nearest(word, known)}",
                f"Commas stand between them: --set {name}={','.join(sorted(known)[:2])}",
            )
    return [example for example in found if str(value(example)) in names]
