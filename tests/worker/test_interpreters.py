"""Which Python and which PyTorch a machine gets: by what its driver, uv and its own interpreters say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from worker import environments, interpreters
from worker.interpreters import Gpu, Lock, Refused

SMI_550 = "| NVIDIA-SMI 550.54.15      Driver Version: 550.54.15    CUDA Version: 12.4     |"
SMI_610 = "| NVIDIA-SMI 610.43.02      KMD Version: 610.43.02     CUDA UMD Version: 13.3     |"
"""The banner's line before and after the driver 610, which renamed its fields."""
LOCKS = sorted(environments.LOCKS.glob("*.txt"))


class Listener:
    """Hears what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        """Note it."""
        self.said.append(text)

    def tick(self) -> None:
        """Wait on."""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, but for what a shell script needs; no driver, no uv, no Python is in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat", "mkdir", "printf"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(interpreters, "_SMI_PLACES", ())
    return folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def python(folder: Path, version: str, *, whole: bool = True) -> None:
    """A program that answers as an interpreter of that version would."""
    program(folder, f"python{version}", f"printf '%s\\n' {version} {folder}/python{version} {whole}")


# --- the build of PyTorch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("banner", "capabilities", "expected"),
    [
        (SMI_550, "8.0", Gpu((12, 4), (8, 0))),
        (SMI_610, "9.0\n7.0", Gpu((13, 3), (7, 0))),
        (SMI_610, "[N/A]", Gpu((13, 3), (7, 5))),
    ],
)
def test_the_driver_is_read(programs: Path, banner: str, capabilities: str, expected: Gpu) -> None:
    """What nvidia-smi says of CUDA, in either wording, and of the oldest GPU is what counts."""
    program(programs, "nvidia-smi", f"if [ $# = 0 ]; then echo '{banner}'; else echo '{capabilities}'; fi")
    assert interpreters.nvidia(Listener()) == expected


def test_a_driver_that_does_not_work_is_none(programs: Path) -> None:
    """Where nvidia-smi is absent or fails there is no GPU, and what it said is passed on."""
    assert interpreters.nvidia(Listener()) is None
    program(programs, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    listener = Listener()
    assert interpreters.nvidia(listener) is None
    assert "NVIDIA-SMI has failed" in listener.said[0]


@pytest.mark.parametrize(
    ("kind", "gpu", "by_uv", "by_pip"),
    [
        ("train", None, ["cpu", "default"], ["default"]),
        ("train", Gpu((13, 0), (9, 0)), ["cu130", "default"], ["default"]),
        ("train", Gpu((12, 9), (8, 0)), ["cu129", "cu126"], "renew"),
        ("train", Gpu((12, 2), (8, 0)), ["cu126"], "renew"),
        ("train", Gpu((13, 0), (7, 0)), ["cu126"], "own"),
        ("train", Gpu((12, 9), (6, 1)), ["cu126"], "own"),
        ("train", Gpu((11, 8), (8, 0)), "renew", "renew"),
        ("serve", None, "engine", "engine"),
        ("serve", Gpu((13, 1), (8, 6)), ["default"], ["default"]),
        ("serve", Gpu((12, 9), (8, 6)), "renew", "renew"),
        ("serve", Gpu((13, 1), (7, 0)), "own", "own"),
    ],
)
def test_a_build_fits_the_driver_and_the_gpu(
    kind: str, gpu: Gpu | None, by_uv: list[str] | str, by_pip: list[str] | str
) -> None:
    """A build that this driver or GPU cannot run is never chosen: where no other is to be had, it says what to do."""
    hints = {"renew": "Renew its NVIDIA driver", "own": "Name a Python there", "engine": "Leave out engine=vllm."}
    for uv, expected in ((True, by_uv), (False, by_pip)):
        if isinstance(expected, list):
            assert interpreters.builds(kind, gpu, uv=uv) == expected
        else:
            with pytest.raises(Refused) as refused:
                interpreters.builds(kind, gpu, uv=uv)
            assert refused.value.hint.startswith(hints[expected])


def test_what_nobody_can_help_is_said_before_anything_is_downloaded(programs: Path, tmp_path: Path) -> None:
    """vLLM on a machine without an NVIDIA GPU is refused at once, with what to type instead."""
    talk = environments.Talk((tmp_path / "out").open("wb"), None)
    with talk._out:
        answer = environments.environment(tmp_path / "root", "serve", environments.LOCKS, talk)
    assert "vLLM needs an NVIDIA GPU" in answer["failed"]["message"]
    assert not (tmp_path / "root" / "environments" / "tools").exists()


# --- the interpreter -------------------------------------------------------------------------------------------------


def fake_uv(folder: Path, install: str) -> Path:
    """A uv that counts how often it is asked for a Python, and does as told."""
    asked = folder / "asked"
    found = folder / "managed" / "python3.12"
    script = [
        'case "$*" in --version) echo "uv 0.13.8";;',
        f"*install*) echo x >>{asked}; {install};;",
        f"*find*) echo {found};; esac",
    ]
    program(folder, "uv", "\n".join(script))
    return asked


def test_uv_brings_a_python_of_its_own(programs: Path, tmp_path: Path) -> None:
    """Where uv has one to give, that is what an environment is made from, not what the machine has."""
    fake_uv(programs, "exit 0")
    python(programs, "3.13")
    plan = interpreters.plan(tmp_path, "train", environments.LOCKS, Listener())
    assert (plan.uv, plan.version) == (str(programs / "uv"), "3.12")
    assert plan.python == str(programs / "managed" / "python3.12")
    assert plan.builds == ["cpu", "default"]
    assert plan.lock.endswith("train-3.12.txt")


def test_that_uv_cannot_bring_one_is_remembered_for_a_day(programs: Path, tmp_path: Path) -> None:
    """Without the internet uv is waited for once a day; a clock that was set back does not make it a year."""
    asked = fake_uv(programs, "echo 'dns error'; exit 2")
    python(programs, "3.13")
    listener = Listener()
    memory = tmp_path / "no-uv.json"
    for at, times in ((None, 1), (None, 1), (time.time() - 90_000, 2), (time.time() + 90_000, 3)):
        if at is not None:
            memory.write_text(json.dumps({"at": at}), encoding="utf-8")
        plan = interpreters.plan(tmp_path, "train", environments.LOCKS, listener)
        assert (plan.uv, plan.python) == ("", str(programs / "python3.13"))
        assert asked.read_text(encoding="ascii") == "x\n" * times
    assert "dns error" in listener.said[-1]


def test_an_old_uv_is_passed_over(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uv too old for what we ask of it is not used; where no other can be had, there is none."""
    program(programs, "uv", 'echo "uv 0.4.30"')
    monkeypatch.setattr(interpreters, "UV_PIN", "uv==0.0.0.not-a-version")
    monkeypatch.setattr(sys, "executable", str(programs / "none"))
    assert interpreters.uv_python(tmp_path, "3.12", Listener()) is None


@pytest.mark.parametrize(
    ("there", "message", "hint"),
    [
        ({"3.12": False}, "Python 3.12 cannot make environments", "apt-get install python3.12-venv"),
        ({"3.10": True}, "none of Python 3.11, 3.12, 3.13", "--python PATH"),
    ],
)
def test_a_machine_without_a_fitting_python_is_told_what_to_install(
    programs: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, bool], message: str, hint: str
) -> None:
    """A Python that is too old or cannot make environments is refused in plain words."""
    monkeypatch.setattr(sys, "executable", str(programs / "none"))
    for version, whole in there.items():
        python(programs, version, whole=whole)
    with pytest.raises(Refused, match=message) as refused:
        interpreters.machine_python(["3.13", "3.12", "3.11"], Listener())
    assert hint in refused.value.hint


def test_the_newest_whole_python_is_taken(programs: Path) -> None:
    """A newer Python that cannot make environments, or does not run, leaves it to the next."""
    python(programs, "3.13", whole=False)
    program(programs, "python3.12", "exit 127")  # a shim of a version manager, say
    python(programs, "3.11")
    found = interpreters.machine_python(["3.13", "3.12", "3.11"], Listener())
    assert found == (str(programs / "python3.11"), "3.11")


# --- the locks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_pins_that_every_build_of_pytorch_admits(path: Path) -> None:
    """Every line is an exact pin without hash or local label; no CUDA library of PyTorch's; all that is asked for."""
    lock = Lock(path, path.read_text(encoding="utf-8"))
    lines = [line for line in lock.text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in lines), path
    assert len(lock.pins) == len(lines)
    assert not [name for name in lock.pins if name.startswith("nvidia") or name in ("triton", "cuda_toolkit")]
    assert lock.pins["torch"] == "torch==2.13.0"
    assert set(lock.packages) <= lock.pins.keys()
    assert lock.gb("cu130") >= lock.gb("cpu") > 0


def test_the_locks_of_a_kind_agree() -> None:
    """What is asked for has the same versions under every Python, so that the same run means the same libraries."""
    assert {path.stem for path in LOCKS} == {"train-3.11", "train-3.12", "train-3.13", "serve-3.11", "serve-3.12"}
    for kind in interpreters.KINDS:
        locks = interpreters.locks_for(kind, environments.LOCKS).values()
        assert len({tuple(lock.pins[name] for name in lock.packages) for lock in locks}) == 1


def test_all_of_it_needs_the_standard_library_only() -> None:
    """A machine's own Python 3.10 without a single package can make environments."""
    modules = "environments, installation, interpreters, libraries, programs"
    script = f"import sys; sys.path.insert(0, sys.argv[1]); from worker import {modules}; print(sys.version_info[:2])"
    for name in ("python3.10", sys.executable):
        found = shutil.which(name)
        runs = found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
        if found and runs:
            subprocess.run([found, "-I", "-S", "-c", script, str(ROOT)], check=True, timeout=60, env=dict(os.environ))
