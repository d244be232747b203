"""What the report of a run says and holds, for kind runs and hostile ones."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from html.parser import HTMLParser
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import report

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>'",
    "<!-- <script> --> ]]>",
    "{{ 7 * 7 }} {% raw %} ${alert(1)} `x`",
    "a\u2028b\u2029c",
    "\x00\x07\x1b[31m\x7f\x9f",
    "\ud800 lone \u202eright to left",
    "👩‍👩‍👧 é",
    "w" * 20_000,
)


def row(example: str = "e1", sample: int = 0, **changes: Any) -> dict[str, Any]:
    """A whole evaluation row with some keys changed."""
    asked = {"messages": [{"role": "user", "content": f"Question {example}?"}], "seed": 1, "tokens_in": 10}
    said = {"completion": f"Thinking about {example}. The answer is 4.", "finish_reason": "stop", "tokens_out": 7}
    judged = {"answer": "4", "target": "4", "score": 1.0, "error": None, "at": "2026-11-20T10:00:00Z"}
    key = {"key": f"t/test/{example}#{sample}", "example_id": example, "sample_index": sample}
    return {**key, **asked, **said, **judged, **changes}


def summary(**changes: Any) -> dict[str, Any]:
    """A whole summary with some keys changed."""
    names = {"run_id": "20261120-eval-gsm8k-tiny-3f9c", "job": "eval-gsm8k", "task": "gsm8k", "model": "acme/tiny"}
    spent = {"tokens_out": 151838, "seconds": 1284.2, "tokens_per_second": 2413.7, "cost_usd": 0.46}
    metrics = {"strict": {"value": 0.361, "stderr": 0.012, "ci95": [0.338, 0.385]}}
    selection = {
        "energy": {"value": 0.45, "ci95": [0.42, 0.48]},
        "oracle": {"value": 0.587, "ci95": [0.56, 0.613]},
        "mean": {"value": 0.361, "ci95": [0.338, 0.385]},
        "majority": 0.42,
        "first": {"value": 0.35, "stderr": None, "ci95": None},
    }
    known = {"n_examples": 1, "metrics": metrics, "selection": selection, "fingerprint": "9b1f2a77c04e55d0a1b2"}
    return {**names, **known, **spent, **changes}


JOB = {"job": "eval-gsm8k", "machine": "quiet-otter", "params": {"model": "acme/tiny", "samples": 5}}
TWO = [row("e1", 0), row("e1", 1)]
LIMITS = report.Limits()


class Page(HTMLParser):
    """A rendered page taken apart: its elements, its visible text, its inline code, its data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, str] = {"style": "", "script": "", "data": ""}
        self._words: list[str] = []
        self._inside = ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self._words))
        self.data = json.loads(self.inline["data"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count the element, and note whether what follows is code or data."""
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = "data" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        """Text follows again."""
        self._inside = ""

    def handle_data(self, data: str) -> None:
        """Keep text, code and data apart."""
        if self._inside:
            self.inline[self._inside] += data
        else:
            self._words.append(data)


def html_of(*arguments: Any, **keywords: Any) -> str:
    return "".join(report.render(*arguments, **keywords))


def page(
    rows: Any = TWO, selections: Any = None, given: Any = None, job: Any = JOB, limits: report.Limits = LIMITS
) -> Page:
    return Page(html_of(summary() if given is None else given, rows, selections or {}, job, limits))


def test_headline_stands_in_the_page_without_scripts():
    """Model, run, machine, short fingerprint and every way of choosing with its interval are plain text of the page."""
    text = page().text
    for words in ("acme/tiny", "20261120-eval-gsm8k-tiny-3f9c", "quiet-otter", "9b1f2a77c04e", "21 min 24 s", "$0.46"):
        assert words in text
    assert "One answer, at random 36.1% 95% interval 33.8% – 38.5%" in text
    assert "9b1f2a77c04e55d0 " not in text


def test_ways_of_choosing_are_in_plain_words_and_order():
    """First, random, majority, re-ranker, oracle: in this order, with what each wins of the gap to the oracle."""
    text = page().text
    table = text[text.index("Way of choosing") : text.index("Metrics by rule")]
    names = ["First answer", "One answer, at random", "Majority vote", "Re-ranker energy", "Any of 2 right (oracle)"]
    assert sorted(names, key=table.index) == names
    assert "+8.9 39%" in table.split("Re-ranker")[1]  # (0.45 − 0.361) / (0.587 − 0.361)
    assert "−1.1" in table.split("One answer")[0]


def test_one_answer_per_problem_has_its_metrics_as_headline():
    """With one candidate there is nothing to choose: no bars of choosing, the metrics are the headline."""
    metrics = {"exact_match": 0.25, "perplexity": {"value": 11.27, "ci95": [10.5, 12.1]}, "bits_per_byte": 0.71}
    text = page([row()], given=summary(metrics=metrics)).text
    assert "Way of choosing" not in text
    assert "Exact match 25.0%" in text
    assert "Perplexity 11.27 95% interval 10.50 – 12.10" in text
    assert "Bits per byte 0.71" in text  # lies in 0..1 and is still no share


def test_subjects_stand_apart_weakest_first():
    """Metrics of subjects are a table of their own, with intervals and numbers of problems, the weakest first."""
    rules = {"strict": 0.5, "finish_length": 0.125, "no_answer": 0.25}
    algebra = {"subject/Algebra": {"value": 0.8, "stderr": 0.1, "ci95": [0.49, 0.943], "n": 10}}
    unknown = {"subject/Unknown": {"value": None, "stderr": None, "ci95": [None, None], "n": 0}}
    geometry = {"subject/Geometry": {"value": 0.0, "stderr": 0.0, "ci95": [0.0, 0.49], "n": 4}}
    text = page(given=summary(metrics=rules | algebra | unknown | geometry)).text
    assert "Geometry 0.0% 0.0% – 49.0% 4 Algebra 80.0% 49.0% – 94.3% 10 Unknown – – 0" in text
    by_rule = text[text.index("Metrics by rule") : text.index("By subject")]
    assert "strict 50.0%" in by_rule
    assert not any(word in by_rule for word in ("Algebra", "finish_length", "no_answer"))


def test_what_a_reranker_wins_of_the_gap_carries_its_interval():
    """Where the summary measured how much of the gap to the oracle a re-ranker wins, that stands with its interval."""
    gap = {"oracle_gap_closed": {"value": 0.31, "stderr": 0.1, "ci95": [-0.05, 0.4], "n": 9}}
    text = page(given=summary(metrics=gap)).text
    assert "+8.9 31% −5% – 40% Any of 2 right" in text
    assert "Metrics by rule" not in text


@pytest.mark.parametrize(
    ("fault", "most", "words"),
    [({"finish_reason": "length"}, 5, "cut at the token limit."), ({"answer": None}, 10, "no answer was found.")],
)
def test_warns_of_a_fault_only_above_its_share(fault: dict[str, Any], most: int, words: str):
    """Five in a hundred cut, or ten without an answer, are no warning; one more is."""
    for faulty in (most, most + 1):
        rows = [row(f"e{n}", **(fault if n < faulty else {})) for n in range(100)]
        assert (words in page(rows).text) is (faulty > most)


def test_warns_of_what_is_missing():
    """Unscored answers, failed re-rankings, problems with too few answers and rows the summary misses are said."""
    failed = row("e2", 0, score=None, error="OOM", completion=None, answer=None)
    text = page([*TWO, failed], {"e1": {"error": "boom", "sample_index": None}}, summary(n_rows=9)).text
    assert "1 of 3 answers could not be scored; 1 ended in an error." in text
    assert "The re-ranker failed on 1 problem." in text
    assert "1 problem has fewer than 2 answers." in text
    assert "The summary counts 9 rows, rows.jsonl holds 3." in text


def test_a_sound_run_has_no_warning():
    """Two scored answers, in full and as many as the summary counts: nothing to warn of."""
    assert "Read this first" not in page(given=summary(n_rows=2)).text


def test_hostile_text_adds_no_element_and_no_attribute():
    """Whatever stands in any field, the page has exactly the elements it has for plain words, and the same code."""

    def full(text: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        hostile_row = row(text, subject=text, completion=text, answer=text, target=text, finish_reason=text)
        hostile_row |= {"messages": [{"role": "user", "content": text}], "score": 0.0}
        error_row = row(text, 1, error=text, completion=None, score=None)
        words = dict.fromkeys(("run_id", "job", "task", "model", "fingerprint", "cost_usd", "seconds"), text)
        asked = {"machine": text, "started_at": text, "finished_at": text, "params": {text: text, "n": [text]}}
        choice = {text: {"sample_index": 0, "reranker": text, "samples": [0], "scores": [1.0], "error": text}}
        named = summary(selection={"mean": 0.5, text: 0.6}, metrics={text: 0.5}, **words)
        return named, [hostile_row, error_row], choice, asked

    calm = Page(html_of(*full("calm")))
    for text in HOSTILE:
        html = html_of(*full(text))
        hostile = Page(html)
        assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in calm.elements]
        assert [list(names) for _, names in hostile.elements] == [list(names) for _, names in calm.elements]
        assert (hostile.inline["script"], hostile.inline["style"]) == (calm.inline["script"], calm.inline["style"])
        assert not set("<>&\u2028\u2029") & set(hostile.inline["data"])
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", html)
        html.encode()


def test_text_comes_through_the_data_unchanged():
    """Markup, bidirectional text and emoji reach the page's script as they were; the unseen is made visible."""
    for text in ("</script><b>&amp;", "\u202eabc\u2028", "👩‍👩‍👧\ttab\nline"):
        assert page([row(completion=text)]).data["examples"][0]["candidates"][0]["text"] == text
    assert page([row(completion="a\x00b\r\nc\ud800")]).data["examples"][0]["candidates"][0]["text"] == "a␀b\nc\ufffd"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*row(), "prompt", "subject", "logliks", "prediction", "answers", "scores"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), anything), max_size=4), anything)
def test_any_row_can_be_shown(changes: list[dict[str, Any]], selection: Any):
    """Any value in any field of any row, and any selection, gives a page whose data can be read."""
    rows = [row(**{**change, "example_id": change.get("example_id", "e1")}) for change in changes]
    shown = page(rows, {"e1": selection})
    assert len(shown.data["examples"]) <= len(rows)
    assert Counter(tag for tag, _ in shown.elements)["script"] == 2


def test_any_key_may_be_null_or_missing():
    """Summary, job and row stay readable with any one of their keys null, and with all of them missing."""
    for key in summary():
        page(given=summary(**{key: None}))
    for name in ("value", "ci95", "stderr"):
        page(given=summary(metrics={"strict": {"value": 0.5, "ci95": [0.4, 0.6], "stderr": 0.1, name: None}}))
    for key in row():
        page([row(**{key: None})])
    for key in JOB:
        page(job={**JOB, key: None})
    assert "Unnamed model" in page([{}], {}, {}, {}).text


def test_a_run_without_rows_says_so():
    """A run with no row yet is a page with a warning, no sections of numbers, and no problem."""
    shown = page([], given=summary(n_examples=0, metrics={}, selection=None))
    assert "No problem has an answer yet." in shown.text
    assert shown.data["examples"] == []


def test_an_error_row_gives_way_to_its_replacement_and_nothing_else_does():
    """A good row after an error counts instead of it; a second good row of the same sample counts nowhere."""
    failed = row(error="OOM", score=None, completion=None, answer=None)
    shown = page([failed, row(completion="second"), row(completion="third", score=0.0)], given=summary(n_rows=1))
    assert [each["text"] for each in shown.data["examples"][0]["candidates"]] == ["second"]
    assert "could not be scored" not in shown.text


def test_the_sample_is_whole_stable_and_announced():
    """Whatever the order of the rows, the same examples are sampled, each with all its candidates; the page says so."""
    rows = [row(f"e{n}", sample) for n in range(200) for sample in range(3)]
    interleaved = sorted(rows, key=lambda each: (each["sample_index"], -int(each["example_id"][1:])))
    limits = report.Limits(examples=40)
    shown, again = page(rows, limits=limits), page(interleaved, limits=limits)
    ids = {each["id"] for each in shown.data["examples"]}
    assert len(ids) == 40
    assert ids == {each["id"] for each in again.data["examples"]}
    assert {len(each["candidates"]) for each in again.data["examples"]} == {3}
    assert "Showing 40 of 200 problems, sampled; all rows are in rows.jsonl ." in shown.text
    more = page([*rows, row("another")], limits=limits)
    assert len({each["id"] for each in more.data["examples"]} & ids) >= 39


def test_a_full_text_budget_keeps_fewer_whole_examples_whatever_the_order():
    """Texts stay below the budget in bytes; rows in any order give the same whole examples."""
    rows = [row(f"e{n}", k, completion="語" * (3 if k else 100 + n)) for n in range(100) for k in range(4)]
    orders = (rows, rows[::-1], sorted(rows, key=itemgetter("sample_index")))
    first, *others = (page(each, limits=report.Limits(text_bytes=30_000)) for each in orders)
    assert 5 < len(first.data["examples"]) < 100
    assert len(first.inline["data"].encode()) < 30_000 * 1.3
    assert {len(each["candidates"]) for each in first.data["examples"]} == {4}
    in_order = sorted(first.data["examples"], key=itemgetter("id"))
    assert all(sorted(other.data["examples"], key=itemgetter("id")) == in_order for other in others)


def test_a_long_text_is_cut_in_the_middle():
    """Start and end of a long completion stay, with the number of characters between them."""
    text = "start" + "x" * 50_000 + "the answer is 4"
    start, cut, end = page([row(completion=text)]).data["examples"][0]["candidates"][0]["text"]
    assert (start[:5], end[-15:]) == ("start", "the answer is 4")
    assert len(start) + cut + len(end) == len(text)
    assert len(start) + len(end) == report.Limits().text_chars


def test_a_hundred_thousand_rows_make_a_page_in_seconds():
    """100,000 rows of a kilobyte: under 10 seconds and 12 MB, where their texts alone would be 100 MB."""
    rows = (row(f"e{n // 5}", n % 5, completion=f"{n} " + "word " * 200, score=float(n % 2)) for n in range(100_000))
    started = time.monotonic()
    size = sum(len(piece.encode()) for piece in report.render(summary(), rows, {}, JOB))
    assert time.monotonic() - started < 10
    assert size < 12_000_000


def test_texts_outside_the_sample_are_not_held():
    """Reading 64 MB of texts takes a small part of that in memory."""
    rows = (row(f"e{n}", completion=f"{n}" * 1000) for n in range(16_000))
    tracemalloc.start()
    try:
        intake = report.Intake(report.Limits(examples=100))
        for each in rows:
            intake.add(each)
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


def test_only_the_pages_own_code_may_run_and_nothing_is_loaded():
    """The content policy names the SHA-256 of the one style and the one script, and no element points outside."""
    shown = page()
    policy = next(names["content"] for _, names in shown.elements if names.get("http-equiv"))
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(shown.inline[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    assert "unsafe" not in str(policy)
    for tag, names in shown.elements:
        assert "style" not in names, tag  # an inline style would be refused
        assert all((names.get(name) or "#").startswith(("#", "data:")) for name in ("src", "href", "action", "srcset"))
    assert "innerHTML" not in shown.inline["script"]


def test_the_vote_is_the_one_the_summary_counts():
    """Two votes beat one; an answer not found or not scored is no vote; equals are a tie that chooses none."""
    votes = [(None, 0.0), (None, 0.0), (None, 0.0), ("7", 0.0), ("4", 1.0), ("4", 1.0), ("9", None), ("9", None)]
    rows = [row("e1", sample, answer=answer, score=score) for sample, (answer, score) in enumerate(votes)]
    assert page(rows).data["examples"][0]["picks"] == [{"by": "majority", "n": 4, "tied": False}]
    tied = page(rows[3:5])
    assert tied.data["examples"][0]["picks"] == [{"by": "majority", "n": None, "tied": True}]


def test_a_rerankers_choice_carries_its_scores():
    """The chosen sample and the score of every candidate it saw reach the page under the name the summary has."""
    line = {"reranker": "other", "samples": [1, 4], "scores": [0.5, float("nan")], "sample_index": 1, "error": None}
    expected = {"by": "energy", "n": 1, "scores": {"1": 0.5, "4": None}, "error": None}
    assert page(TWO, {"e1": line}).data["examples"][0]["picks"][1] == expected


def test_the_problem_is_what_the_user_asked_last():
    """The last message of the user, its text parts, or the bare prompt is shown as the problem."""
    asked, parts = ({"role": "user", "content": said} for said in ("asked", [{"type": "text", "text": "asked"}]))
    for messages in ([{**asked, "content": "shot"}, asked], [asked, {"role": "assistant", "content": "so"}], [parts]):
        assert page([row(messages=messages)]).data["examples"][0]["prompt"] == "asked"
    assert page([row(messages=None, prompt="asked")]).data["examples"][0]["prompt"] == "asked"
    assert page([row(messages=[])]).data["examples"][0]["prompt"] is None


def test_generations_of_a_self_improvement_run_are_listed():
    """Each generation stands with accuracy, interval, change and whether its adapter was kept."""
    told = {"generation": 2, "accuracy": 0.45, "ci95": [0.26, 0.66], "confidence": 0.91, "change": 0.25}
    told |= {"p_value": 0.031, "accepted": True, "weak_areas": ["Geometry"], "adapter": None}
    text = page(given=summary(generations=[told, None])).text
    assert "2 45.0% 26.0% – 66.0% 91.0% +25.0 0.031 yes Geometry" in text


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path):
    """A failure while rows are read leaves the report that was there, and nothing beside it."""
    path = tmp_path / "run" / "report.html"
    path.parent.mkdir()
    report.write(path, summary(), TWO, {}, JOB)
    before = path.read_bytes()
    assert before.startswith(b"<!DOCTYPE html>")

    def failing():
        yield row()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        report.write(path, summary(), failing(), {}, JOB)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_importing_the_report_loads_no_template_engine():
    """Jinja is loaded when a page is made, not when the command line starts."""
    code = "import sys, orchestrator.report; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
