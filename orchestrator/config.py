"""Where things are on this computer: state, results, and the user's own jobs."""

from __future__ import annotations

import os
from pathlib import Path

from jobs import spec
from orchestrator.errors import ConfigError

_PRIVATE = ("LAMBDA_API_KEY", "VAST_API_KEY")
"""Account keys: never handed to a job, on whatever machine."""


def state_folder() -> Path:
    """`GPU_HOME`, or the platform's user data folder; made when absent, for this user only."""
    given = os.environ.get("GPU_HOME")
    if given:
        folder = Path(given).expanduser().absolute()
    else:
        import platformdirs

        folder = Path(platformdirs.user_data_dir("gpu"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The state folder {folder} cannot be made: {error.strerror}. Nothing was started.",
            "Set GPU_HOME to a folder you can write to.",
        ) from None
    return folder


def job_folders() -> list[Path]:
    """Where job definitions are looked for: the user's `./jobs` first, then the catalogue."""
    return [Path.cwd() / "jobs", spec.CATALOG]


def results_folder() -> Path:
    """Where new runs are kept: `./results` of the folder the command runs in."""
    return Path.cwd() / "results"


def job_environment(names: list[str], *, everything: bool) -> dict[str, str]:
    """What a job gets of this environment: all of it on this computer, else HF_TOKEN and what was named.

    Never an account key. Raises ConfigError when a name is not set here, or is that of an account key.
    """
    if private := [name for name in names if name in _PRIVATE]:
        raise ConfigError(f"--env {', '.join(private)}: account keys are never handed to a job. Nothing was started.")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            f"--env {', '.join(missing)}: not set in this environment. Nothing was started.",
            f"Set it, for example: export {missing[0]}=…",
        )
    wanted = os.environ if everything else {"HF_TOKEN", *names}
    return {name: value for name, value in os.environ.items() if name in wanted and name not in _PRIVATE}
