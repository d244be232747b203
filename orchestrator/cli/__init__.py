"""The `gpu` command: parses, calls, prints; every command's code is imported only when it is used."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import NoReturn

import click

from orchestrator import errors

_COMMANDS = {
    "jobs": ("jobs", "The catalogue of jobs, and what each takes"),
    "offers": ("offers", "What can be rented, cheapest first"),
    "launch": ("cloud", "Rent a machine and wait until it is ready"),
    "wait": ("cloud", "Go on with a launch until the machine is ready"),
    "terminate": ("cloud", "Give machines back, once all rows are home"),
    "cost": ("money", "What machines and runs have cost"),
    "audit": ("money", "What may cost money without anybody meaning it"),
    "guard": ("money", "Who ends a machine while this laptop is closed"),
    "advance": ("money", "One step of everything, for cron"),
    "clean": ("money", "Remove what machines that are gone have left"),
    "add": ("machines", "Add a machine you already have"),
    "status": ("machines", "Every machine, and the runs on it"),
    "sync": ("project", "Send the project to a machine"),
    "exec": ("project", "Run a command in the synced project"),
    "run": ("run", "Start a job or a command, and follow it until it is home"),
    "resume": ("run", "Carry on with a run: only what is missing is done"),
    "runs": ("runs", "Every run and where it stands"),
    "logs": ("runs", "What a run's worker printed"),
    "pull": ("runs", "Bring home what a run has made so far"),
    "stop": ("runs", "Stop a run cleanly; its rows come home"),
    "report": ("results", "The numbers of a run, and its page"),
    "compare": ("compare", "Runs side by side, on the same examples"),
    "journal": ("journal", "Every run in one table, with notes and commands"),
    "note": ("journal", "Write something about a run"),
    "verify": ("verify", "A model beside lm-evaluation-harness, item by item"),
    "rescore": ("results", "Score existing completions again, without a model"),
    "ssh": ("machines", "A shell on a machine"),
    "setup-ssh": ("house", "Let ssh, scp and editors reach machines by name"),
    "forget": ("machines", "Forget a machine that was added"),
    "state": ("house", "Move machines' keys and records to another computer"),
    "doctor": ("house", "Check keys, tools, disk and machines; say how to mend them"),
}
"""Each command with the module of this package it lives in, and its line in the help."""
_VARIABLES = {"sync": "sync_", "exec": "exec_", "setup-ssh": "setup_ssh"}
"""Commands that Python cannot have a variable of the same name for, or that a module has another one for."""


_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class _Lazy(click.Group):
    """A group that imports a command's module when the command is used, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- as Click calls it
        """The commands in the order of a day's work."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name, from its module."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"orchestrator.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, _VARIABLES.get(cmd_name, cmd_name))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant; a wrong word is answered with the nearest right one."""
        if args and not args[0].startswith("-") and args[0] not in _COMMANDS:
            from jobs import spec

            raise click.UsageError(f"There is no command {args[0]!r}: {spec.nearest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpu")
def gpu() -> None:
    """Run long GPU jobs; every finished row comes home, whatever crashes.

    \b
    Example:  gpu run eval-gsm8k --limit 20
    """


def main() -> NoReturn:
    """Run the command line and exit with a code of the table in the README."""
    if sys.platform == "win32":
        print("gpu does not run on native Windows. Use WSL2: https://learn.microsoft.com/windows/wsl/", file=sys.stderr)  # noqa: T201
        sys.exit(errors.ConfigError.exit_code)
    try:
        code = gpu.main(standalone_mode=False) or errors.DONE  # Click hands an exit code back as the result
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except errors.GpuError as error:
        _say(error.message, error.hint)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("Interrupted.", _unfinished())
        code = errors.INTERRUPTED
    except BrokenPipeError:  # `gpu runs | head`: the reader has seen enough
        code = errors.DONE
        _forget_stdout()
    except OSError as error:
        code = _say_disk(error)
    except Exception as error:  # noqa: BLE001 -- the outermost frame: a bug of ours becomes words, not a traceback
        _say(f"A bug in gpu: {type(error).__name__}: {error}. Runs on machines are not affected.", _bug_hint(error))
        code = errors.BUG
    if code == errors.INTERRUPTED:
        _leave_at_once(code)
    sys.exit(code)


def _say(message: str, hint: str) -> None:
    from orchestrator.plain import plain

    print(plain(f"Error: {message}" if message != "Interrupted." else message), file=sys.stderr)  # noqa: T201
    if hint:
        print(plain(hint), file=sys.stderr)  # noqa: T201


def _say_disk(error: OSError) -> int:
    """Say what this computer's disk does not take, or that there is a bug of ours; returns the exit code."""
    from jobs import durable

    if durable.is_full(error):
        _say("This computer's disk is full. What was counted as home is home.", "Free some space, then again.")
        return errors.HomeDiskFull.exit_code
    if error.filename and error.errno in _CLOSED:
        _say(f"{error.filename}: {error.strerror}.", "Have it writable, or set GPU_HOME to a folder that is.")
        return errors.ConfigError.exit_code
    _say(f"A bug in gpu: {type(error).__name__}: {error}. Runs on machines are not affected.", _bug_hint(error))
    return errors.BUG


def _unfinished() -> str:
    """What Ctrl-C leaves half rented or half given back, which goes on costing money; empty when there is nothing."""
    import contextlib

    with contextlib.suppress(errors.GpuError, OSError, KeyboardInterrupt):
        from orchestrator import rentals, renting

        known = [rental for rental in rentals.known() if rental.record.state in ("launching", "stopping")]
        return "".join(renting.left(rental) for rental in known).strip()
    return ""


def _bug_hint(error: BaseException) -> str:
    """Where the bug is, in one line; the whole traceback when GPU_DEBUG is set."""
    import os
    import traceback

    if os.environ.get("GPU_DEBUG"):
        return "".join(traceback.format_exception(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"It happened in {frame.name}, line {frame.lineno} of {frame.filename}. GPU_DEBUG=1 shows all of it."


def _leave_at_once(code: int) -> None:
    """End after Ctrl-C with this code, waiting for no thread.

    An import that was interrupted inside a library's C code makes Python end as if killed by SIGINT, whatever code it
    is given (CPython's `unhandled_keyboard_interrupt`).
    """
    import contextlib
    import os

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _forget_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe when it flushes at exit."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
