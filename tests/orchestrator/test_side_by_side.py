"""The page of several runs: made from their rows, and opened in a real browser that filters, sorts and reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jobs import rows
from orchestrator import summary
from orchestrator.runs import Run
from tests.journeys.hurried import document, gpu
from tests.orchestrator import keeping
from tests.orchestrator.test_report_browser import CHROMEDRIVER, CHROMIUM, ELEMENT, EVIL, Browser, until

BEFORE = [float(number % 2 == 0) for number in range(120)]
AFTER = [1.0 if number < 20 else score for number, score in enumerate(BEFORE)]


def scored(name: str, scores: Sequence[float | None], tasks: Sequence[str] = ("gsm8k",), **params: str) -> Run:
    """A run with a row for each score, of each task; None is a row with an error. Example 3 asks in hostile words."""
    run = keeping.bare(name, **params)
    run.home.summary.unlink()
    with rows.Appender(run.home.rows) as out:
        for task, (number, score) in itertools.product(tasks, enumerate(scores)):
            out.append(
                {
                    "key": f"{task}/test/e{number}#0",
                    "error": None if score is not None else "out of memory",
                    "example_id": f"e{number}",
                    "sample_index": 0,
                    "subject": "odd" if number % 2 else "even",
                    "prompt": EVIL if number == 3 else f"How many are {number} pears?",
                    "completion": "so",
                    "answer": str(number) if score else "none",
                    "target": str(number),
                    "score": score,
                    "scores": {} if score is None else {"numeric": score},
                }
            )
    summary.current(run)
    return run


@pytest.fixture
def page() -> Path:
    """The page of two runs of 120 examples: ten of them flipped, all to the better."""
    scored("20261120-before-0001", BEFORE, model="old")
    scored("20261120-after-0002", AFTER, model=EVIL)
    done = gpu("report", "20261120-before-0001", "20261120-after-0002", "--html", "both.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 runs side by side: both.html\n"
    return Path("both.html").absolute()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser of its own, which may not have complained afterwards."""
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not installed, and only they can look")
    browser = Browser(tmp_path / "profile")
    try:
        yield browser
        assert browser.call("/se/log", type="browser") == []
    finally:
        browser.close()


def choose(browser: Browser, selector: str, value: str) -> None:
    element = {ELEMENT: browser.find(selector)[9:]}
    browser.ask(f"arguments[0].value = '{value}'; arguments[0].dispatchEvent(new Event('change'))", element)


def test_the_page_is_filtered_sorted_and_read(browser: Browser, page: Path) -> None:
    """Numbers stand side by side; ten examples flipped; a heading sorts; words narrow; hostile text stays text."""
    browser.open(page)
    assert browser.texts(".runs td.strong") == ["50.0%", "58.3%"]
    assert browser.texts(".against td.strong") == ["+0.083"]
    assert browser.texts(".against td:last-child") == ["better"]
    first = [text.split()[0] for text in browser.texts(".beside tbody tr:first-child td")]
    assert first == ["50.0%", "58.3%", "100.0%", "100.0%"]
    assert browser.text("#count") == "1–50 of 120 examples"
    choose(browser, "#show", "flips")
    assert browser.text("#count") == "1–10 of 10 examples"
    assert browser.texts(".example .id")[:2] == ["e1", "e3"]
    assert browser.texts(".example:nth-child(1) td.mark") == ["0\nnone", "1\n1"]
    browser.click("th[data-key=id] button")
    assert browser.texts(".example .id")[0] == "e19"
    choose(browser, "#show", "all")
    browser.click("th[data-key=run0] button")
    assert browser.texts(".example td.mark")[0].startswith("0")
    browser.click("th[data-key=run0] button")
    assert browser.texts(".example td.mark")[0].startswith("1")
    browser.click("#q")
    browser.press("77 pears")
    until(lambda: browser.text("#count") == "1–1 of 1 examples")
    assert browser.ask("return [document.images.length, document.scripts.length, window.evil]") == [0, 2, None]
    assert EVIL in browser.texts(".runs td bdi")


def test_what_one_run_lacks_is_no_zero() -> None:
    """An example with an error, or that one run has not, has no score there, and flips nothing."""
    scored("20261120-before-0001", [1.0, None, 1.0])
    scored("20261120-after-0002", [1.0, 0.0])
    found = document("report", "20261120-before-0001", "20261120-after-0002")
    assert found["comparisons"][0]["n"] == 1
    text = Path("side-by-side.html").read_text(encoding="utf-8")
    examples = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["examples"]
    assert {each["id"]: each["scores"] for each in examples} == {"e0": [1.0, 1.0], "e1": [None, 0.0], "e2": [1.0, None]}
    assert not any(each["flips"] for each in examples)


def test_examples_of_several_tasks_stay_apart() -> None:
    """Of runs with several parts, equal ids of two tasks are two examples, told apart by their category."""
    scored("20261120-before-0001", [1.0, 0.0], ("gsm8k", "mmlu"))
    scored("20261120-after-0002", [1.0, 1.0], ("gsm8k", "mmlu"))
    assert gpu("report", "20261120-before-0001", "20261120-after-0002").returncode == 0
    text = Path("side-by-side.html").read_text(encoding="utf-8")
    examples = json.loads(text.partition('id="data">')[2].partition("</script>")[0])["examples"]
    flipped = [each["subject"] for each in examples if each["flips"]]
    assert (len(examples), flipped) == (4, ["gsm8k: odd", "mmlu: odd"])


def test_runs_of_different_tasks_are_no_page() -> None:
    """What cannot be compared is refused in words, and no page is written."""
    scored("20261120-before-0001", [1.0])
    keeping.ended(keeping.begun(job="train-lora"))
    done = gpu("report", "20261120-before-0001", "lora")
    assert done.returncode == 2
    assert not Path("side-by-side.html").exists()
