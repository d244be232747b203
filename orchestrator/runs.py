"""The laptop's records of runs: one folder each, remembered by path, so that a run is found from any directory."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import durable, rundir
from orchestrator import clock, config, keys
from orchestrator.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from orchestrator.cargo import Cargo

ENDED = ("sealed", "failed", "stopped", "lost")
"""States in which nothing runs and everything there was is home."""
_SLUG = re.compile(r"[^a-z0-9]+")
_SLUG_MAX = 28


@dataclass
class Record:
    """Where a run stands, as run.json says. `state` is one of CLI states: planned, pushed, running, or an ended one."""

    run_id: str
    job: str
    machine: str
    agent: str
    """Snapshot of the worker code that this run keeps."""
    python: str
    """The interpreter of this computer that it began with: the one that works when it runs here."""
    cwd: str
    """The folder of this computer that the command was typed in."""
    created_at: str
    state: str = "planned"
    attempt: int = 0
    """The last attempt known to have begun."""
    started_at: str | None = None
    finished_at: str | None = None
    rows_total: int | None = None
    rows_done: int = 0
    rows_synced: int = 0
    rows_home: int = 0
    rows_damaged: int = 0
    steps_done: int = 0
    """Of a training; `steps_total` None: it is none, or nobody knows yet."""
    steps_total: int | None = None
    phase: str = ""
    last_seen: str | None = None
    failure: dict[str, str] = field(default_factory=dict)
    """kind, message and hint of how it ended, when not well."""
    place: dict[str, str] = field(default_factory=dict)
    """Where it works on its machine: `python`, `cwd`, and `path_first`, a folder put first on its PATH."""
    former: list[dict[str, Any]] = field(default_factory=list)
    """Machines the run has left: `machine`, and `settled` once all that was made there is home."""
    env_names: list[str] = field(default_factory=list)
    """Variables of the laptop that the job gets; their values are nowhere but in memory."""
    gpus: int | None = None
    """How many GPUs of the machine it claims; None: all there are."""
    queue: bool = False
    """Whether it waits for its GPUs, instead of failing when others have them."""
    environment: str | None = None
    """The environment the machine makes for it (`train`, `serve`); None: it needs none."""
    legs: list[dict[str, Any]] = field(default_factory=list)
    """Each stay on a machine: `machine`, `usd_per_hour`, and `since` and `until` in seconds since 1970 (None: now)."""
    mirror: str = ""
    """Where else its files are copied while it goes on; empty: nowhere."""
    rents: dict[str, Any] = field(default_factory=dict)
    """What was asked of the machine that is rented for it alone; empty: it runs on one there is."""
    terminate: bool = False
    """Whether its machine is given back once all that it made is home, after a failure too."""
    keep_on_failure_minutes: float = 0.0
    """How long its machine is kept after a failure, so that somebody can look."""
    code_changes: list[dict[str, str]] = field(default_factory=list)
    """Each time newer worker code was taken on purpose: when, from, to."""
    machines: int = 0
    """How many machines share it; 0: it is no run of several, and `machine` is where it works."""
    boxes: list[str] = field(default_factory=list)
    """Those machines, where they were named; empty: they are rented."""
    resumed_at: str = ""
    """Of a run that several machines share: when it was last begun again; how shares ended before is over."""
    share_of: str = ""
    """The run that this is a share of."""
    needs: list[str] = field(default_factory=list)
    """Files and folders that it was told to take along, as typed."""
    leads: bool = False
    """Of a share: whether it began before it was known what the run's first machine had resolved."""


@dataclass
class Run:
    """A run: its folder at home, what was asked, and where it stands."""

    home: rundir.Home
    record: Record

    @property
    def run_id(self) -> str:
        """The name of the run and of its folder."""
        return self.record.run_id

    def job(self) -> dict[str, Any]:
        """The request, as job.json holds it."""
        document: dict[str, Any] = durable.load_json(self.home.job)
        return document

    def save(self, **changes: Any) -> None:
        """Change the record and put it on the disk, whole."""
        for name, value in changes.items():
            setattr(self.record, name, value)
        durable.save_json(self.home.record, asdict(self.record))

    def begin_leg(self, usd_per_hour: float) -> None:
        """Note that it works on its machine from now on, at that price; again while it does changes nothing."""
        legs = self.record.legs
        if not legs or legs[-1]["until"] is not None or legs[-1]["machine"] != self.record.machine:
            leg = {"machine": self.record.machine, "usd_per_hour": usd_per_hour, "since": clock.timestamp()}
            self.record.legs = [*legs, {**leg, "until": None}]

    def end_leg(self) -> None:
        """Note that it works nowhere any more."""
        if self.record.legs and self.record.legs[-1]["until"] is None:
            self.record.legs[-1]["until"] = clock.timestamp()

    def cost_usd(self) -> float:
        """What its stays on rented machines cost, in USD: the machine's whole price for as long as it was there."""
        return self._own_cost_usd() + sum(share._own_cost_usd() for share in shares(self))

    def _own_cost_usd(self) -> float:
        now = clock.timestamp()
        hours = [
            (max((leg["until"] or now) - leg["since"], 0.0) / 3600, leg["usd_per_hour"]) for leg in self.record.legs
        ]
        return float(sum(long * price for long, price in hours))

    def reload(self) -> None:
        """Read the record again: another process of ours may be the one that follows the run."""
        self.record = _load_record(self.home.record)


def new_run_id(job: str, model: str | None) -> str:
    """Date, job, model and four random hex digits: sorts, says what it is, fits every provider's limit on names."""
    slug = _SLUG.sub("-", Path(model or "").name.lower()).strip("-")[:_SLUG_MAX].strip("-")
    date = clock.now()[:10].replace("-", "")
    return "-".join(part for part in (date, job, slug, secrets.token_hex(2)) if part)


def create(record: Record, job: dict[str, Any], packed: Cargo | None = None) -> Run:
    """Make the folder of a new run under `./results` and remember where it is. Raises ConfigError when it cannot."""
    home = rundir.Home(config.results_folder() / record.run_id)
    try:
        home.folder.parent.mkdir(parents=True, exist_ok=True)
        durable.make_folder(home.folder)
        durable.save_json(home.job, job)
        if packed and packed.contents():
            packed.save(home.cargo)
        run = Run(home, record)
        run.save()
        _remember(home)
    except OSError as error:
        raise ConfigError(
            f"The run's folder {home.folder} cannot be written: {error.strerror}. Nothing was started.",
            "Run the command in a folder you can write to, with space left on its disk.",
        ) from None
    return run


def _remember(home: rundir.Home) -> None:
    book = config.state_folder() / "runs"
    durable.have_folder(book)
    durable.save_json(book / f"{home.run_id}.json", {"path": str(home.folder.absolute())})


def is_remembered(run_id: str) -> bool:
    """Whether a run was begun from here, or taken over with this state folder; its own folder may be gone.

    Of a share, whether the run was that it is of.
    """
    book = config.state_folder() / "runs"
    names = [name for name in (run_id, run_id.rpartition(".")[0]) if name == run_id or number_of(run_id)]
    return any(rundir.is_safe_name(name) and (book / f"{name}.json").is_file() for name in names)


def _load_record(path: Path) -> Record:
    """What a run.json holds; ConfigError when it is damaged, or names what may not stand in a path."""
    document = durable.load_news(path)
    known = {entry.name for entry in fields(Record)}
    try:
        record = Record(**{name: value for name, value in document.items() if name in known})
        names = [record.run_id, record.machine, record.agent, *(entry["machine"] for entry in record.former)]
        names += [*record.boxes, *filter(None, [record.share_of])]
        safe = all(rundir.is_safe_name(name) for name in names)
    except (TypeError, KeyError):
        safe = False
    if not safe:
        raise ConfigError(f"{path} is damaged: it is not the record of a run.", "Rows beside it are not affected.")
    keys.hide(record.env_names)
    return record


def open_folder(folder: Path) -> Run:
    """The run kept in a folder; ConfigError when it holds none."""
    home = rundir.Home(folder.absolute())
    if not home.record.is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no run.json.", "See the runs: gpu runs --all")
    return Run(home, _load_record(home.record))


def remembered() -> Iterator[Run]:
    """Every run whose folder is still there, oldest first."""
    found = _opened(folder for folder in _book().values() if (folder / "run.json").is_file())
    yield from sorted(found, key=lambda run: (run.record.created_at, run.run_id))


def gone() -> dict[str, Path]:
    """Where the runs were that are remembered and whose folder is there no more, by id, oldest first."""
    return {name: folder for name, folder in sorted(_book().items()) if not (folder / "run.json").is_file()}


def _book() -> dict[str, Path]:
    """The folder of every run that is remembered, by id; it may not be there."""
    entries = (config.state_folder() / "runs").glob("*.json")
    return {entry.stem: Path(str(durable.load_news(entry).get("path", ""))) for entry in entries}


def _opened(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders; one damaged record must not hide all others."""
    found = []
    for folder in folders:
        try:
            found.append(open_folder(folder))
        except ConfigError as error:
            print(f"Passed over: {error.message}", file=sys.stderr)  # noqa: T201
    return found


def shares(run: Run) -> list[Run]:
    """The shares of a run that several machines make, oldest first; of any other run none."""
    if not run.record.machines:
        return []
    folders = [path.parent for path in run.home.parts.glob("*/run.json")]
    return _opened(sorted(folders, key=lambda path: number_of(path.name)))


def number_of(share_id: str) -> int:
    """Which share of its run an id is of; 0 for none."""
    last = share_id.rpartition(".")[2]
    return int(last) if last.isdecimal() else 0


def parent(share: Run) -> Run:
    """The run that a share belongs to."""
    return open_folder(share.home.folder.parent.parent)


def workers(run: Run) -> list[Run]:
    """Whatever of a run is on a machine: its shares, else itself."""
    return shares(run) if run.record.machines else [run]


def machine_names(run: Run) -> str:
    """The machine a run is on, in words: of several that share it those that are at work, else all that were."""
    parts = shares(run)
    names = [part.record.machine for part in parts if part.record.state not in ENDED]
    names = names or [part.record.machine for part in parts]
    return ", ".join(sorted(set(names))) or run.record.machine


def everywhere() -> Iterator[Run]:
    """Every run that is remembered, and the shares of each: all that may be on some machine."""
    for run in remembered():
        yield run
        yield from shares(run)


def is_settled(run: Run) -> bool:
    """Whether no machine that it has left may still have something of it."""
    return all(entry["settled"] for part in (run, *shares(run)) for entry in part.record.former)


def find(name: str | None) -> Run:
    """A run by id, by the beginning or end of its id, or by folder; without a name the latest. UsageError if none."""
    if name and ("/" in name or (Path(name) / "run.json").is_file()):
        return open_folder(Path(name))
    known = list(remembered())
    if not known:
        raise UsageError("There are no runs yet.", "Start one: gpu run eval-gsm8k")
    if name is None:
        return known[-1]
    exact = [run for run in known if run.run_id == name]
    exact = exact or [run for run in everywhere() if "." in name and run.run_id == name]
    close = exact or [run for run in known if run.run_id.startswith(name) or run.run_id.endswith(name)]
    if len(close) == 1:
        return close[0]
    if close:
        raise UsageError(f"{name!r} may be any of: {', '.join(run.run_id for run in close)}.", "Give more of its id.")
    raise UsageError(f"There is no run {name!r}.", "See the runs: gpu runs --all")
