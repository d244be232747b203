"""The `gpu run …` line that asks for a run again, from what its folder says was asked, quoted for a shell."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs import engines, spec
from orchestrator.rentals import Caps
from orchestrator.runs import Record, Run

_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\\\\']")
_NEED = {
    "gpu": "--gpu",
    "type_name": "--type",
    "min_vram_gb": "--min-vram",
    "max_price_usd_per_hour": "--max-price",
    "region": "--region",
    "disk_gb": "--disk",
    "bid_usd_per_hour": "--bid",
}
_CAPS = {"max_hours": "--max-hours", "idle_minutes": "--idle-minutes", "budget_usd": "--budget"}


def line(run: Run, job: Mapping[str, Any]) -> str:
    """The command in one line. Parameters with the default that their job has today are left out."""
    return " ".join(quoted(word) for word in _words(run, job))


def quoted(word: str) -> str:
    """A word as bash and zsh read it again; in one line, and without characters that a terminal does not show."""
    if not _UNSHOWN.search(word.replace("'", "").replace("\\", "")):
        return shlex.quote(word)
    return "$'" + _UNSHOWN.sub(_escaped, word) + "'"


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in "\\'":
        return f"\\{found[0]}"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as Python keeps it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def _words(run: Run, job: Mapping[str, Any]) -> Iterator[str]:
    record, definition = run.record, _definition(str(job["job"]), run.record.cwd)
    is_typed = definition is None and job["story"] == "command"
    yield from ("gpu", "run", *(() if is_typed else (str(job["job"]),)))
    yield from _place(run)
    yield from _settings(job.get("params") or {}, definition)
    if job.get("limit"):
        yield from ("--limit", str(job["limit"]))
    yield from _repeated("--need", record.needs)
    own = definition.out if definition else ()
    yield from _repeated("--out", [glob for glob in job.get("out") or () if glob not in own])
    secrets = engines.secrets(job.get("params") or {})
    yield from _repeated("--env", [name for name in record.env_names if name not in secrets])
    yield from _manner(record, job, definition)
    if is_typed:
        yield from ("--", *map(str, job.get("command") or ()))


@functools.cache
def _definition(name: str, cwd: str) -> spec.Job | None:
    """The job as it is defined today; None when it cannot be found, or is a command that was typed."""
    try:
        return spec.find(name, [Path(cwd) / "jobs", spec.CATALOG])
    except (spec.SpecError, OSError):
        return None


def _settings(params: Mapping[str, Any], definition: spec.Job | None) -> Iterator[str]:
    known = definition.parameters if definition else {}
    for name, value in params.items():
        default = known[name].default if name in known else None
        if value is not None and value != default:
            yield from ("--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}")


def _place(run: Run) -> Iterator[str]:
    record = run.record
    if record.boxes:
        yield from _repeated("--on", record.boxes)
    elif record.rents:
        yield from _rented(record.rents)
        yield from ("--machines", str(record.machines)) if record.machines > 1 else ()
    else:
        yield from ("--on", str(record.legs[0]["machine"]) if record.legs else record.machine)


def _rented(rents: Mapping[str, Any]) -> Iterator[str]:
    need, caps = rents.get("need") or {}, rents.get("caps") or {}
    for name, option in _NEED.items():
        if need.get(name) is not None:
            yield from (option, _number(need[name]))
    if need.get("count") not in (None, 1):
        yield from ("--count", str(need["count"]))
    if need.get("spot") and need.get("bid_usd_per_hour") is None:
        yield "--spot"
    yield from _repeated("--filter", [f"{name}={value}" for name, value in (need.get("filters") or {}).items()])
    for name, option in _CAPS.items():
        if caps.get(name) != getattr(Caps, name):
            yield from (option, _number(caps.get(name)))
    for name in ("provider", "python"):
        if rents.get(name):
            yield from (f"--{name}", str(rents[name]))
    if rents.get("wait_capacity"):
        yield "--wait-capacity"


def _manner(record: Record, job: Mapping[str, Any], definition: spec.Job | None) -> Iterator[str]:
    if record.gpus is not None:
        yield from ("--gpus", str(record.gpus))
    if record.queue:
        yield "--queue"
    usual = engines.environment(job.get("params") or {}) or _usual(job, definition)
    if (record.environment or "none") != usual:
        yield from ("--environment", record.environment or "none")
    if record.mirror:
        yield from ("--mirror", record.mirror)
    if record.terminate:
        yield "--terminate"
    if record.keep_on_failure_minutes:
        yield from ("--keep-on-failure", _number(record.keep_on_failure_minutes))


def _usual(job: Mapping[str, Any], definition: spec.Job | None) -> str:
    """The environment that the job has by itself."""
    if definition:
        return definition.environment
    return "train" if job["story"] != "command" or spec.needs_python(job.get("command") or ()) else "none"


def _number(value: Any) -> str:
    """As it is typed; `none` for no limit."""
    return "none" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


def _repeated(option: str, values: list[str]) -> Iterator[str]:
    for value in values:
        yield from (option, value)
