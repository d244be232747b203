"""The time as every file of a run has it."""

from __future__ import annotations

from datetime import datetime, timezone


def now() -> str:
    """The time as UTC, ISO 8601 with milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
