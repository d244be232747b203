"""What a person sees: logs whole across cut characters, words made harmless, and a tally that nothing upsets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import rows, rundir
from orchestrator import logs, runs, view
from orchestrator.plain import plain
from orchestrator.runs import Record, Run

STATUS = {"phase": "generating", "rows_total": 8, "rows_per_second": 2.0, "eta_s": 90.0}
TITLE = "\x1b]0;owned\x07"


@pytest.fixture
def run() -> Run:
    """A run whose machine has sent nothing yet."""
    record = Record("20260101-x-0000", "x", "local", "0" * 16, "python", "/", "2026-01-01T00:00:00.000Z")
    return runs.create(record, {})


def attempt(run: Run, number: int = 1) -> rundir.Attempt:
    made = run.home.machine("local").attempt(number)
    made.folder.mkdir(parents=True, exist_ok=True)
    return made


def status(**changes: Any) -> tuple[dict[str, Any], bytes]:
    return {"whole": "attempts/0001/status.json"}, json.dumps(STATUS | changes).encode()


def rows_frame(*lines: bytes) -> tuple[dict[str, Any], bytes]:
    return {"file": "attempts/0001/rows.jsonl"}, b"".join(lines)


def row(number: int, **more: Any) -> bytes:
    return rows.encode({"key": f"t/s/{number}#0", "error": None, "score": 1.0, **more})


@pytest.mark.parametrize("at", range(1, 17))
def test_a_character_cut_between_two_looks_is_printed_whole(run: Run, at: int) -> None:
    """Wherever a log was cut by a look, the next one goes on so that no character is damaged, lost or said twice."""
    said: list[str] = []
    tail = logs.Tail(run, said.append)
    text = "né 漢字 🙂\n"
    data = text.encode()
    assert len(data) == 16
    for end in (at, len(data), len(data)):
        attempt(run).log.write_bytes(data[:end])
        tail.print_new()
    assert "".join(said) == text


def test_two_attempts_do_not_share_a_cut_character(run: Run) -> None:
    """A character cut off for good by the end of one attempt does not run into the next one, which is announced."""
    said: list[str] = []
    tail = logs.Tail(run, said.append)
    attempt(run, 1).log.write_bytes("né".encode()[:-1])
    tail.print_new()
    attempt(run, 2).log.write_bytes("é\n".encode())
    tail.print_new()
    assert "".join(said) == "n--- attempt 2 ---\né\n"


def test_a_log_begins_with_its_last_lines_and_goes_on_there(run: Run) -> None:
    """`show` prints so many last lines of the newest attempt; the tail it returns prints only what came later."""
    said: list[str] = []
    attempt(run, 1).log.write_bytes(b"old\n")
    attempt(run, 2).log.write_bytes(b"one\ntwo\nthree\n")
    tail = logs.show(run, 2, said.append)
    with attempt(run, 2).log.open("ab") as log:
        log.write(b"four\n")
    tail.print_new()
    assert said == ["two\nthree\n", "four\n"]


def test_no_lines_are_none(run: Run) -> None:
    """Asked for no line, `show` prints nothing."""
    said: list[str] = []
    attempt(run).log.write_bytes(b"one\n")
    logs.show(run, 0, said.append)
    assert said == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\n\ttwo 漢字 🙂 [bold]", "one\n\ttwo 漢字 🙂 [bold]"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b]0;owned\x07title", "title"),
        ("\x1b]8;;https://x.example\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bcreset", "creset"),
        ("100 %\r0 %", "100 %0 %"),
        ("a\x00b\x08c\x7fd\x9b31me", "abcd31me"),
        ("\x1b]0;without an end", "0;without an end"),
    ],
)
def test_what_moves_a_terminal_is_left_out(text: str, shown: str) -> None:
    """Escape sequences and control characters are left out; letters, newlines, tabs and brackets stay."""
    assert plain(text) == shown


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\x1b[]0;m\x07\\\x9b\r"), max_size=40))
def test_nothing_that_controls_is_left(text: str) -> None:
    """No text keeps a control character but newline and tab, and nothing is left out of a harmless one."""
    shown = plain(text)
    assert not [sign for sign in shown if (ord(sign) < 32 or 127 <= ord(sign) < 160) and sign not in "\n\t"]
    assert plain(shown) == shown


def test_a_tally_counts_what_comes_home() -> None:
    """Good rows add to those that were home; the mean is over scores that there are; what cannot be read is no row."""
    tally = view.Tally([row(8), row(9), b"damaged"])
    lines = [row(1), row(2, score=0.0), row(3, score=None), row(4, error="timed out", score=None), b"damaged\n"]
    assert tally.take(*rows_frame(*lines))
    assert tally.home == 5
    assert tally.score == "score 0.750"


def test_a_tally_says_all_of_it_on_one_line() -> None:
    """The line has phase, rows home of how many, score, pace and time left; before anything came it says so."""
    tally = view.Tally()
    assert tally.line() == "starting · 0 rows home"
    tally.take(*status())
    tally.take(*rows_frame(row(1)))
    assert tally.line() == "generating · 1 of 8 rows home · score 1.000 · 2.0 rows/s · about 1 min 30 s left"


@pytest.mark.parametrize("name", ["log.txt", "selections.jsonl", "env.json", "exit.json"])
def test_other_files_are_no_news_for_a_tally(name: str) -> None:
    """A frame of another file changes nothing and asks for no new line."""
    tally = view.Tally()
    assert not tally.take({"file": f"attempts/0001/{name}"}, row(1))
    assert not tally.take({"whole": f"attempts/0001/{name}"}, status()[1])
    assert not tally.take({"beat": True}, b"")
    assert tally.line() == "starting · 0 rows home"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\0", b'{"phase"', b"[1]", b"null", b"{}", b'{"phase": "x"}', b"\xff", status(rows_total="many")[1]],
)
def test_a_damaged_status_leaves_the_last_good_one(data: bytes) -> None:
    """A status that a power cut tore is passed over: what was known of rows and pace stays."""
    tally = view.Tally()
    tally.take(*status())
    before = (tally.total, tally.rate, tally.eta_s)
    tally.take({"whole": "attempts/0001/status.json"}, data)
    assert (tally.total, tally.rate, tally.eta_s) == before


def test_a_phase_is_made_harmless() -> None:
    """A phase with escape sequences reaches the line without them; its brackets are words, not markup."""
    tally = view.Tally()
    tally.take(*status(phase=f"{TITLE}[/x]loading"))
    assert tally.phase == "[/x]loading"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (45.4, "45 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_time_spans_are_said_as_people_say_them(seconds: float, words: str) -> None:
    """A span has its two largest units, padded, and never sixty of the smaller one."""
    assert view.duration(seconds) == words


def test_where_nobody_looks_lines_are_plain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a terminal, a new phase is one plain line on standard error; the same phase again is none."""
    with view.watching(tmp_path / "rows.jsonl", quiet=False) as news:
        for phase in ("loading", "loading", "generating"):
            news(*status(phase=phase))
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(" ")[0] for line in said.err.splitlines()] == ["loading", "generating"]


def test_a_score_counts_what_was_home_before(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Carrying on, the mean begins with the rows that are there."""
    (tmp_path / "rows.jsonl").write_bytes(row(1, score=0.0) + row(2, score=1.0))
    with view.watching(tmp_path / "rows.jsonl", quiet=False) as news:
        news(*status())
    assert "2 of 8 rows home · score 0.500" in capsys.readouterr().err


def test_a_mirror_in_trouble_is_said_once() -> None:
    """That a mirror takes no copies is said, with the reason, when it is first known, and not at every status."""

    def said(mirror: object) -> str:
        return view.spoken({"whole": "attempts/0001/status.json"}, json.dumps({"mirror": mirror}).encode())

    assert said({"target": "/nfs", "failed": None}) == ""
    assert said({"target": "/nfs", "failed": "disk \x1b[2J full"}).startswith("THE MIRROR /nfs TAKES NO COPIES: disk")
    assert said({"target": "/nfs", "failed": "disk \x1b[2J full"}) == ""
    assert "\x1b" not in said({"target": "/nfs", "failed": "another \x1b[2J trouble"})
    assert said("nonsense") == said(["x"]) == said(None) == ""


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asked to be quiet, nothing is printed whatever comes."""
    with view.watching(tmp_path / "rows.jsonl", quiet=True) as news:
        news(*status())
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def printed(run: Run) -> Callable[[bytes], str]:
    """What `gpu logs` would print of a log."""

    def show(data: bytes) -> str:
        said: list[str] = []
        Path(attempt(run).log).write_bytes(data)
        logs.show(run, 10, said.append)
        return "".join(said)

    return show


def test_bytes_that_are_no_text_are_shown_as_such(printed: Callable[[bytes], str]) -> None:
    """A log that is not UTF-8 is shown with the usual sign for what cannot be read, not refused."""
    assert printed(b"caf\xe9\n") == "caf\ufffd\n"
