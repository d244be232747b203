"""Generation sanity: whether texts are there, do not loop, are in the language asked for, and come to an end."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import spec
from worker.failures import BadRecord
from worker.tasks import GENERATES, Example, Reply, Verdict
from worker.tasks.chats import chat
from worker.tasks.records import Ids, Record, read

NAME = "generation"
VERSION = "1"
KIND = GENERATES
DATASET = SAMPLE = str(Path(__file__).with_name("generation.jsonl"))
STOP: tuple[str, ...] = ()
SHOTS_SPLIT = "train"
COLUMNS: tuple[str, ...] = ()
OPTIONS: tuple[str, ...] = ()
RULES = ("sane", "nonempty", "no_loops", "language", "stops")
"""`sane` is all the others that apply. Each metric is the share of completions that pass."""
HEADLINE = "sane"

GRAM = 4
"""A text loops when over half of its runs of so many words (characters, where a script has no spaces) came before…"""
REPEATED_MAX = 0.5
RUN_MAX = 6
"""…or when one word comes more often than this without another between."""
_GRAMS_MIN = 16
_CHARACTER_GRAM = 12
_WORDS_MIN = 8  # fewer common words tell no language from another
_SCRIPT_SHARE = 0.6
_HOLDS = "Rows hold 'prompt', and perhaps 'id', 'category' and 'language' (such as en)."
_SCRIPTS = {
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
}
"""Languages told by their letters, by the first word of the letters' Unicode names."""
_COMMON = {
    "de": "der die das und ist nicht ein eine zu den mit von auf für sich dem des im auch es wird sind oder als",
    "en": "the of and to in is that it for was on are as with be this by at from or an have not which you",
    "es": "el la de que y en los se las un por con una para es del al lo como más pero sus son está",
    "fr": "le la les de des et est un une dans que qui pour pas sur au avec ce il elle sont plus du en",
    "it": "il la di che e è un una per non con sono del della i le gli si come da più nel anche alla",
    "nl": "de het een en van is dat op te in zijn voor met niet aan er ook als bij naar maar door dit wordt",
    "pt": "o a de que e do da em um para é com não uma os no se na por mais as dos como mas",
}
"""Languages told by their most common words."""
LANGUAGES = (*sorted({*_SCRIPTS, *_COMMON}),)


def examples(records: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Every record as an Example, in order; the target says what is asked of the text, as canonical JSON.

    Raises BadRecord naming the row and what it lacks.
    """
    return read(records, _HOLDS, _example)


def messages(example: Example, _shots: Sequence[Example], *, instruction: str = "") -> list[dict[str, str]]:
    """The prompt alone, the instruction after it."""
    return chat(example, (), instruction, str)


def score(completion: Reply | str, target: str) -> Verdict:
    """Whether the text passes each check; None for a check that does not apply. The answers say what was found."""
    wanted = _wanted(target)
    ended = getattr(completion, "finish_reason", None)
    spoken = language(completion) if wanted else None
    looping = loop(completion)
    answers: dict[str, str | None] = {
        "nonempty": f"{len(completion.split())} words",
        "no_loops": looping,
        "language": spoken,
        "stops": ended,
    }
    scores: dict[str, float | None] = {
        "nonempty": float(bool(completion.strip())),
        "no_loops": float(looping is None),
        "language": None if not wanted or spoken is None else float(spoken == wanted or _alike(spoken, wanted)),
        "stops": None if ended is None else float(ended == "stop"),
    }
    failed = [rule for rule, value in scores.items() if value == 0.0]
    answers["sane"] = ", ".join(failed) or "sane"
    return Verdict(answers, {"sane": float(not failed), **scores})


def loop(text: str) -> str | None:
    """What a text says again and again; None when it does not loop."""
    units, size = text.split(), GRAM
    if units and len(text) / len(units) > 20:
        units, size = list(text), _CHARACTER_GRAM
    run, last = 0, ""
    for unit in units if size == GRAM else []:
        run, last = (run + 1, last) if unit == last else (1, unit)
        if run > RUN_MAX:
            return last
    grams = Counter(tuple(units[at : at + size]) for at in range(len(units) - size + 1))
    total = grams.total()
    if total < _GRAMS_MIN or 1 - len(grams) / total <= REPEATED_MAX:
        return None
    return (" " if size == GRAM else "").join(grams.most_common(1)[0][0])


def language(text: str) -> str | None:
    """The language a text is in, one of LANGUAGES; `other` where it is none; None when it is too short to tell."""
    letters = Counter(unicodedata.name(character, "?").split()[0] for character in text if character.isalpha())
    if letters.total() < 4 * _WORDS_MIN // 2:
        return None
    for name, scripts in _SCRIPTS.items():
        share = sum(letters[script] for script in scripts) / letters.total()
        if share >= _SCRIPT_SHARE and (name != "ja" or letters["HIRAGANA"] + letters["KATAKANA"] > 0):
            return name
    if letters["LATIN"] / letters.total() < _SCRIPT_SHARE:
        return "other"
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    if words.total() < _WORDS_MIN:
        return None
    counts = {name: sum(words[word] for word in common.split()) for name, common in _COMMON.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] >= 0.1 * words.total() else "other"


def _alike(spoken: str, wanted: str) -> bool:
    """Whether two languages have the same letters, by which alone they are told here."""
    return wanted in _SCRIPTS and _SCRIPTS.get(spoken) == _SCRIPTS[wanted]


def _wanted(target: str) -> str | None:
    try:
        wanted = json.loads(target)["language"]
    except (ValueError, KeyError, TypeError):
        raise BadRecord(f"the target {target[:60]!r} does not say which language is wanted", _HOLDS) from None
    return None if wanted is None else str(wanted)


def _example(record: Record, ids: Ids) -> Example:
    prompt, wanted = record.text("prompt"), record.fields.get("language")
    if wanted is not None and wanted not in LANGUAGES:
        raise BadRecord(
            f"row {record.row}: the field 'language' is {wanted!r}: {spec.nearest(str(wanted), LANGUAGES)}",
            "Leave it out where the language does not matter.",
        )
    target = spec.canonical({"language": wanted}).decode()
    return Example(ids.take(record, prompt), prompt, target, record.label("category"))
