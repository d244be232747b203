"""Everything that can go wrong on the laptop, sorted by what the caller does next, with the exit code of each.

GpuError
├── UsageError          2  what was typed is wrong
├── ConfigError         3  what it points to is wrong: a file, a setting, an account
│   ├── HostKeyChanged  3  another host answers at a machine's address; nothing was sent
│   ├── LoginRefused    3  a machine does not let us in; nothing was sent
│   └── AuthRejected    3  a provider does not accept the account key; nothing was rented
├── ProviderError       4  a provider said no, or nothing; nothing was rented
│   ├── Refused         4  it will not: quota, funds, a wrong request; asking again is no use
│   ├── NoCapacity      4  it has no such machine free just now; another region or type may do
│   ├── RateLimited     4  it was asked too often; nothing happened
│   ├── LaunchFailed    4  what was rented was not what was paid for; it was given back
│   │   └── Unusable    4  nor would another one do: what was typed cannot be had on any
│   └── ProviderDown    4  it does not answer, or not as its API does; nothing happened
├── MayCost            20  a machine may still be costing money
│   ├── LaunchUnknown  20  a paid request got no answer: it may have happened, and is never sent again
│   └── NotReturned    20  the provider has not said, twice, that a machine is gone
├── NotReachable        5  the machine does not answer; nothing is known to be lost
│   └── BadAnswer       5  it answers, but not as our agent does; asking again at once is no use
├── MachineGone         5  a rented machine is no more, by its provider's own word
├── DeadlineOver       10  a rented machine's time or budget is over while a run is on it
├── WorkerLost          5  the work died with its machine or supervisor; rows so far are home
├── JobFailed          10  the job ended without being done
└── HomeDiskFull        1  this computer's disk is full
    └── NotNoted        1  a machine is gone, which could not be put on the disk
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


class AuthRejected(ConfigError):
    """A provider does not accept the account key. Nothing was rented; what is rented already goes on costing."""


class ProviderError(GpuError):
    """A provider said no, or nothing that can be used. Nothing was rented by this."""

    exit_code = 4


class Refused(ProviderError):
    """It will not: quota, funds, an inactive account, a request it does not take. Asking again is no use."""


class NoCapacity(ProviderError):
    """It has no such machine free just now. Nothing was rented; another region or type may do."""


class RateLimited(ProviderError):
    """It was asked too often. Nothing happened; it may be asked again later."""


class LaunchFailed(ProviderError):
    """A machine never became ready, or is not what was paid for."""


class Unusable(LaunchFailed):
    """A machine on which what was typed cannot be had, nor on another one of its kind."""


class ProviderDown(ProviderError):
    """It could not be asked, or does not answer as its API does. Nothing happened."""


class MayCost(GpuError):
    """A machine may still be costing money; the message says which, how much, and where to look."""

    exit_code = 20
    usual_hint = "Look, and have it mended: gpu audit --fix"


class LaunchUnknown(MayCost):
    """A paid request got no answer: it may have happened. It is looked for by its marker, and never sent again."""


class NotReturned(MayCost):
    """The provider has not said, twice, that a machine is gone."""


class BadAnswer(NotReachable):
    """The machine answers with something else than an answer of our agent; asking again at once is no use."""


class MachineGone(GpuError):
    """A rented machine is no more, by its provider's own word. What came home from it is home."""

    exit_code = 5


class DeadlineOver(GpuError):
    """A rented machine's time, or budget, is over while a run is on it. Rows so far are home."""

    exit_code = 10


class WorkerLost(GpuError):
    """The work ended without a seal; rows so far are home, and a resume does what is missing."""

    exit_code = 5


class JobFailed(GpuError):
    """The job ended on the machine without being done; rows so far are home."""

    exit_code = 10


class HomeDiskFull(GpuError):
    """This computer has no space left; what was counted as home is home."""

    exit_code = BUG


class NotNoted(HomeDiskFull):
    """A machine is gone, by its provider's own word, and costs nothing more; that could not be put on the disk."""
