"""Everything that can go wrong on the laptop, sorted by what the caller does next, with the exit code of each.

GpuError
├── UsageError          2  what was typed is wrong
├── ConfigError         3  what it points to is wrong: a file, a setting, an account
│   ├── HostKeyChanged  3  another host answers at a machine's address; nothing was sent
│   └── LoginRefused    3  a machine does not let us in; nothing was sent
├── NotReachable        5  the machine does not answer; nothing is known to be lost
│   └── BadAnswer       5  it answers, but not as our agent does; asking again at once is no use
├── WorkerLost          5  the work died with its machine or supervisor; rows so far are home
├── JobFailed          10  the job ended without being done
└── HomeDiskFull        1  this computer's disk is full
"""

from __future__ import annotations

DONE = 0
BUG = 1
INTERRUPTED = 130


class GpuError(Exception):
    """Says what failed, on which thing, what it means for data, and (hint) what to type next."""

    exit_code = BUG

    usual_hint = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class UsageError(GpuError):
    """The command line is wrong; nothing was done."""

    exit_code = 2


class ConfigError(GpuError):
    """A file, a setting or an account is not as the command needs it; nothing was generated."""

    exit_code = 3


class NotReachable(GpuError):
    """The machine does not answer. Unreachable is not dead: nothing is restarted or given up because of this."""

    exit_code = 5
    usual_hint = "The run may go on there by itself. Look where it stands: gpu runs. Carry on: gpu resume RUN"


class HostKeyChanged(ConfigError):
    """Another host key than the pinned one: another machine, or someone between. Nothing was sent."""


class LoginRefused(ConfigError):
    """The machine answers, but does not accept the user or the key. Nothing was sent."""


class BadAnswer(NotReachable):
    """The machine answers with something else than an answer of our agent; asking again at once is no use."""


class WorkerLost(GpuError):
    """The work ended without a seal; rows so far are home, and a resume does what is missing."""

    exit_code = 5


class JobFailed(GpuError):
    """The job ended on the machine without being done; rows so far are home."""

    exit_code = 10


class HomeDiskFull(GpuError):
    """This computer has no space left; what was counted as home is home."""

    exit_code = BUG
