"""The report in a real browser: found, sorted, read, by mouse and keyboard, in both themes and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in WebDriver (W3C, 2018)
ENTER, DOWN = "\ue007", "\ue015"
DEADLINE_S = 10
EVIL = "<img src=x onerror='window.evil=1'></script><script>window.evil=1</script>"

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not installed, and only they can look"
)


class Browser:
    """One headless Chromium, driven over loopback by the W3C WebDriver protocol."""

    def __init__(self, profile: Path) -> None:
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._driver = subprocess.Popen([str(CHROMEDRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout
        port = next(
            found[1] for line in self._driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        self._at = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._at += "/" + self.call("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, path: str, **body: Any) -> Any:
        """What the driver answers to a command."""
        request = urllib.request.Request(self._at + path, json.dumps(body).encode())
        try:
            with self._opener.open(request, timeout=30) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(json.load(error)["value"]["message"]) from None

    def close(self) -> None:
        """End the browser, then its driver."""
        try:
            with self._opener.open(urllib.request.Request(self._at, method="DELETE"), timeout=30):
                pass
        finally:
            self._driver.terminate()
            self._driver.communicate(timeout=30)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Run a command of the DevTools protocol."""
        return self.call("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page: Path, state: str = "") -> None:
        """Load the page anew, with what should be shown given in its address."""
        self.call("/url", url="about:blank")
        self.call("/url", url=f"{page.as_uri()}{state}")

    def ask(self, code: str, *arguments: Any) -> Any:
        """The value of a script's `return`."""
        return self.call("/execute/sync", script=code, args=arguments)

    def find(self, selector: str) -> str:
        """The path of the first element a CSS selector finds."""
        return "/element/" + self.call("/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector: str) -> None:
        """Click where a person would."""
        self.call(self.find(selector) + "/click")

    def press(self, keys: str) -> None:
        """Type into whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keys", "actions": strokes}])

    def read(self, selector: str) -> str:
        """The visible text of an element, asked of the driver: works with the page's scripts off."""
        with self._opener.open(self._at + self.find(selector) + "/text", timeout=30) as reply:
            return json.load(reply)["value"]

    def texts(self, selector: str) -> list[str]:
        """The visible text of each element a selector finds."""
        return self.ask("return [...document.querySelectorAll(arguments[0])].map(each => each.innerText)", selector)

    def text(self, selector: str) -> str:
        """The visible text of the one element a selector finds."""
        (text,) = self.texts(selector)
        return text


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests here; nothing but loopback and files is asked of it."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(session: Browser) -> Iterator[Browser]:
    """The browser on a laptop's screen; afterwards, no page of ours may have complained on its console."""
    session.devtools("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    session.devtools("Emulation.setEmulatedMedia", media="", features=[])
    yield session
    assert session.call("/se/log", type="browser") == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 120 problems with 3 candidates each: apples in every fourth, problem n has n % 4 right answers."""
    rows = [candidate(n, sample) for n in range(120) for sample in range(3)]
    shares = {
        "first": 0.4,
        "mean": {"value": 0.4321, "ci95": [0.4, 0.47]},
        "majority": 0.5,
        "oracle": 0.75,
        "energy": 0.6,
    }
    summary = {"model": EVIL, "job": "eval-gsm8k", "run_id": "r1", "selection": shares, "metrics": {"strict": 0.4321}}
    selections = {
        f"test/{n}": {"sample_index": 2, "samples": [0, 1, 2], "scores": [0.1, 0.2, 0.9], "error": None}
        for n in range(120)
    }
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(path, summary, rows, selections, {"params": {"samples": 3}})
    return path


def candidate(number: int, sample: int) -> dict[str, Any]:
    """One row: an error for problem 119's last sample, hostile text for problem 5, a cut one for problem 6."""
    fruit = "apples" if number % 4 == 0 else "pears"
    failed = number == 119 and sample == 2
    text = f"I count {number} {fruit}. " + ("x" * 9_000 if number == 6 else "")
    return {
        "example_id": f"test/{number}",
        "sample_index": sample,
        "messages": [{"role": "user", "content": f"Answer in a word. How many {fruit}? {EVIL if number == 5 else ''}"}],
        "subject": "Counting" if number < 60 else "Weighing",
        "completion": None if failed else EVIL + text if number == 5 else text,
        "finish_reason": "length" if number == 6 else "stop",
        "tokens_out": number,
        "answer": None if failed else str(number + sample // 2),
        "target": str(number),
        "score": None if failed else float(sample < number % 4),
        "answers": {"strict": None if number == 6 else "1", "flexible": "1"},
        "scores": {"strict": float(number != 6), "flexible": 1.0},
        "error": "CUDA out of memory" if failed else None,
    }


def until(true: Callable[[], bool]) -> None:
    """Return once a condition holds; every look is a round trip to the browser."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline


def ids(browser: Browser) -> list[str]:
    return browser.texts("td.problem .id")


def test_a_bar_is_as_long_as_its_number(browser: Browser, page: Path):
    """On the axis from 0 to 100 % the bar of 43.21 % ends there, and its whisker reaches from 40 to 47 %."""
    browser.open(page)
    left, right, low, high = browser.ask("""
        const chart = document.querySelectorAll(".ways .plot")[1];
        const place = (each) => each.getBoundingClientRect();
        const axis = place(chart);
        const [bar, whisker] = [".bar", ".whisker line"].map((each) => place(chart.querySelector(each)));
        return [bar.left, bar.right, whisker.left, whisker.right].map((x) => (x - axis.left) / axis.width);
    """)
    assert [left, right, low, high] == pytest.approx([0, 0.4321, 0.4, 0.47], abs=0.005)


def test_search_and_filter_narrow_the_list(browser: Browser, page: Path):
    """Typing a word, choosing a mark and a subject each narrow the list, and the counts on the filters follow."""
    browser.open(page)
    assert browser.text("#count") == "1–50 of 120 problems"
    assert browser.texts(".segments b") == ["120", "30", "60", "30", "1"]
    browser.press("/apples")
    until(lambda: browser.text("#count") == "1–30 of 30 problems")
    assert browser.texts(".segments b") == ["30", "0", "0", "30", "0"]
    assert browser.texts("mark")[0] == "apples"
    browser.click("#clear")
    browser.click(".segments label:nth-of-type(4)")
    browser.ask(
        "arguments[0].value = 'Weighing'; arguments[0].dispatchEvent(new Event('change'))",
        {ELEMENT: browser.find("#subject")[9:]},
    )
    assert browser.text("#count") == "1–15 of 15 problems"
    assert browser.ask("return location.hash") == "#show=wrong&subject=Weighing"
    assert ids(browser)[:2] == ["test/60", "test/64"]


def test_a_heading_sorts_up_then_down(browser: Browser, page: Path):
    """A click on a heading sorts by it, another turns it round; numbers in ids sort as numbers; the arrow is told."""
    browser.open(page)
    assert ids(browser)[:3] == ["test/0", "test/1", "test/2"]
    browser.click("th[data-key=tokens] button")
    browser.click("th[data-key=tokens] button")
    assert ids(browser)[:3] == ["test/119", "test/118", "test/117"]
    assert browser.ask("return document.querySelector('th[data-key=tokens]').ariaSort") == "descending"
    browser.click("th[data-key=right] button")
    assert ids(browser)[:2] == ["test/0", "test/4"]
    assert browser.texts("tr.example:first-child td.right .share") == ["0/3"]
    assert browser.ask("return document.activeElement.innerText.trim()").startswith("Right")


def test_the_address_brings_back_what_was_shown(browser: Browser, page: Path):
    """Words, mark, subject, order and page in the address are shown at once; nonsense in it is passed over."""
    browser.open(page, "#q=pears&show=mixed&sort=-tokens&page=2&open=test%2F2")
    assert browser.text("#count") == "51–60 of 60 problems"
    assert ids(browser)[-1] == "test/1"
    assert browser.texts(".detail .candidate h4") == ["Answer 1", "Answer 2", "Answer 3"]
    browser.open(page, "#show=%22%5D&sort=nothing&page=-7&subject=")
    assert browser.text("#count") == "1–50 of 120 problems"
    browser.open(page, "#q=(%5B%2A%5C")
    assert browser.text("#count") == "No problem matches."


def test_pages_hold_fifty_problems(browser: Browser, page: Path):
    """The third page of 120 problems holds the last twenty, and there is none after it."""
    browser.open(page)
    assert len(ids(browser)) == 50
    browser.click("#next")
    browser.click("#next")
    assert (len(ids(browser)), ids(browser)[-1]) == (20, "test/119")
    assert browser.ask("return document.getElementById('next').disabled") is True
    assert browser.text("#page") == "Page 3 of 3"


def test_a_problem_is_opened_and_read_by_keyboard(browser: Browser, page: Path):
    """Down and Enter open a problem: its answers, their marks, and which one the vote and the re-ranker chose."""
    browser.open(page)
    browser.ask("document.querySelector('.toggle').focus()")
    browser.press(DOWN + DOWN + ENTER)
    assert browser.texts("tr.open .id") == ["test/2"]
    cards = [" ".join(card.split()) for card in browser.texts(".detail .candidate")]
    assert cards[0].startswith("Answer 1 ✓ right chosen by majority vote re-ranker 0.1 Extracted 2 I count 2 pears.")
    assert cards[2].startswith("Answer 3 ✗ wrong chosen by re-ranker 0.9 Extracted 3")
    assert browser.text(".detail .target .prose") == "2"
    assert browser.ask("return location.hash") == "#open=test%2F2"
    browser.press(ENTER)
    assert browser.texts("tr.open") == []


def test_marks_of_what_went_wrong_are_seen(browser: Browser, page: Path):
    """An unscored answer shows its error, a cut one its mark and tag, one that rules disagree on what each found."""
    browser.open(page, "#show=unscored&open=test%2F119")
    assert ids(browser) == ["test/119"]
    assert browser.text(".detail .error") == "CUDA out of memory"
    assert "not scored" in browser.texts(".detail .tag")[-2]
    assert len(browser.texts(".detail .found")) == 2  # where the model was not heard, nothing could be found
    browser.open(page, "#open=test%2F6")
    assert browser.texts(".detail .cut")[0] == "3,017 characters cut; all of it is in rows.jsonl"
    assert browser.texts(".detail .tag.warn")[0] == "cut at the token limit"
    rules = [" ".join(rule.split()) for rule in browser.texts(".detail .candidate:first-child .rules li")]
    assert rules == ["✗ wrong strict none found", "✓ right flexible 1"]
    assert browser.ask("return document.querySelectorAll('.rules').length") == 3


def test_hostile_text_stays_text(browser: Browser, page: Path):
    """Markup in model name, prompt and completion is read as written, makes no element, and runs nothing."""
    browser.open(page, "#open=test%2F5")
    assert browser.text("h1") == EVIL
    assert EVIL in browser.texts(".detail .candidate .prose")[0]
    assert browser.ask("return [document.images.length, document.scripts.length, window.evil]") == [0, 2, None]
    assert browser.texts("td.problem .excerpt")[0] == "apples?"  # what all prompts begin with is left out


def test_the_theme_chosen_is_remembered(browser: Browser, page: Path):
    """The button goes from the system's theme to light to dark, and dark is still there after a reload."""
    colour = "return getComputedStyle(document.body).backgroundColor"
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.open(page)
    light = browser.ask(colour)
    browser.click("#theme")
    browser.click("#theme")
    assert browser.text("#theme") == "Theme: dark"
    dark = browser.ask(colour)
    browser.open(page)
    assert (browser.ask(colour), browser.text("#theme")) == (dark, "Theme: dark")
    assert dark != light
    browser.click("#theme")
    assert (browser.ask(colour), browser.text("#theme")) == (light, "Theme: system")


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data;
};
const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const light = (colour) => {
  const [r, g, b] = [...rgba(colour)].map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  while (node && rgba(getComputedStyle(node).backgroundColor)[3] < 255) node = node.parentElement;
  return getComputedStyle(node || document.body).backgroundColor;
};
const worst = {};
for (const node of document.querySelectorAll("body *:not(script, svg, svg *, :disabled)")) {
  const said = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
  if (!said || !node.checkVisibility()) continue;
  const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
  const name = `${node.tagName}.${node.className}`;
  worst[name] = Math.min(worst[name] || 99, (a + 0.05) / (b + 0.05));
}
return worst;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(browser: Browser, page: Path, theme: str):
    """Every text on the page has a contrast of at least 4.5 to 1 (WCAG 2.2, AA) in both themes."""
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.open(page, "#q=count&open=test%2F6&open=test%2F2&open=test%2F119")
    contrasts = browser.ask(CONTRASTS)
    assert len(contrasts) > 30
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, page: Path):
    """At 360 points nothing is wider than the screen, also with a problem open, and sorting is at hand."""
    browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=780, deviceScaleFactor=2, mobile=True)
    browser.open(page, "#open=test%2F5&open=test%2F6")
    assert browser.ask("return document.documentElement.scrollWidth") == 360
    assert browser.ask("return document.getElementById('sort').checkVisibility()") is True
    assert browser.ask("return document.querySelector('.problems thead').checkVisibility()") is False


def test_numbers_can_be_read_with_scripts_off(browser: Browser, page: Path):
    """Without scripts the headline, the bars and a word on where the rows are remain; dead controls are not shown."""
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        body = browser.read("main")
        assert "One answer, at random\n43.2%\n95% interval 40.0% – 47.0%" in body
        assert "Reading single problems here needs scripts" in body
        assert "Search" not in body
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_paper_shows_the_answers_and_no_controls(browser: Browser, page: Path):
    """In print the filters and buttons are gone, open answers stay in full, and the sheet is light."""
    browser.devtools(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    browser.open(page, "#open=test%2F6")
    shown = "return arguments[0].map(each => document.querySelector(each).checkVisibility())"
    assert browser.ask(shown, ["#filters", ".pager", "#theme", ".candidate"]) == [False, False, False, True]
    assert browser.ask("return getComputedStyle(document.querySelector('.candidate .prose')).maxHeight") == "none"
    assert browser.ask("return getComputedStyle(document.documentElement).colorScheme") == "light"
