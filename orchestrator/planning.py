"""From what was typed to a run: every check that costs nothing, before anything starts."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import engines, spec, suites, trees
from orchestrator import agents, cargo, clock, config, machines, runs, transport
from orchestrator.errors import ConfigError, UsageError
from orchestrator.runs import Record, Run

_COMMAND = "command"
WORKER_PACKAGES = ("torch", "transformers", "peft", "datasets")
_WORDS = ("auto", "none", "tiny", "generated")
"""Values with a meaning of their own, even where a folder bears that name (write ./tiny for it)."""
_FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet", ".jinja", ".jinja2", ".txt")
_CHECK_DEADLINE_S = 900.0
_GIT_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Asked:
    """What a user typed after `gpu run`, all but the job."""

    machine: str
    settings: Mapping[str, str]
    limit: int | None = None
    needs: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()
    env_names: tuple[str, ...] = ()
    gpus: int | None = None
    queue: bool = False
    environment: str | None = None
    mirror: str = ""
    rents: dict[str, Any] = field(default_factory=dict)
    """What is asked of a machine to be rented for it; empty: nothing is."""
    terminate: bool = False
    keep_on_failure: float = 0.0
    """Minutes."""
    boxes: tuple[str, ...] = ()
    """Machines that share it, by name."""
    machines: int = 0
    """How many share it; 0: it is a run of one machine."""


def command(words: tuple[str, ...]) -> spec.Job:
    """A command as a job: what stands after `--`."""
    environment = "train" if spec.needs_python(words) else "none"
    return spec.Job(_COMMAND, shlex.join(words), "command", None, (), {}, words, environment=environment)


def request(asked: Asked, job: spec.Job) -> dict[str, Any]:
    """The job document of a new run, all defaults filled in and all paths absolute. Raises UsageError, ConfigError."""
    try:
        params = job.fill(asked.settings)
    except spec.SpecError as error:
        raise UsageError(f"{error} Nothing was started.", f"See what it takes: gpu jobs show {job.name}") from None
    _check_paths(params)
    _check_outs(job, asked.outs)
    if job.story == "command" and asked.limit is not None:
        raise UsageError("--limit is for jobs that have examples; a command has none. Nothing was started.")
    document = {
        "schema": spec.SCHEMA,
        "run_id": runs.new_run_id(job.name, params.get("model")),
        "job": job.name,
        "story": job.story,
        "task": job.task,
        "params": params,
        "limit": asked.limit,
        "created_at": clock.now(),
        "version": importlib.metadata.version("gpu"),
        "lock": _lock_digest(),
        "project": _project(Path.cwd()),
    }
    if job.parts:
        document |= {"parts": [{"task": part.task, "takes": part.takes()} for part in job.parts]}
    if job.frozen:
        document |= {"frozen": True}
    for part in suites.parts(document):
        _check_expectation(part)
        _check_engine(part)
    if job.story == "command":
        document |= {"command": job.words(params), "out": [*job.out, *asked.outs]}
        document |= {"folder": cargo.folder_in_project(Path.cwd())}
    return document


def begin(document: dict[str, Any], asked: Asked, job: spec.Job, guard: Callable[[int], None]) -> Run:
    """Make the run's folder: from here on it can be resumed. Files that it needs are looked at first.

    `guard` is told how many bytes may have to travel, and raises when that is not wanted.
    """
    of_it = [part["params"] for part in suites.parts(document)]
    environment = asked.environment or next(filter(None, map(engines.environment, of_it)), job.environment)
    if machines.LOCAL in (asked.machine, *asked.boxes):
        check_interpreter(environment)
    names = [*asked.env_names, *(name for each in of_it for name in engines.secrets(each) if name in os.environ)]
    config.job_environment(names, everything=False)
    at_home = asked.machine == machines.LOCAL
    packed = cargo.pack(document, (*job.needs, *asked.needs), Path.cwd(), at_home=at_home)
    if not at_home:
        guard(sum(cargo.new_bytes(packed, name) for name in asked.boxes or [asked.machine] if name != machines.LOCAL))
    agent = agents.keep(config.state_folder() / "agents")
    packed = cargo.kept_here(packed, agent)
    record = Record(
        run_id=document["run_id"],
        job=document["job"],
        machine=asked.machine,
        agent=agent,
        python=sys.executable,
        cwd=str(Path.cwd()),
        created_at=document["created_at"],
        env_names=list(dict.fromkeys(names)),
        gpus=asked.gpus,
        queue=asked.queue,
        environment=None if environment == "none" else environment,
        mirror=asked.mirror,
        rents=asked.rents,
        terminate=asked.terminate,
        keep_on_failure_minutes=asked.keep_on_failure,
        machines=asked.machines,
        boxes=list(asked.boxes),
        needs=list(asked.needs),
    )
    return runs.create(record, document, packed)


def check(document: dict[str, Any], consequence: str = "") -> dict[str, Any]:
    """What a dry run finds: the worker's own checks of prompts and dataset, in a child process; nothing is kept.

    Raises ConfigError for what would end the job, and adds to it what follows from that.
    """
    if document["story"] == "command":
        raise UsageError("A command has no prompts to check.", "What would travel: gpu sync --plan")
    check_interpreter("train")
    machine = machines.this_computer()
    name = agents.keep(config.state_folder() / "agents")
    main = config.state_folder() / "agents" / name / "worker" / "__main__.py"
    words = [machine.python, "-I", "-X", "utf8", str(main), "check"]
    answer = transport.ask(machine, words, spec.canonical(document), _CHECK_DEADLINE_S)
    if "failed" in answer:
        raise ConfigError(f"{answer['failed']['message']} {consequence}".rstrip(), answer["failed"]["hint"])
    return answer


def take_new_code(run: Run) -> None:
    """Let a run go on with the code installed now, and record that it did."""
    new = agents.keep(config.state_folder() / "agents")
    change = {"at": clock.now(), "from": run.record.agent, "to": new}
    run.save(agent=new, code_changes=[*run.record.code_changes, change])


def check_interpreter(environment: str) -> None:
    """Raise ConfigError when this computer's Python cannot run a job of that kind of environment."""
    wanted = (*WORKER_PACKAGES, "vllm") if environment == "serve" else WORKER_PACKAGES
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    extras = "worker,vllm" if environment == "serve" else "worker"
    if missing and environment != "none":
        raise ConfigError(
            f"To run on this computer, {sys.executable} needs {', '.join(missing)}, which it does not have. "
            "Nothing was started.",
            f"Install gpu with what a worker needs: pip install 'PATH_OF_THE_CLONE[{extras}]'",
        )


def _check_outs(job: spec.Job, outs: tuple[str, ...]) -> None:
    """Raise UsageError for patterns that no job can keep to."""
    if outs and job.story != "command":
        raise UsageError(f"--out is for commands; {job.name} brings its rows home by itself.")
    for pattern in (*job.out, *outs):
        if not trees.is_safe_path(pattern):
            raise UsageError(
                f"--out {pattern!r} is not a pattern of files below the project's folder. Nothing was started.",
                "For example: --out 'results/*.jsonl'",
            )


def _check_paths(params: dict[str, Any]) -> None:
    """Make paths absolute in place; a path to nothing is an error now, not in an hour."""
    for key, value in params.items():
        if cargo.may_be_path(key) and isinstance(value, str) and _is_path(value):
            params[key] = str(_existing(key, Path(value)))
    if params.get("reranker"):
        path, _, function = params["reranker"].rpartition(":")
        if not path or not function.isidentifier():
            raise UsageError(f"reranker={params['reranker']!r} is not of the form path/to/file.py:function.")
        params["reranker"] = f"{_existing('reranker', Path(path))}:{function}"


def _is_path(value: str) -> bool:
    """Whether a value means a file or folder here, rather than a name on the Hub."""
    if value in _WORDS or "{{" in value or "{%" in value:  # a chat template may be given as it is
        return False
    with contextlib.suppress(OSError, ValueError):  # longer than a name may be, or with a null character
        return value.startswith((".", "/", "~")) or value.endswith(_FILE_SUFFIXES) or Path(value).exists()
    return False


def _existing(key: str, path: Path) -> Path:
    path = path.expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"{key}: {path} does not exist. Nothing was started.", f"Check the path given to {key}.")
    return path


def _check_expectation(part: Mapping[str, Any]) -> None:
    if expected := part["params"].get("expect"):
        from jobs import sequential

        try:
            sequential.Expectation.parse(expected)
        except ValueError as error:
            raise UsageError(f"{suites.name_in(part, 'expect')}={expected!r}: {error}") from None


def _check_engine(part: Mapping[str, Any]) -> None:
    """Raise UsageError for settings of the engine that do not belong together."""
    if faults := engines.faults(part["params"]):
        whose = f"{part['task']}: " if "part_takes" in part else ""
        raise UsageError(f"{whose}{' '.join(faults)} Nothing was started.")


def _lock_digest() -> str | None:
    """SHA-256 of the lock file of the worker's packages, for this Python, that ships with this version."""
    folder = agents.INSTALLED / "worker" / "locks"
    path = folder / f"train-{sys.version_info[0]}.{sys.version_info[1]}.txt"
    path = path if path.is_file() else folder / "train-3.11.txt"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _project(folder: Path) -> dict[str, str] | None:
    """Commit and digest of the uncommitted changes of the user's project; None where there is no git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
        return {"commit": commit, "diff_sha256": hashlib.sha256(_git(folder, "diff", "HEAD")).hexdigest()}
    return None


def _git(folder: Path, *words: str) -> bytes:
    ran = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=_GIT_DEADLINE_S, check=True)
    return ran.stdout
