"""The story of a run on the laptop: look at where it stands, do the one next step; each step may be done twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import rundir, spec
from orchestrator import clock, config, delivery, follow, machines, outs, rentals, runs, summary, transport, weights
from orchestrator.errors import BadAnswer, ConfigError, GpuError, HomeDiskFull, JobFailed, NotReachable, WorkerLost
from orchestrator.home import Arrivals, News
from orchestrator.runs import ENDED, Record, Run
from orchestrator.transport import Machine

GRACE_S = 10.0
"""How long a worker gets to sync its rows when nobody says otherwise."""
_PIECE_BYTES = 1 << 20
_PULLS_MAX = 3
"""An ended run is whole after one pull; more than this many mean that something is wrong with it."""


def carry_home(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
    """Advance until everything the run made is home and it has ended, well or not."""
    while run.record.state not in ENDED:
        advance(run, machine, arrivals, news)


def advance(run: Run, machine: Machine, arrivals: Arrivals, news: News) -> None:
    """Do the one next step. Dying anywhere in it is mended by doing it again."""
    if run.record.state == "planned":
        push(run, machine, news)
    elif run.record.state == "pushed":
        start(run, machine, arrivals)
    elif run.record.state == "running":
        bring_home(run, machine, arrivals, news)


def push(run: Run, machine: Machine, news: News) -> None:
    """Have on the machine what the run needs there: the worker's code, an environment, and the files it takes along."""
    machine.push_agent(config.state_folder() / "agents", run.record.agent)
    place = delivery.deliver(run, machine, lambda words: news({"say": words}, b""))
    attempt, former = run.record.attempt, run.record.former
    if former:  # it may have been here before: this machine's own word counts from now on
        attempt = _state(run, machine)["attempt"]
        former = [entry for entry in former if entry["machine"] != machine.name]
    run.save(state="pushed", attempt=attempt, former=former, place=asdict(place))


def start(run: Run, machine: Machine, arrivals: Arrivals) -> None:
    """Start the next attempt; asked twice, or by two, it starts once."""
    if run.record.attempt == 0 or run.record.former:
        _put(run, machine)
    words = transport.agent_words(machine, run.record.agent, "start", run.run_id)
    request = {"job": delivery.job_there(run, machine), "order": _order(run, machine)}
    answer = transport.ask(machine, words, spec.canonical(request))
    if answer.get("error") == "conflict":
        raise ConfigError(f"{machine.name} holds another run under the id {run.run_id}.", "Start it anew: gpu run …")
    _check_standing(machine, answer)
    if answer["attempt"] < run.record.attempt:  # that machine lost the run's folder: it begins again from what is home
        arrivals.machine_lost_its_folder()
        run.save(attempt=answer["attempt"], state="planned")
        return
    if answer.get("started") and answer["state"] != "running" and answer["attempt"] == run.record.attempt:
        raise JobFailed(
            f"The supervisor of {run.run_id} ended on {machine.name} before it began an attempt. "
            f"Its last words: {answer.get('said')}",
            f"Mend that, then: gpu resume {run.run_id}",
        )
    run.begin_leg(rentals.price_usd_per_hour(machine.name))
    run.save(state="running", started_at=run.record.started_at or clock.now(), finished_at=None, failure={})


def _order(run: Run, machine: Machine) -> dict[str, Any]:
    """What the supervisor is told; secrets are in it, so it only ever travels on standard input."""
    record = run.record
    is_command = run.job()["story"] == "command"
    return {
        "expect_attempt": record.attempt,
        "python": machine.python if is_command else record.place["python"],
        "agent": str(machine.root / "agent" / record.agent),
        "cwd": record.place["cwd"],
        "env": config.job_environment(record.env_names, everything=machine.name == machines.LOCAL),
        "inherit": machine.name != machines.LOCAL,
        "path_first": record.place["path_first"],
        "gpus": record.gpus,
        "queue": record.queue,
        "restarts": not is_command,
        "mirror": record.mirror,
        "machine": machine.name,
    }


def _state(run: Run, machine: Machine) -> dict[str, Any]:
    """Where the run stands on a machine."""
    answer = transport.ask(machine, transport.agent_words(machine, run.record.agent, "state", run.run_id))
    _check_standing(machine, answer)
    return answer


def _check_standing(machine: Machine, answer: dict[str, Any]) -> None:
    """Raise BadAnswer unless an answer says where a run stands."""
    if not isinstance(answer.get("state"), str) or type(answer.get("attempt")) is not int:
        raise BadAnswer(f"{machine.name} did not say where the run stands: {str(answer)[:200]}")


def _put(run: Run, machine: Machine) -> None:
    """Send what is home to a machine: rows, choices, what was resolved, weights, and what a command made elsewhere."""
    files = [(name, path) for name, path in _at_home(run) if path.is_file() and not path.is_symlink()]
    if not files:
        return
    folder = run.job().get("folder", "")
    facts = [
        {"name": name, "bytes": path.stat().st_size, "sha256": rundir.file_sha256(path), "folder": folder}
        for name, path in files
    ]

    def frames() -> Iterator[bytes]:
        for fact, (_, path) in zip(facts, files, strict=True):
            yield spec.canonical(fact) + b"\n"
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece

    words = transport.agent_words(machine, run.record.agent, "put", run.run_id)
    answer = transport.ask(machine, words, frames)
    if "error" in answer:
        raise NotReachable(f"{machine.name} did not take {answer.get('name')} of {run.run_id}: {answer['error']}.")


def _at_home(run: Run) -> Iterator[tuple[str, Path]]:
    """Everything of a run that a machine new to it should have, by the name it is sent under."""
    yield from _resolved(run)
    yield from (("home.jsonl", run.home.rows), ("home-noise.jsonl", run.home.noise))
    yield ("home-selections.jsonl", run.home.selections)
    yield from outs.newest(run.home)


def _resolved(run: Run) -> Iterator[tuple[str, Path]]:
    """What the first machine resolved for this run, its model, and how far a training is: the next ones keep to all."""
    copies = [rundir.Run(folder) for folder in sorted((run.home.folder / "machines").glob("*"))]
    if run.record.share_of:
        copies = [runs.parent(run).home.shared]
    for copy in copies:
        if copy.resolved.is_file():
            yield copy.resolved.name, copy.resolved
            yield from _files(copy.folder / "model")
            break
    if newest := weights.to_send(run.home):
        yield from _files(newest)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder of weights, its manifest last; none while it has no manifest."""
    if (folder / rundir.MANIFEST).is_file():
        yield from ((f"{folder.name}/{path.name}", path) for path in rundir.weights(folder))


def bring_home(run: Run, machine: Machine, arrivals: Arrivals, news: News, poll_s: float = follow.POLL_S) -> None:
    """Follow until the run has ended and all of it is here; then say how it ended and sum it up."""
    for _ in range(_PULLS_MAX):
        end = follow.follow(run, machine, arrivals, news, poll_s)
        settle(run, arrivals, end)
        if run.record.state != "running":
            return
    raise mismatch(run)


def mismatch(run: Run) -> JobFailed:
    """End a run here whose machine sends something else than its seal says, again and again; returns the error."""
    message = (
        f"What {run.record.machine} sent of {run.run_id} is not what its seal says; nothing at home was overwritten, "
        "and what came is kept."
    )
    hint = f"Look at it, or go on with what is missing: gpu resume {run.run_id}"
    run.save(state="failed", finished_at=clock.now(), failure={"kind": "mismatch", "message": message, "hint": hint})
    return JobFailed(message, hint)


def settle(run: Run, arrivals: Arrivals, end: dict[str, Any]) -> None:
    """Take over how a run ended. `sealed` only when the rows here are those of the seal, byte for byte."""
    seal = _seal(end)
    if end["state"] == "running":
        if run.record.state == "pushed":  # it was started, and whoever started it could not say so any more
            run.save(state="running", started_at=run.record.started_at or clock.now())
        return
    if end["state"] in ("accepted", "none"):  # never started, or its folder there is gone
        begun = run.record.attempt > 0 or arrivals.copy.attempts()
        failure = _lost(run, run.record.attempt) if begun else {}
        arrivals.machine_lost_its_folder()
        run.end_leg()
        run.save(state="lost" if begun else "planned", failure=failure, attempt=0)
        return
    if end["state"] == "died" or seal is None:
        failure = _lost(run, end["attempt"])
    elif not arrivals.is_complete(seal) or weights.is_owed(arrivals.copy, run.job(), seal):
        return  # the next pull brings the rest
    else:
        failure = {"kind": seal.kind, "message": seal.message, "hint": seal.hint}
    state = _ended_state(seal) if end["state"] == "ended" and seal else "lost"
    failure = {} if state == "sealed" else failure
    run.end_leg()
    run.save(attempt=end["attempt"], finished_at=clock.now(), failure=failure, state=state)
    _sum_up(run)  # should this not happen, whoever reads the summary sees that it is older than the record


def _seal(end: dict[str, Any]) -> rundir.Seal | None:
    try:
        return rundir.Seal.of(end["seal"]) if end.get("seal") else None
    except (TypeError, AttributeError):
        raise NotReachable(f"The machine sent a seal that is none: {str(end['seal'])[:80]}") from None


def _ended_state(seal: rundir.Seal) -> str:
    return {"done": "sealed", "stopped": "stopped"}.get(seal.reason, "failed")


def _lost(run: Run, attempt: int) -> dict[str, str]:
    message = (
        f"Attempt {attempt} of {run.run_id} ended without a word: its supervisor was killed or the machine went down. "
        f"{run.record.rows_home} rows are home."
    )
    return {"kind": "lost", "message": message, "hint": f"Carry on: gpu resume {run.run_id}"}


def machine_is_gone(run: Run, arrivals: Arrivals, news: News) -> None:
    """Take over that a machine of the run is no more, by its provider's own word.

    What was rescued from it is taken in first, then what a mirror holds.
    """
    from orchestrator import rescue

    name = arrivals.copy.folder.name
    end = rescue.take_in(run, arrivals, lambda words: news({"say": words}, b""))
    if end is not None:
        _came(run, arrivals, end)
    from_mirror(run, arrivals, news)
    if run.record.machine == name and run.record.state in ("pushed", "running"):
        message = f"{name} is gone, and with it what it had not sent. {run.record.rows_home} rows are home."
        failure = {"kind": "lost", "message": message, "hint": f"Carry on elsewhere: gpu resume {run.run_id} --gpu …"}
        run.end_leg()
        run.save(state="lost", finished_at=clock.now(), failure=failure)
    is_all = not rescue.is_waiting(name, run.run_id)
    former = [
        {**entry, "settled": entry["settled"] or (is_all and entry["machine"] == name)} for entry in run.record.former
    ]
    run.save(former=former)


def from_mirror(run: Run, arrivals: Arrivals, news: News) -> None:
    """Bring home what the run's mirror holds of a machine that cannot be asked; that it cannot be read is said."""
    if not run.record.mirror:
        return
    from orchestrator import mirrors

    try:
        source = mirrors.source(run.record.mirror, run.run_id, os.environ.get("HF_TOKEN"))
        end = mirrors.gather(source, arrivals.copy.folder.name, arrivals)
    except GpuError as error:
        news({"say": f"The mirror {run.record.mirror} gave nothing: {error.message}"}, b"")
        return
    _came(run, arrivals, end)


def _came(run: Run, arrivals: Arrivals, end: dict[str, Any]) -> None:
    """Take over what came home of a machine that cannot be asked, and whether the run had ended there."""
    follow.note(run, arrivals)
    if run.record.machine == arrivals.copy.folder.name and end.get("state") == "ended":
        settle(run, arrivals, end)


def again(run: Run) -> None:
    """Let an ended run be started once more, for what is missing. A sealed run stays as it is."""
    if run.record.state in ("failed", "stopped", "lost"):
        run.save(state="planned")


def raise_if_not_done(run: Run) -> None:
    """Raise the error an ended run stands for; nothing when it is sealed."""
    failure = run.record.failure
    if run.record.state == "sealed" or not failure:
        return
    kinds: dict[str, type[GpuError]] = {
        "config": ConfigError,
        "busy": ConfigError,
        "disk_full": HomeDiskFull if run.record.machine == machines.LOCAL else JobFailed,
        "lost": WorkerLost,
    }
    hint = failure["hint"] or f"Carry on with what is missing: gpu resume {run.run_id}"
    raise kinds.get(failure["kind"], JobFailed)(failure["message"], hint)


def move(run: Run, target: str, *, settled: bool, queue: bool) -> None:
    """Have the next attempt on another machine; what the old one may still make is remembered until it is home."""
    record = run.record
    former = [entry for entry in record.former if entry["machine"] != record.machine]
    former.append({"machine": record.machine, "settled": settled})
    former = [entry for entry in former if entry["machine"] != target or not entry["settled"]]
    run.end_leg()
    run.save(machine=target, former=former, state="planned", attempt=0, failure={}, finished_at=None, queue=queue)


def is_unsettled(run: Run, name: str) -> bool:
    """Whether the run left that machine behind without its word that it had ended there, and has not heard since."""
    return any(entry["machine"] == name and not entry["settled"] for entry in run.record.former)


def gather(run: Run, machine: Machine, arrivals: Arrivals, news: News, *, may_stop: bool = True) -> None:
    """Merge what a machine that the run has left made late, and stop it there if it still runs."""
    if may_stop and _state(run, machine)["state"] == "running":
        stop(run, machine, GRACE_S)
    end = follow.pull(run, machine, arrivals, follow.NOW, news)
    if "cut" in end or end["state"] == "running":
        return  # asked again the next time
    seal = _seal(end)
    if seal and not arrivals.is_complete(seal):
        return
    former = [{**entry, "settled": True} if entry["machine"] == machine.name else entry for entry in run.record.former]
    run.save(former=former)
    if run.record.state in ENDED:
        _sum_up(run)


def _sum_up(run: Run) -> None:
    """Count the rows at home; a share's are counted with all of its run."""
    if not run.record.share_of:
        summary.write(run)


def stop(run: Run, machine: Machine, grace_s: float) -> dict[str, Any]:
    """Stop the run on its machine; returns where it stands then. What it made is pulled by the caller."""
    words = transport.agent_words(machine, run.record.agent, "stop", run.run_id, str(grace_s))
    return transport.ask(machine, words, deadline_s=grace_s + transport.CALL_DEADLINE_S)


def _shown(record: Record) -> str:
    """The state as `gpu runs` has it: with what its machine is waiting for."""
    if record.state == "running" and record.phase == "queued":
        return "queued"
    rental = rentals.find(record.machine) if record.state == "planned" else None
    states = {"launching": "launching", "booting": "launching", "ready": "ready"}
    return states.get(rental.record.state, record.state) if rental else record.state


def document(run: Run) -> dict[str, Any]:
    """The run as `gpu runs --json` gives it."""
    record = run.record
    return {
        "run_id": record.run_id,
        "job": record.job,
        "machine": runs.machine_names(run),
        "state": _shown(record),
        "rows_done": record.rows_done,
        "rows_total": record.rows_total,
        "rows_synced": record.rows_synced,
        "rows_home": record.rows_home,
        "steps_done": record.steps_done,
        "steps_total": record.steps_total,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "cost_usd": round(run.cost_usd(), 4),
        "reachable": _answers(run),
        "last_seen": record.last_seen,
    }


def _answers(run: Run) -> bool | None:
    """Whether the machine of a run answered the last time; of several that are at work, whether all did."""
    parts = runs.workers(run)
    names = {part.record.machine for part in parts if part.record.state not in ENDED or len(parts) == 1}
    said = [True if name == machines.LOCAL else machines.news(name).get("reachable") for name in names]
    return False if False in said else None if None in said or not said else True
