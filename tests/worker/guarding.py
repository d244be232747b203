"""A real guard process on a machine that is a folder, with a provider on loopback: armed, asked, killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import durable, rows, rundir
from tests.waiting import until
from tests.worker.cloud import KEY, MARKER, Cloud

ENTRY = Path(__file__).parent.parent.parent / "worker" / "__main__.py"
RUN = "20261120-counting-3f9c"
SPANS = {
    "tick_s": 0.05,
    "look_s": 0.05,
    "call_s": 1.0,
    "again_s": 0.05,
    "again_max_s": 0.2,
    "ending_s": 0.2,
    "check_in_s": 0.3,
}
"""Short ones: what takes hours on a machine takes a second here."""


class Guarded:
    """A machine's folder and those who guard it."""

    def __init__(self, folder: Path, cloud: Cloud) -> None:
        self.root = folder / "machine"
        self.cloud = cloud
        self.settings = folder / "settings.json"
        self.entry = ENTRY
        self.guards: list[subprocess.Popen[bytes]] = []
        (folder / "terminals").mkdir()
        self.document: dict[str, Any] = {
            "marker": MARKER,
            "api_url": cloud.url,
            "key": KEY,
            "root": str(self.root),
            "terminals": str(folder / "terminals"),
            "grace_s": 5.0,
            "spans": SPANS,
        }

    def write(self, **changes: Any) -> None:
        """Have the settings as they are written at first boot."""
        self.document |= changes
        self.settings.write_text(json.dumps(self.document), encoding="utf-8")
        self.settings.chmod(0o600)

    def arm(self, **changes: Any) -> subprocess.Popen[bytes]:
        """Start a guard with these settings, in a session of its own as at boot."""
        self.write(**changes)
        words = [sys.executable, "-I", str(self.entry), "watch", str(self.settings)]
        said = (self.settings.parent / "guard-said.txt").open("ab")
        with said:
            guard = subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)
        self.guards.append(guard)
        return guard

    def said(self) -> str:
        """Everything guards have printed."""
        return (self.settings.parent / "guard-said.txt").read_text(encoding="utf-8")

    def ask(self, verb: str, data: Any = None, words: tuple[str, ...] = ()) -> dict[str, Any]:
        """The answer of an agent command about this machine."""
        command = [sys.executable, "-I", str(ENTRY), verb, str(self.root), *words]
        given = b"" if data is None else json.dumps(data).encode()
        done = subprocess.run(command, input=given, capture_output=True, check=True, timeout=30)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def view(self) -> dict[str, Any]:
        """What the guard last wrote down."""
        return durable.load_news(self.root / "guard" / "status.json")

    def seen(self, condition: Callable[[dict[str, Any]], Any], within_s: float = 30.0) -> dict[str, Any]:
        """What the guard wrote down, once it is as wanted."""
        found: dict[str, Any] = until(lambda: (view := self.view()) and condition(view) and view, within_s)
        return found

    def run(self, run_id: str = RUN) -> rundir.Run:
        """A run on this machine whose worker has made nothing yet."""
        run = rundir.Run(self.root / "runs" / run_id)
        durable.have_folder(run.attempt(1).folder)
        durable.save_json(run.job, {"story": "command", "out": ["*.txt", "*.jsonl"], "folder": ""})
        durable.save_json(run.current, {"attempt": 1})
        return run

    def disarm(self) -> None:
        """Kill every guard."""
        for guard in self.guards:
            guard.kill()
            guard.wait()


def add_row(run: rundir.Run, index: int) -> None:
    """Have one more row in the run's first attempt."""
    with run.attempt(1).rows.open("ab") as file:
        file.write(rows.encode({"key": f"t/s/{index}#0", "error": None}))


def home(run: rundir.Run, *names: str) -> dict[str, Any]:
    """What the laptop says when it has all of these files."""
    have, whole = {}, {}
    for name in names:
        path = run.folder / name if not name.startswith("out/") else run.work / name[4:]
        digest = rundir.file_sha256(path)
        if rundir.grows(name):
            have[name] = [path.stat().st_size, digest]
        else:
            whole[name] = digest
    return {"have": have, "have_whole": whole}


def aged(folder: Path, seconds: float) -> None:
    """Let everything below a folder have been changed so long ago."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - seconds, time.time() - seconds))
