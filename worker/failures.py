"""Failures a worker ends with on purpose, sorted by what the reader does next; standard library only."""

from __future__ import annotations


class WorkerFailure(Exception):
    """Ends the run with words for its user: what failed, on which thing, what to type next."""

    kind = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigFailure(WorkerFailure):
    """What was asked cannot work: a bad path, dataset, template or parameter. Trying again changes nothing."""

    kind = "config"


class BadRecord(ConfigFailure):
    """A dataset row lacks a field or cannot be read; the message names the file and the row."""


class FingerprintChanged(ConfigFailure):
    """What was resolved now differs from what the run began with; going on would mix two measurements."""


class OutOfExpectation(WorkerFailure):
    """The score's sequential interval left the range the user expected: stopped early to save money."""

    kind = "expectation"


class DiskFull(WorkerFailure):
    """No space is left where the run writes; every row counted so far is durable."""

    kind = "disk_full"


class EngineDied(WorkerFailure):
    """What generates ended or fell silent in the middle; rows so far are kept, and a resume makes the others."""

    kind = "engine"


class Diverged(WorkerFailure):
    """The loss or its gradient is no number any more; what was saved before is whole."""

    kind = "diverged"


class NothingLearned(WorkerFailure):
    """Adapter layers stay as they were made: money would be spent on a model that does not change."""

    kind = "idle_layers"


class OutOfMemory(WorkerFailure):
    """The device cannot hold a micro-batch; trying again changes nothing."""

    kind = "out_of_memory"
