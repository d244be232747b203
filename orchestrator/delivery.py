"""What a run needs on its machine before it starts: its files and an environment, sent and made side by side."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import durable, spec
from orchestrator import agents, cargo, clock, config, environments, machines, transport
from orchestrator.cargo import Cargo, Say
from orchestrator.errors import BadAnswer, GpuError
from orchestrator.runs import Run
from orchestrator.transport import Machine

MODULES = ("torch", "transformers", "peft", "datasets")
"""What an interpreter named with --python must import together."""
_CHATTER = re.compile(
    r"Collecting |Requirement already|Using cached|Attempting |Found existing|Uninstalling |Successfully |"
    r"Installing collected|Downloading (?!.*\([0-9]{3,}\.[0-9] MB\))"
)
"""What an installer says that nobody needs to read; large downloads are told."""
_STAGE_DEADLINE_S = 600.0
_CHECKED_FOR_S = 86_400.0


@dataclass(frozen=True)
class Place:
    """Where and by what a worker works on its machine."""

    python: str
    cwd: str
    path_first: str = ""


def deliver(run: Run, machine: Machine, say: Say) -> Place:
    """Have on the machine what the run takes along, and an interpreter that can run it. May be repeated."""
    packed = Cargo.load(run.home.cargo)
    if machine.name == machines.LOCAL and (packed is None or packed.work is None):
        return Place(run.record.python, run.record.cwd)
    if machine.name != machines.LOCAL:
        packed = _for_elsewhere(run)
        packed.save(run.home.cargo)
    assert packed is not None
    agent = run.record.agent
    with ThreadPoolExecutor(3, thread_name_prefix="delivery") as pool:
        sent = pool.submit(cargo.send, packed, machine, agent, say)
        found = pool.submit(interpreter, run.record.environment, machine, agent, say)
        fetched = pool.submit(_fetch_ahead, run, machine)
        _both([sent, found], machine)
        if not fetched.done():
            machine.close()  # what is not here yet, the worker fetches itself
    _lay_out(packed, machine, agent)
    work = _staged(run, machine, packed) if packed.work else machine.root
    python = found.result()
    return Place(python or machine.python, str(work), str(Path(python).parent) if python else "")


def new_bytes(run: Run, name: str) -> int:
    """How much may have to travel before the run can go on on a machine."""
    return cargo.new_bytes(_for_elsewhere(run), name)


def _for_elsewhere(run: Run) -> Cargo:
    """What the run takes along to a machine other than this computer."""
    packed = Cargo.load(run.home.cargo)
    if packed is None or packed.at_home:
        return cargo.for_elsewhere(packed, run.job(), Path(run.record.cwd))
    return packed


def _fetch_ahead(run: Run, machine: Machine) -> None:
    """Have a model of the Hub come while the environment is made, which takes as long; only then is it worth it."""
    kind, model = run.record.environment, str(run.job()["params"].get("model") or "")
    params = run.job()["params"]
    if params.get("base_url") or params.get("weights") == "random":  # the model is another machine's, or is made there
        return
    if kind is None or machine.name == machines.LOCAL or kind in durable.load_news(_environments(machine.name)):
        return
    if model.count("/") == 1 and not model.startswith("/") and machines.load(machine.name).worker_python is None:
        env = config.job_environment(run.record.env_names, everything=False)
        wanted = environments.Model(model, kind, run.job()["params"].get("revision"), env=env)
        with contextlib.suppress(GpuError):
            environments.fetch(machine, run.record.agent, wanted, lambda _: None)


def _both(pair: list[Future[Any]], machine: Machine) -> None:
    """Wait for both; when one fails, cut the other's connections, so that nobody waits for it."""
    try:
        done, _ = wait(pair, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        machine.cut()
        raise


def interpreter(kind: str | None, machine: Machine, agent: str, say: Say) -> str:
    """The Python there that a job of that environment runs with, made if need be; empty when it needs none."""
    if machine.name == machines.LOCAL:
        return machine.python
    given = machines.load(machine.name).worker_python
    if given is None:
        return _made(kind, machine, agent, say) if kind else ""
    if kind and not _checked_lately(machine.name, kind, given):
        say(f"checking that {given} on {machine.name} imports what a job needs")
        environments.check(machine, agent, given, list(environments.SERVE_MODULES if kind == "serve" else MODULES))
        known = {"python": given, "kind": kind, "at": clock.timestamp()}
        durable.save_json(_checked(machine.name), known, synced=False)
    return given


def _made(kind: str, machine: Machine, agent: str, say: Say) -> str:
    """The Python of an environment that the machine makes, or has."""
    python = environments.ensure(machine, agent, kind, lambda line: None if _CHATTER.match(line) else say(line))
    book = _environments(machine.name)
    if durable.load_news(book).get(kind) != python:
        durable.save_json(book, {**durable.load_news(book), kind: python}, synced=False)
    return python


def _environments(name: str) -> Path:
    """What a machine is known to have made: kinds of environment with their interpreters."""
    return machines.folder(name) / "environments.json"


def python_for_commands(name: str) -> str:
    """The interpreter that `gpu exec` puts first on a machine's PATH; empty while there is none."""
    if name == machines.LOCAL:
        return ""
    made = durable.load_news(_environments(name))
    return machines.load(name).worker_python or str(made.get("train", ""))


def _checked(name: str) -> Path:
    return machines.folder(name) / "checked.json"


def _checked_lately(name: str, kind: str, python: str) -> bool:
    """Whether that interpreter was found good within a day; a worker that cannot import says so anyway."""
    known = durable.load_news(_checked(name))
    at = known.get("at")
    is_same = (known.get("python"), known.get("kind")) == (python, kind)
    return is_same and isinstance(at, float) and 0 <= clock.timestamp() - at < _CHECKED_FOR_S


def _staged(run: Run, machine: Machine, packed: Cargo) -> Path:
    """The run's own working folder there, made of its tree unless it is there already; returns where the job works."""
    assert packed.work is not None
    digest = packed.work.tree.digest()
    request: dict[str, Any] = {"run_id": run.run_id, "code": digest, "needs": []}
    words = transport.root_words(machine, run.record.agent, "stage")
    answer = transport.ask(machine, words, spec.canonical(request), _STAGE_DEADLINE_S)
    if answer.get("error") in ("damaged", "absent"):  # the machine's disk lost it since: it is sent anew
        cargo.send(packed, machine, run.record.agent, lambda _: None)
        answer = transport.ask(machine, words, spec.canonical(request), _STAGE_DEADLINE_S)
    if "work" not in answer:
        raise BadAnswer(f"{machine.name} could not lay out the files of {run.run_id}: {answer}", "Try again.")
    folder = run.job().get("folder", "")
    return Path(str(answer["work"])) / str(folder)


def job_there(run: Run, machine: Machine) -> dict[str, Any]:
    """The job document as that machine gets it: parameters that are paths are called what they are called there."""
    job = run.job()
    packed = Cargo.load(run.home.cargo)
    if machine.name == machines.LOCAL or packed is None:
        return job
    params = dict(job["params"])
    for key, (content, name) in packed.params.items():
        view = machine.root / "store" / "views" / content.tree.digest() / name
        params[key] = f"{view}:{params[key].rpartition(':')[2]}" if key == "reranker" else str(view)
    if packed.work and params.get("reranker") and "reranker" not in packed.params:
        path, _, function = params["reranker"].rpartition(":")
        inside = Path(path).relative_to(packed.root)
        params["reranker"] = f"{machine.root / 'runs' / run.run_id / 'work' / inside}:{function}"
    return {**job, "params": params}


def _lay_out(packed: Cargo, machine: Machine, agent: str) -> None:
    """Have the trees of parameters as folders there, for reading."""
    for content, _ in packed.params.values():
        words = transport.root_words(machine, agent, "view")
        answer = transport.ask(machine, words, spec.canonical({"digest": content.tree.digest()}), _STAGE_DEADLINE_S)
        if "path" not in answer:
            raise BadAnswer(f"{machine.name} could not lay out what a parameter names: {answer}", "Try again.")


def prepared_agent(machine: Machine) -> str:
    """Have today's worker code on a machine; returns its name there."""
    store = config.state_folder() / "agents"
    name = agents.keep(store)
    machine.push_agent(store, name)
    return name
