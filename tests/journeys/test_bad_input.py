"""Bad input gets one clear paragraph and the right exit code; nothing is lost and no traceback is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import durable, rows

GPU = [sys.executable, "-m", "orchestrator.cli"]
GOOD = '{"question": "What is 2 + 2?", "answer": "2 + 2 = 4\\n#### 4"}\n'


def gpu(*words: str, within_s: float = 200.0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*GPU, *words], capture_output=True, text=True, check=False, timeout=within_s)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return gpu("run", "eval-gsm8k", "-q", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "eval-gsm8k", "--set", "smaples=3"], "did you mean samples?"),
        (["run", "eval-gsm8k", "--set", "samples=many"], "samples='many' is not a whole number from 1 to 1024"),
        (["run", "eval-gsm8k", "--set", "top_p=1.5"], "top_p=1.5 is not a number"),
        (["run", "eval-gsm8k", "--set", "samples"], "not of the form key=value"),
        (["run", "eval-gsm8k", "--set", "expect=0.7..0.5"], "expect"),
        (["run", "eval-gsm8k", "--set", "reranker=rank.py"], "path/to/file.py:function"),
        (["run", "eval-gsm8k", "--limit", "0"], "--limit"),
        (["run", "eval-gsm9k"], "did you mean eval-gsm8k?"),
        (["run", "../../etc/passwd"], "There is no job"),
        (["rnu"], "did you mean run?"),
        (["resume", "20200101-nothing"], "There are no runs yet"),
        (["rescore", "nothing.jsonl", "--task", "gsm8k"], "nothing.jsonl"),
        (["run", "eval-gsm8k", "--on", "box"], "There is no machine 'box'"),
    ],
)
def test_a_wrong_word_is_named_with_the_right_one(words: list[str], said: str) -> None:
    """What is typed wrong ends with exit code 2, names what was meant, and makes no run."""
    done = gpu(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"not json\n", "line 1"),
        (GOOD.encode() + b'{"question": "x"}\n', "answer"),
        ('{"question": "caf\u00e9", "answer": "#### 1"}\n'.encode("latin-1"), "UTF-8"),
        (GOOD.encode() + b"[1]\n", "2"),
        (b'{"question": "x", "answer": "no number"}\n', "row 1"),
    ],
    ids=["empty", "not-json", "no-answer", "latin-1", "not-an-object", "no-gold"],
)
@pytest.mark.first(3)
def test_a_bad_dataset_is_refused_with_the_row_named(content: bytes, said: str) -> None:
    """A dataset that cannot be used ends with exit code 3 and says which line is at fault, before any model is made."""
    Path("data.jsonl").write_bytes(content)
    done = run("--set", "dataset=data.jsonl")
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "data.jsonl" in done.stderr


def test_a_folder_is_no_dataset() -> None:
    """A folder given as dataset ends with exit code 3 and says so."""
    Path("folder").mkdir()
    done = run("--set", "dataset=folder")
    assert done.returncode == 3
    assert "folder" in done.stderr


def test_a_model_without_weights_is_refused(models: Path) -> None:
    """A model folder whose weights are missing ends with exit code 3 and names the files that were looked for."""
    source = next(path for path in models.iterdir() if path.is_dir() and not path.name.startswith("."))
    Path("model").mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "MANIFEST.json":
            (Path("model") / path.name).write_bytes(path.read_bytes())
    Path("data.jsonl").write_text(GOOD, encoding="utf-8")
    done = run("--set", "model=./model", "--set", "dataset=data.jsonl")
    assert done.returncode == 3, done.stderr
    assert "safetensors" in done.stderr


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no checkpoint')", "no checkpoint"),
        ("import threading; threading.Event().wait()", "no answer within"),
        pytest.param("return [1.0]", "did not return a list of 2 scores", marks=pytest.mark.slow),
        pytest.param("import os; os._exit(9)", "exit code 9", marks=pytest.mark.slow),
    ],
    ids=["raises", "hangs", "wrong-count", "dies"],
)
@pytest.mark.slow
def test_a_broken_reranker_is_an_error_on_its_column(trained: None, body: str, said: str) -> None:
    """A re-ranker that raises, hangs, dies or miscounts leaves the run sealed; its column says why it is empty."""
    Path("rank.py").write_text(f"def score(problem, candidates):\n    {body}\n", encoding="utf-8")
    words = ["--set", "samples=2", "--set", "reranker=rank.py:score", "--set", "reranker_timeout_s=0.5", "--limit", "2"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    folder = next(Path("results").iterdir())
    assert durable.load_json(folder / "summary.json")["scored"] == 4
    choices = list(rows.read([folder / "selections.jsonl"]))
    assert len(choices) == 2
    assert all(said in choice["error"] and choice["sample_index"] is None for choice in choices)


def test_a_working_reranker_has_its_column(trained: None) -> None:
    """A re-ranker's choices are scored beside the others, in a column of its name."""
    Path("rank.py").write_text(
        "def score(problem, candidates):\n    print('hello')\n    return [-len(c) for c in candidates]\n"
    )
    done = run("--set", "samples=2", "--set", "reranker=rank.py:score", "--limit", "3")
    assert done.returncode == 0, done.stderr
    folder = next(Path("results").iterdir())
    assert durable.load_json(folder / "summary.json")["selection"]["rank.py:score"]["value"] is not None


def test_results_that_cannot_be_written_start_nothing() -> None:
    """Where `results` cannot be made, the run ends with exit code 3 before anything starts."""
    Path("results").write_text("in the way", encoding="utf-8")
    done = run("--limit", "1")
    assert done.returncode == 3, done.stderr
    assert "Nothing was started" in done.stderr


def test_head_ends_quietly() -> None:
    """A reader that closes the pipe early is no error and prints nothing."""
    script = f"{sys.executable} -m orchestrator.cli jobs show eval-gsm8k | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("eval-gsm8k")
    assert done.stderr == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 1 MB, which a test may enlarge; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here: it needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Fill a disk but for some bytes."""
    path = folder / "filler"
    space = os.statvfs(folder)
    path.write_bytes(b"\0" * (space.f_bavail * space.f_frsize - leave_bytes))
    return path


def test_a_full_disk_at_home_loses_nothing(trained: None, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this computer's disk full, the command ends with exit code 1; with space again, a resume brings all home."""
    monkeypatch.chdir(small_disk)
    filler = fill(small_disk, 60_000)
    done = run("--limit", "60")
    assert done.returncode == 1, done.stderr
    assert "No space is left" in done.stderr
    assert "gpu resume" in done.stderr
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = gpu("resume", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows_home"] == 300


@pytest.mark.slow
def test_a_full_disk_on_the_machine_loses_nothing(
    trained: None, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the machine's disk full, the worker gives up with words; with space again, a resume does what is missing."""
    machine = Path(os.environ["GPU_HOME"]) / "machines" / "local"
    (machine / "runs").symlink_to(small_disk)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    filler = fill(small_disk, 1_300_000)
    done = run("--limit", "500", "--set", "max_new_tokens=100")
    assert done.returncode == 1, done.stderr
    assert "No space is left" in done.stderr
    made = json.loads(gpu("runs", "--json").stdout)[0]["rows_home"]
    assert 0 < made < 2500
    filler.unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = gpu("resume", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows_home"] == 2500
