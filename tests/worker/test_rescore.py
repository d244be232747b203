"""Rescoring files of completions, as the laptop does it: a child process with nothing but the standard library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worker.tasks import humaneval

WORKER = Path(__file__).parents[2] / "worker" / "__main__.py"
GOLD = "3*4=<<3*4=12>>12\n#### 12"
LINES = [
    {"text": "It is 12.\n#### 12", "gold": GOLD},
    {"text": "It is $12.00", "gold": GOLD},
    {"text": "It is 13.", "gold": "12"},
    {"text": "no idea", "gold": 12},
]
SCORES = [
    {"numeric": 1.0, "strict": 1.0, "flexible": 1.0},
    {"numeric": 1.0, "strict": 0.0, "flexible": 0.0},
    {"numeric": 0.0, "strict": 0.0, "flexible": 0.0},
    {"numeric": 0.0, "strict": 0.0, "flexible": 0.0},
]


def rescore(path: Path, **changed: str | bool) -> tuple[int, Any]:
    """The exit code and the document of a rescoring child; extra words replace those of the request."""
    asked = {"task": "gsm8k", "path": str(path), "completion": "text", "target": "gold", **changed}
    words = [sys.executable, "-I", "-S", str(WORKER), "rescore"]
    done = subprocess.run(words, input=json.dumps(asked).encode(), capture_output=True, timeout=120)
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


def written(path: Path, rows: list[Any]) -> Path:
    """The path, after the rows are written to it as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_rule_counts_and_disagreements_are_listed(tmp_path: Path) -> None:
    """Each row gets the scores of all rules; the rules are counted, and rows on which they differ are listed."""
    code, found = rescore(written(tmp_path / "a.jsonl", LINES))
    assert code == 0
    assert (found["task"], found["n"]) == ("gsm8k", 4)
    assert found["rules"] == {
        "numeric": {"correct": 2, "scored": 4, "unscored": 0},
        "strict": {"correct": 1, "scored": 4, "unscored": 0},
        "flexible": {"correct": 1, "scored": 4, "unscored": 0},
    }
    assert found["rows"] == [{"index": index, "scores": scores} for index, scores in enumerate(SCORES)]
    answers = {"numeric": "12", "strict": None, "flexible": "$12.00"}
    assert found["disagreements"] == [{"index": 1, "answers": answers, "scores": SCORES[1]}]


def test_a_whole_last_line_without_newline_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    """A last line without its newline is scored when it parses; else it is passed over, and that is said."""
    path = written(tmp_path / "a.jsonl", LINES)
    path.write_bytes(path.read_bytes()[:-1])
    code, found = rescore(path)
    assert (code, found["n"], found["ignored_last_line"]) == (0, 4, False)
    path.write_bytes(path.read_bytes()[:-3])
    code, found = rescore(path)
    assert (code, found["n"], found["ignored_last_line"]) == (0, 3, True)


def test_rows_with_an_error_and_no_completion_are_unscored(tmp_path: Path) -> None:
    """A run's row that has an error instead of a completion has null scores; the row that replaces it takes over."""
    failed = {"key": "k1", "error": "out of memory", "text": None, "gold": "12"}
    other = {"key": "k2", "error": "cut off", "gold": "12"}
    good = {"key": "k1", "error": None, "text": "#### 12", "gold": "12"}
    code, found = rescore(written(tmp_path / "a.jsonl", [failed, other, failed]))
    assert (code, found["n"], found["rules"]["strict"]["unscored"]) == (0, 2, 2)
    code, found = rescore(written(tmp_path / "a.jsonl", [failed, other, good]))
    assert found["rules"]["strict"] == {"correct": 1, "scored": 1, "unscored": 1}
    assert found["rows"][0] == {"index": 1, "scores": dict.fromkeys(SCORES[0])}
    assert [row["index"] for row in found["rows"]] == [1, 2]
    assert found["disagreements"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "1", "gold": "1"}\n\n{"text": "1"}\n', "line 3: no field 'gold'"),
        (b'{"gold": "1"}\n', "line 1: no field 'text'"),
        (b'{"text": null, "gold": "1", "error": null}\n', "line 1: no field 'text'"),
        (b'{"text": ["1"], "gold": "1"}\n', "line 1: the field 'text' holds no text"),
        (b'{"text": "1", "gold": true}\n', "line 1: the field 'gold' holds no text"),
        (b'{"text": "1", "gold": "1"}\n{oops}\n', "line 2: not JSON"),
        (b"[1]\n", "line 1: not an object"),
        (b'{"text": "\xe9", "gold": "1"}\n', "line 1: byte 0xe9 is not UTF-8"),
        (b"\n", "no rows"),
        (b'{"text"', "only line is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """What cannot be scored gives a failure document that names the file and the line, counted from 1, and a code."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    code, found = rescore(path)
    assert code != 0
    assert set(found["failed"]) == {"kind", "message", "hint"}
    assert words in found["failed"]["message"]
    assert str(path) in found["failed"]["message"]


def test_an_unknown_task_and_a_missing_file_are_named(tmp_path: Path) -> None:
    """A task that does not exist, a path that cannot be read and a request that is none are failures with words."""
    path = written(tmp_path / "a.jsonl", LINES)
    assert "'chess'" in rescore(path, task="chess")[1]["failed"]["message"]
    assert "nowhere.jsonl" in rescore(tmp_path / "nowhere.jsonl")[1]["failed"]["message"]
    words = [sys.executable, "-I", "-S", str(WORKER), "rescore"]
    done = subprocess.run(words, input=b"{}", capture_output=True, timeout=60)
    assert done.returncode != 0
    assert "request" in json.loads(done.stdout)["failed"]["message"]


def test_an_error_row_with_its_completion_is_scored(tmp_path: Path) -> None:
    """A row whose scoring failed once, but whose completion is there, is scored again."""
    row = {"key": "k", "error": "the scorer timed out", "text": "#### 12", "gold": "12"}
    assert rescore(written(tmp_path / "a.jsonl", [row]))[1]["rules"]["numeric"]["correct"] == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    """100,000 rows of reasoning are scored in at most 20 s of processor time and 100 MiB of memory."""
    reasoning = "She sells 16 - 3 - 4 = 9 eggs at $2.50 each, which makes $22.50 a day, so: " * 8
    path = written(tmp_path / "a.jsonl", [{"text": f"{reasoning}{n % 50}.", "gold": GOLD} for n in range(100_000)])
    program = (
        "import pathlib, resource, runpy, sys\n"
        f"sys.argv = [{str(WORKER)!r}, 'rescore']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
        "print(used.ru_utime + used.ru_stime, int(peak) / 1024, file=sys.stderr)\n"
    )
    asked = {"task": "gsm8k", "path": str(path), "completion": "text", "target": "gold"}
    words = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(words, input=json.dumps(asked).encode(), capture_output=True, check=True, timeout=200)
    found = json.loads(done.stdout)
    assert (found["n"], found["rules"]["numeric"]["correct"]) == (100_000, 2_000)
    cpu_s, peak_mib = map(float, done.stderr.split())
    assert cpu_s <= 20
    assert peak_mib <= 100


def test_choices_are_taken_again_from_their_likelihoods(tmp_path: Path) -> None:
    """Rows of weighed choices are scored again by every rule; an error row stays unscored, other rows are refused."""
    row = {"key": "a#0", "error": None, "logliks": [-4.0, -5.0], "choices": ["ab", "abcd"], "target": 1}
    lines = [row, {"key": "b#0", "error": "too large", "logliks": None, "choices": ["a", "b"], "target": 0}]
    code, found = rescore(written(tmp_path / "a.jsonl", lines), task="arc", target="target")
    assert code == 0
    assert found["rules"]["acc"] == {"correct": 0, "scored": 1, "unscored": 1}
    assert found["rules"]["acc_norm"] == {"correct": 1, "scored": 1, "unscored": 1}
    assert [line["answers"] for line in found["disagreements"]] == [{"acc": "0", "acc_norm": "1", "acc_bytes": "1"}]
    for broken in ({"logliks": [1.0]}, {"choices": ["", "b"]}, {"target": None}):
        code, found = rescore(written(tmp_path / "b.jsonl", [{**row, **broken}]), task="arc", target="target")
        assert code == 3
        assert "line 1: 'logliks' and 'choices'" in found["failed"]["message"]


def test_texts_that_were_read_have_nothing_to_score(tmp_path: Path) -> None:
    """Perplexity is counted from rows, not scored: that is said, with the command that counts."""
    code, found = rescore(written(tmp_path / "a.jsonl", LINES), task="perplexity")
    assert code == 3
    assert "gpu report" in found["failed"]["hint"]


def test_what_a_model_wrote_is_run_only_when_that_is_allowed(tmp_path: Path) -> None:
    """Scoring programs again is refused with what would happen and how to say yes; with it, they run in the sandbox."""
    (record, *_) = [json.loads(line) for line in Path(humaneval.SAMPLE).read_text().splitlines()]
    (example,) = humaneval.examples([record])
    rows = [{"text": text, "gold": example.target} for text in (record["canonical_solution"], "    return None\n")]
    path = written(tmp_path / "a.jsonl", rows)
    code, found = rescore(path, task="humaneval")
    assert (code, found["failed"]["kind"]) == (3, "consent")
    assert "walls" in found["failed"]["message"]
    code, found = rescore(path, task="humaneval", allow=True)
    assert (code, found["rules"]["passed"]) == (0, {"correct": 1, "scored": 2, "unscored": 0})


def test_a_row_says_why_its_completion_ended(tmp_path: Path) -> None:
    """The finish reason of a row is scored again as it was in the run."""
    rows = [{"text": "One two three.", "gold": '{"language":null}', "finish_reason": why} for why in ("stop", "length")]
    code, found = rescore(written(tmp_path / "a.jsonl", rows), task="generation")
    assert (code, found["rules"]["stops"]) == (0, {"correct": 1, "scored": 2, "unscored": 0})


def test_a_rule_without_its_package_is_unscored_and_told_of(tmp_path: Path) -> None:
    """Where math-verify is missing, as without site packages, the other rule scores, and what to install is said."""
    code, found = rescore(written(tmp_path / "a.jsonl", [{"text": r"\boxed{2}", "gold": r"\boxed{2}"}]), task="math")
    assert code == 0
    assert found["rules"]["exact_match"] == {"correct": 1, "scored": 1, "unscored": 0}
    assert found["rules"]["math_verify"] == {"correct": 0, "scored": 0, "unscored": 1}
    assert found["not_installed"] == ["math-verify[antlr4-11-0]"]
    assert found["disagreements"] == []
