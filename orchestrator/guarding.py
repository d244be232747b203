"""Who ends a machine whose time is over: the guards there are, the one that was chosen, and what is armed, in words."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs import durable
from orchestrator import clock, config, keys, money
from orchestrator.errors import ConfigError
from orchestrator.plain import plain
from orchestrator.providers.base import GuardOrder, Provider
from orchestrator.rentals import ENDED, Rental

HOW = {
    "laptop": "only commands typed here end it: with this laptop closed or offline NOBODY does",
    "reaper": "`gpu audit --fix --past-cap -y`, run by cron or scheduled CI, ends it: that needs the account key there",
    "on-machine": "a guard on the machine ends it: the account key lies there, and every process there can read it",
}
"""The three guards that a cloud without scoped keys leaves, and what each means."""
OF_CLOUDS = {"container": "a guard on the machine ends it, by a key that can end nothing else"}
"""Guards that a cloud's machines have without anybody choosing."""
ON_MACHINE = ("on-machine", "container")
"""Those that run on the machine, and are read back from it."""

_WORKFLOW = """\
# .github/workflows/gpu-reaper.yml of a repository of yours that holds gpu, with the secret LAMBDA_API_KEY
name: gpu-reaper
on:
  schedule:
    - cron: "*/10 * * * *"
  workflow_dispatch:
jobs:
  reap:
    runs-on: ubuntu-latest
    timeout-minutes: 20
    env:
      LAMBDA_API_KEY: ${{ secrets.LAMBDA_API_KEY }}
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install .
      - run: gpu audit --fix --past-cap -y
"""


def chosen() -> str:
    """The guard the user chose; `laptop` while none was. Raises ConfigError for a word that means none."""
    how = money.settings().get("guard", "laptop")
    if not isinstance(how, str) or how not in HOW:
        raise ConfigError(f"`guard` in {keys.user_config()} is {how!r}.", f"It may be: {', '.join(HOW)}.")
    return how


def is_chosen() -> bool:
    """Whether the user has chosen a guard yet."""
    return "guard" in money.settings()


def choose(how: str) -> list[Path]:
    """Have all machines launched from now on guarded so; returns the files written for that guard."""
    keys.change("guard", how)
    return write_reaper() if how == "reaper" else []


def document(rental: Rental) -> dict[str, Any]:
    """What is armed for a machine, as `gpu status --json` gives it."""
    record = rental.record
    armed = record.state not in ENDED and record.deadline is not None and record.guard_seen.get("alive", True)
    return {"armed": armed, "deadline": moment(record.deadline), "how": record.guard if armed else None}


def in_words(rental: Rental) -> str:
    """What is armed for a machine, in one line."""
    record = rental.record
    if record.deadline is None:
        return "no deadline: nobody ends it but you"
    seen = _reaped() if record.guard == "reaper" else _seen(record.guard_seen)
    return f"to be given back at {moment(record.deadline)}; {explained(record.guard)}{seen}"


def explained(how: str) -> str:
    """What a guard means, in plain words."""
    return {**HOW, **OF_CLOUDS}.get(how, how)


def _reaped() -> str:
    """When the reaper has done its work here last, in words: what was only written down guards nothing."""
    at = durable.load_news(_reaped_file()).get("at")
    if not isinstance(at, (int, float)):
        return ". IT HAS NEVER RUN FROM HERE: unless scheduled CI runs it, only commands typed here end it"
    return f". It ran here last at {moment(at)}"


def _reaped_file() -> Path:
    return config.state_folder() / "guard" / "reaped.json"


def note_reaped() -> None:
    """Remember that what a reaper does was done just now, and went well."""
    with contextlib.suppress(OSError):
        durable.have_folder(_reaped_file().parent)
        durable.save_json(_reaped_file(), {"at": clock.timestamp()}, synced=False)


def _seen(seen: dict[str, Any]) -> str:
    """What the machine's own guard said last, in words; empty when it was never asked."""
    if not seen:
        return ""
    trouble = f"; its trouble: {plain(seen['error'])}" if seen["error"] else ""
    if not seen["alive"]:
        return f". AT {moment(seen['at'])} THAT GUARD WAS NOT ALIVE: only commands typed here end it{trouble}"
    until = moment(seen["deadline"]) or "told otherwise"
    return f". Armed until {until}, by its own word at {moment(seen['at'])}{trouble}"


def order(rental: Rental, provider: Provider, marker: str) -> GuardOrder:
    """What the guard on a machine is told: the account's key too, unless its cloud gives it one of its own.

    ConfigError when there is no key.
    """
    key = keys.find(rental.record.provider)
    if key is None:
        raise ConfigError(f"No account key of {rental.record.provider} is known. Nothing was rented.")
    idle = rental.caps().idle_minutes
    return GuardOrder(
        marker,
        provider.api_url,
        "" if rental.record.guard == "container" else key.value,
        written_at=clock.timestamp(),
        deadline=rental.record.deadline,
        idle_s=None if idle is None else idle * 60,
    )


def moment(seconds: float | None) -> str | None:
    """A time as every document has it: UTC, ISO 8601, whole seconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_past(rental: Rental) -> bool:
    """Whether its hard deadline is over."""
    deadline = rental.record.deadline
    return rental.may_cost and deadline is not None and clock.timestamp() >= deadline


def crontab_line(words: Sequence[str], home: Path) -> str:
    """The line of a crontab that runs these words every ten minutes, with this state folder; ConfigError if none can.

    In a crontab `%` is the end of the command and a line break that of the line, whatever the shell's quotes say.
    """
    log = home / "guard" / "log"
    command = f"GPU_HOME={shlex.quote(str(home))} {shlex.join(words)} >> {shlex.quote(str(log))} 2>&1"
    if len(command.splitlines()) != 1:
        raise ConfigError(f"No line of a crontab can name {str(home)!r}.", "Set GPU_HOME to a folder on one line.")
    return f"*/10 * * * * {command}\n".replace("%", r"\%")


def _command() -> list[str]:
    """How this very gpu is run from anywhere: cron's PATH is short, and another gpu may be on the user's."""
    program = Path(sys.executable).with_name("gpu")
    return [str(program)] if program.is_file() else [sys.executable, "-P", "-m", "orchestrator.cli"]


def write_reaper() -> list[Path]:
    """Write a crontab line and a file for scheduled CI that end what is past its caps; returns where they are."""
    folder = config.state_folder() / "guard"
    durable.have_folder(folder)
    line = crontab_line([*_command(), "audit", "--fix", "--past-cap", "-y"], folder.parent)
    durable.replace_whole(folder / "crontab", os.fsencode(line))
    durable.replace_whole(folder / "gpu-reaper.yml", _WORKFLOW.encode())
    return [folder / "crontab", folder / "gpu-reaper.yml"]
