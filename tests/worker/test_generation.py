"""Generation sanity: loops, languages and ends are told from texts as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker.failures import BadRecord
from worker.tasks import Reply, generation

ENGLISH = (
    "The sky is blue because the air scatters light, and it does so more for short waves than for long ones. "
    "This is why the light that comes from all sides looks blue, while the sun itself is a little yellow."
)
TEXTS = {
    "en": ENGLISH,
    "de": "Der Himmel ist blau, weil die Luft das Licht streut, und zwar kurze Wellen mehr als die langen.",
    "fr": "Le ciel est bleu parce que les molécules de l'air diffusent la lumière dans toutes les directions.",
    "es": "El cielo es azul porque el aire dispersa la luz de las ondas cortas más que la de las largas.",
    "ru": "Небо голубое, потому что воздух рассеивает короткие волны света сильнее, чем длинные.",
    "zh": "天空是蓝色的，因为空气散射短波长的光比长波长的光更强烈。",
    "ja": "空が青いのは、空気が短い波長の光をより強く散乱させるからです。",
    "ko": "하늘이 파란 이유는 공기가 짧은 파장의 빛을 더 강하게 산란시키기 때문입니다.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages_are_told_apart(language: str) -> None:
    """Each text is in its own language and in none of the others."""
    assert generation.language(TEXTS[language]) == language


def test_a_short_text_has_no_language() -> None:
    """Of a word or two, no language is told, so that nothing is scored for it."""
    assert generation.language("Paris.") is None
    assert generation.score("Paris.", '{"language": "en"}').scores["language"] is None


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (ENGLISH, False),
        ("no " * 20, True),
        ("I am sure. " * 10, True),
        (ENGLISH + " And so it goes on and on, day by day." * 12, True),
        ("空が青い理由を説明します。" * 12, True),
        (TEXTS["zh"], False),
        ("1. a\n2. b\n3. c\n4. d\n5. e", False),
        ("", False),
    ],
)
def test_loops_are_found(text: str, loops: bool) -> None:
    """A word, a sentence or a run of characters said again and again is a loop; a list or a paragraph is none."""
    assert (generation.loop(text) is not None) is loops


@pytest.mark.parametrize(
    ("reply", "failed"),
    [
        (Reply(ENGLISH, "stop"), []),
        (Reply(ENGLISH, "length"), ["stops"]),
        (Reply("", "stop"), ["nonempty"]),
        (Reply(TEXTS["de"], "stop"), ["language"]),
        (Reply("again " * 30, "length"), ["no_loops", "language", "stops"]),
    ],
)
def test_each_check_fails_alone(reply: Reply, failed: list[str]) -> None:
    """Every check fails for what it is meant for, and a text is sane when none does."""
    verdict = generation.score(reply, '{"language": "en"}')
    assert [rule for rule in generation.RULES[1:] if verdict.scores[rule] == 0.0] == failed
    assert verdict.scores["sane"] == float(not failed)


def test_without_a_reason_for_its_end_a_text_is_not_judged_by_it() -> None:
    """A reply of which nobody knows why it ended has no score for that."""
    assert generation.score(Reply(ENGLISH), '{"language": null}').scores["stops"] is None


def test_the_built_in_prompts_are_sound_and_a_bad_one_is_named() -> None:
    """Every prompt of ours is an example; a language that is not known is refused by its row."""
    records = [json.loads(line) for line in Path(generation.SAMPLE).read_text().splitlines()]
    assert len(generation.examples(records)) == len(records) >= 10
    with pytest.raises(BadRecord, match=r"row 2: the field 'language' is 'englsh'"):
        generation.examples([records[0], {"prompt": "P", "language": "englsh"}])
