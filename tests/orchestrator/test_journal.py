"""The journal of all runs and the notes in it: quick, whole, and broken by nothing that a user or a path may hold."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs import locks
from orchestrator import journal, notes
from orchestrator.errors import ConfigError, UsageError
from tests.journeys.hurried import document, gpu
from tests.orchestrator import keeping

HOSTILE = "a | b\nc \\| d `e` <img src=x onerror=alert(1)> **f** [g](javascript:h) & " + (
    "\x1b]0;title\x07\x1b[31mred\x00 \u202eabc"
)


def table(text: str) -> list[list[str]]:
    """The cells of the one table of a Markdown text, as any parser finds them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_run_is_a_line_with_its_score_its_categories_and_its_notes() -> None:
    """Score with interval, the weakest category first, cost, and the notes in their order stand in one line."""
    run = keeping.ended(keeping.begun({"dataset": "generated"}))
    notes.add(run, "with the old prompt")
    notes.add(run, "-5 % of what I hoped")
    (line,) = table(journal.markdown(journal.read()))[2:]
    assert line[0] == run.run_id
    assert line[2:8] == ["eval-gsm8k", "gsm8k", "generated", "tiny", "", "sealed"]
    assert line[8:11] == ["numeric 0.660 (0.617 to 0.700)", "comparison 0.216, addition 0.900", "1.25"]
    assert [note.partition(" ")[2] for note in line[11].split("<br>")] == [
        "with the old prompt",
        "-5 % of what I hoped",
    ]


def test_a_training_shows_its_losses() -> None:
    """In place of a score stand the first and last loss and that of the rows held out."""
    made = {"first_loss": 2.5, "final_loss": 1.25, "eval_loss": 1.5, "steps_done": 10, "steps_total": 10}
    keeping.ended(keeping.begun(job="train-lora"), training=made, metrics={}, resolved={})
    (entry,) = journal.read()["runs"]
    assert journal.result(entry) == "loss 2.5000 to 1.2500, held out 1.5000"


def test_a_run_of_several_tasks_shows_a_number_of_each() -> None:
    """Its tasks are named, and what each is known by stands beside its name."""
    acc = {"value": 0.25, "stderr": 0.1, "ci95": [0.1, 0.4], "n": 30}
    parts = {"mmlu": {"headline": "acc", "metrics": {"acc": acc}}, "gsm8k": {"headline": "numeric", "metrics": {}}}
    keeping.ended(keeping.begun(job="baseline"), metrics={"mmlu/acc": acc}, resolved={}, parts=parts)
    (line,) = table(journal.markdown(journal.read()))[2:]
    assert line[3] == "mmlu, hellaswag, gsm8k, perplexity, generation"
    assert line[8:10] == ["", "mmlu acc 0.250"]


def test_no_text_breaks_the_table_or_becomes_markup() -> None:
    """A note with pipes, lines, escapes and mark-up is one cell, shown as written; nothing of it acts anywhere."""
    run = keeping.ended(keeping.begun({"dataset": "generated"}))
    notes.add(run, HOSTILE)
    found = journal.read()
    text = journal.markdown(found)
    (line,) = table(text)[2:]
    assert len(line) == len(journal.COLUMNS)
    assert "<br>c &#92;&#124; d" in line[-1]
    for unwanted in ("\x1b", "\x00", "\x07", "\u202e", "<img", "[g]", "**f**", "`e`"):
        assert unwanted not in text
    page = journal.html(found)
    assert "<img" not in page
    assert html.unescape(re.findall(r"<td[^>]*><bdi>([^<]*)</bdi></td>", page)[-1])[11:16] == "a | b"


def test_a_run_without_a_summary_or_a_folder_is_said() -> None:
    """One that has not ended has an empty score; one whose folder has gone is named, with where it was; exit code 0."""
    keeping.begun({"dataset": "generated"})
    gone = keeping.begun()
    broken = keeping.ended(keeping.begun())
    shutil.rmtree(gone.home.folder)
    broken.home.job.write_text("{")
    done = gpu("journal")
    assert done.returncode == 0, done.stderr
    assert f"- {gone.run_id}: " in done.stdout
    assert [(line[0] == broken.run_id, line[7]) for line in table(done.stdout)[2:]].count((False, "planned")) == 1
    found = document("journal")
    assert found["gone"] == [{"run_id": gone.run_id, "folder": str(gone.home.folder)}]
    assert [each["command"] is None for each in found["runs"] if each["run_id"] == broken.run_id] == [True]


def test_the_files_are_written_whole(tmp_path: Path) -> None:
    """`--md` and `--html` write their files and nothing on stdout; a folder that is not there is said; code 3."""
    run = keeping.ended(keeping.begun())
    done = gpu("journal", "--md", "all.md", "--html", "all.html")
    assert (done.returncode, done.stdout) == (0, "")
    assert run.run_id in Path("all.md").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in Path("all.html").read_text(encoding="utf-8")
    assert gpu("journal", "--md", str(tmp_path / "no" / "all.md")).returncode == 3


def test_a_note_is_taken_as_it_is_typed() -> None:
    """Of the newest run by a part of its id, with a dash in front, with bytes that are no text; never empty."""
    run = keeping.ended(keeping.begun())
    done = gpu("note", run.run_id[-4:], "-5 % | worse")
    assert done.returncode == 0, done.stderr
    odd = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "note", run.run_id, b"caf\xe9"], capture_output=True, check=False
    )
    assert odd.returncode == 0, odd.stderr
    assert [note["text"] for note in notes.read(run)] == ["-5 % | worse", "caf\ufffd"]
    assert [note["text"] for note in document("journal")["runs"][0]["notes"]] == ["-5 % | worse", "caf\ufffd"]
    assert gpu("note", run.run_id, "  ").returncode == 2
    assert gpu("note", "no-such-run", "words").returncode == 2
    with pytest.raises(UsageError):
        notes.add(run, "x" * (notes.MOST_CHARS + 1))


def test_a_torn_note_is_set_aside_and_the_next_one_is_whole() -> None:
    """What a power cut left of a line neither hides earlier notes nor swallows the next one."""
    run = keeping.ended(keeping.begun())
    notes.add(run, "one")
    with run.home.notes.open("ab") as file:
        file.write(b'{"key":"2026","text":"tor')
    notes.add(run, "two")
    assert [note["text"] for note in notes.read(run)] == ["one", "two"]


def test_notes_written_at_once_are_all_there() -> None:
    """Eight writers, one file: every note is home, each in a line of its own."""
    run = keeping.ended(keeping.begun())
    threads = [threading.Thread(target=notes.add, args=(run, f"note {number}")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(note["text"] for note in notes.read(run)) == [f"note {number}" for number in range(8)]


def test_a_note_waits_for_the_one_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process has the notes' lock nothing is written or set aside, and that is said."""
    monkeypatch.setattr("orchestrator.notes._WAIT_S", 0.1)
    run = keeping.ended(keeping.begun())
    run.home.notes.write_bytes(b'{"key":"half a li')
    with locks.held(run.home.notes_lock, 1.0), pytest.raises(ConfigError, match="Nothing was noted"):
        notes.add(run, "meanwhile")
    assert run.home.notes.read_bytes() == b'{"key":"half a li'


def test_five_hundred_runs_are_listed_in_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not read: 500 ended runs take at most 2 s of this process's time."""
    monkeypatch.setattr("jobs.durable.sync", lambda _: None)
    monkeypatch.setattr("jobs.durable.sync_folder", lambda _: None)
    for number in range(500):
        run = keeping.bare(f"20261120-eval-gsm8k-tiny-{number:04x}")
        run.home.rows.write_text("no row at all\n")
    before = time.process_time()
    found = journal.read()
    text = journal.markdown(found)
    assert time.process_time() - before < 2.0
    assert len(table(text)) == 502
    assert json.dumps(found)
