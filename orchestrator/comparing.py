"""Runs side by side on the same examples: paired differences, what flipped, and whether chance explains it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import comparison, durable, metrics, rundir, selection, suites
from jobs.comparison import Paired
from jobs.selection import Candidate
from orchestrator import frozen, runs, summary
from orchestrator.errors import ConfigError, UsageError

_SURE = 0.05
_LABELS_MAX = 40


@dataclass(frozen=True)
class Side:
    """One run of a comparison, or a part of one: the score of each example that has one, and what the run was."""

    label: str
    task: str
    home: rundir.Home
    measure: str
    """What its numbers are: `score`, or `bits_per_byte` of texts that were read, where less is better."""
    scores: dict[str, float]
    subjects: dict[str, str | None]
    rules: dict[str, dict[str, float]]
    """By rule of the task, the mean score of each example."""
    about: dict[str, Any]
    """Of job.json and summary.json: `job`, `model`, `identity` and `noise`, as far as they are there."""


@dataclass(frozen=True)
class Loaded:
    """Runs that were read to be set side by side."""

    way: str
    """How one number comes of an example's samples: one of `selection.SELECTORS`."""
    runs: dict[str, dict[str, Side]]
    """By its label, a run's sides by task: one, or one for each of its parts; the run compared with comes first."""

    @property
    def first(self) -> dict[str, Side]:
        """The run that all others are compared with."""
        return next(iter(self.runs.values()))

    def pairs(self) -> list[tuple[Side, Side]]:
        """What is compared: every further run with the first, task by task."""
        others = list(self.runs.values())[1:]
        return [(self.first[task], other[task]) for other in others for task in self.first if task in other]

    def tasks(self) -> list[str]:
        """The tasks that are compared, in the first run's order."""
        return list(dict.fromkeys(before.task for before, _ in self.pairs()))

    def sides(self) -> list[Side]:
        """Everything that is compared, task by task."""
        compared = {id(side) for pair in self.pairs() for side in pair}
        found = [run[task] for task in self.tasks() for run in self.runs.values() if task in run]
        return [side for side in found if id(side) in compared]


def load(names: Sequence[str], way: str = "mean") -> Loaded:
    """Read the rows of runs, once. UsageError for runs that cannot be set side by side."""
    homes = [_home(name) for name in names]
    if len({home.folder for home in homes}) < len(homes) or len(homes) < 2:
        raise UsageError("A comparison needs two different runs.", "See the runs: gpu runs --all")
    labels = _labels(homes)
    loaded = Loaded(way, {label: _sides(home, label, way) for home, label in zip(homes, labels, strict=True)})
    first = labels[0]
    for label, sides in loaded.runs.items():
        if not sides:
            raise UsageError(f"{label} has no scored row to compare.", f"Look at it: gpu report {label}")
        if not any(task in loaded.first and side.measure == loaded.first[task].measure for task, side in sides.items()):
            raise UsageError(
                f"{first} is of the task {', '.join(loaded.first)}, {label} of {', '.join(sides)}: "
                "their scores are no measure of one thing.",
                "Compare runs of the same task.",
            )
    return loaded


def compare(loaded: Loaded) -> dict[str, Any]:
    """Every further run against the first, on the examples that both scored; as `gpu compare --json` prints it.

    Of runs with several parts, task by task. P-values are adjusted (Holm) over all comparisons.
    """
    lacking = {
        label: [task for task in {**loaded.first, **sides} if task not in sides or task not in loaded.first]
        for label, sides in loaded.runs.items()
    }
    return {
        "by": loaded.way,
        "tasks": loaded.tasks(),
        "runs": [_run(side) for side in loaded.sides()],
        "comparisons": _comparisons(loaded.pairs()),
        "not_compared": {label: tasks for label, tasks in lacking.items() if tasks},
        "frozen": {label: known for label, sides in loaded.runs.items() if (known := _frozen(sides))},
    }


def _frozen(sides: Mapping[str, Side]) -> dict[str, Any] | None:
    return frozen.told(next(iter(sides.values())).home)


def table(loaded: Loaded) -> str:
    """The scores as CSV: a line for each example that any of the runs has, a column for each run.

    With more than one task, the task comes first.
    """
    tasks = loaded.tasks()
    text = io.StringIO()
    written = csv.writer(text, lineterminator="\n")
    several = len(tasks) > 1
    written.writerow([*(["task"] if several else []), "example_id", "subject", *loaded.runs])
    for task in tasks:
        sides = [run.get(task) for run in loaded.runs.values()]
        there = [side for side in sides if side is not None]
        for name in dict.fromkeys(name for side in there for name in side.subjects):
            subject = next((side.subjects[name] for side in there if name in side.subjects), None)
            scores = [_cell(None if side is None else side.scores.get(name)) for side in sides]
            written.writerow([*([task] if several else []), name, subject or "", *scores])
    return text.getvalue()


def _cell(score: float | None) -> str:
    """A score, or nothing where there is none: an error is never a zero."""
    return "" if score is None else f"{score:.12g}"


def _home(name: str) -> rundir.Home:
    """The folder of a run that is named, or of rows that somebody copied here without their record."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "run.json").exists() and (folder / "rows.jsonl").is_file():
        return rundir.Home(folder.absolute())
    return runs.find(name).home


def _labels(homes: Sequence[rundir.Home]) -> list[str]:
    """Names of folders; where two are the same, with the folder they lie in."""
    names = [home.folder.name for home in homes]
    return [str(home.folder) if names.count(home.folder.name) > 1 else home.folder.name for home in homes]


def _sides(home: rundir.Home, label: str, way: str) -> dict[str, Side]:
    """A run by task; a task of which nothing was scored is left out."""
    found: dict[str, selection.Examples] = {}
    try:
        for row in summary.finals(home):
            found.setdefault(suites.task_of(row["key"]), selection.Examples()).add(row)
    except OSError as error:
        raise ConfigError(f"The rows of {label} cannot be read: {error.strerror or error}.") from None
    sides = {task: _side(home, label, task, (examples, selection.SELECTORS[way])) for task, examples in found.items()}
    return {task: side for task, side in sides.items() if side.scores}


def _side(
    home: rundir.Home,
    label: str,
    task: str,
    counted: tuple[selection.Examples, Callable[[Sequence[Candidate]], float]],
) -> Side:
    examples, pick = counted
    scored, read = examples.scored(), _bits(examples)
    return Side(
        label=label,
        task=task,
        home=home,
        measure="bits_per_byte" if read else "score",
        scores=read or {name: pick(candidates) for name, candidates in scored.items()},
        subjects={name: group.subject for name, group in examples.groups.items()},
        rules={rule: _by_rule(scored, place) for place, rule in enumerate(examples.rules)},
        about=_about(home, task),
    )


def _bits(examples: selection.Examples) -> dict[str, float]:
    """Of texts that were read, the bits that each byte of a text takes, by example."""
    return {
        name: each.reading.bits_per_byte
        for name, group in examples.groups.items()
        for each in group.candidates.values()
        if each.reading is not None
    }


def _by_rule(scored: Mapping[str, list[Candidate]], place: int) -> dict[str, float]:
    found = {}
    for name, candidates in scored.items():
        given = [each.scores[place] for each in candidates if place < len(each.scores)]
        values = [value for value in given if value is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


def _about(home: rundir.Home, task: str) -> dict[str, Any]:
    job = durable.load_news(home.job)
    summed = durable.load_news(home.summary)
    identity = (summed.get("resolved") or {}).get("identity")
    model = (job.get("params") or {}).get("model") or summed.get("model")
    part = (summed.get("parts") or {}).get(task) or summed
    return {
        "job": job.get("job"),
        "model": model,
        "identity": suites.identity(identity, task) or None if isinstance(identity, dict) else None,
        "noise": part.get("noise") or {},
    }


def _run(side: Side) -> dict[str, Any]:
    estimate = (metrics.estimate if side.measure == "score" else metrics.estimate_of_any)(list(side.scores.values()))
    return {
        "run": side.label,
        "measure": side.measure,
        "job": side.about["job"],
        "task": side.task,
        "model": side.about["model"],
        "n_examples": len(side.subjects),
        "scored": len(side.scores),
        "value": estimate.value,
        "stderr": estimate.stderr,
        "ci95": [estimate.low, estimate.high],
    }


def _comparisons(pairs: Sequence[tuple[Side, Side]]) -> list[dict[str, Any]]:
    found = {str(number): _paired(*pair) for number, pair in enumerate(pairs)}
    adjusted = comparison.holm({number: pair.p_value for number, pair in found.items()})
    return [_compared(*pairs[int(number)], pair, adjusted[number]) for number, pair in found.items()]


def _paired(first: Side, side: Side) -> Paired:
    try:
        return comparison.paired(first.scores, side.scores)
    except ValueError:
        raise UsageError(
            f"{first.label} and {side.label} have no scored example in common: they were asked different things.",
            "Compare runs over the same dataset; --limit takes its first examples.",
        ) from None


def _compared(first: Side, side: Side, pair: Paired, p_adjusted: float) -> dict[str, Any]:
    floor = _noise_floor(first, side, pair.n)
    return {
        "task": first.task,
        "before": first.label,
        "after": side.label,
        **_figures(pair),
        "left_out": len(first.subjects.keys() | side.subjects.keys()) - pair.n,
        "p_adjusted": p_adjusted,
        "noise_floor": floor,
        "verdict": _verdict(pair, p_adjusted, floor, sign=1 if first.measure == "score" else -1),
        "gained": list(pair.gained),
        "lost": list(pair.lost),
        "differs": _differences(first.about["identity"], side.about["identity"]),
        "rules": _parts(first.rules, side.rules),
        "subjects": _parts(_by_subject(first), _by_subject(side)),
    }


def _figures(pair: Paired) -> dict[str, Any]:
    return {
        "n": pair.n,
        "difference": pair.difference,
        "stderr": pair.stderr,
        "ci95": [pair.low, pair.high],
        "p_value": pair.p_value,
        "test": pair.test,
    }


def _verdict(pair: Paired, p_adjusted: float, floor: float | None, sign: int) -> str:
    """`better`, `worse`, or `noise` for a difference that chance, or a second run of the same, explains as well.

    `sign`: 1 where more is better, -1 where less is.
    """
    if p_adjusted >= _SURE or abs(pair.difference) <= (floor or 0.0):
        return "noise"
    return "better" if pair.difference * sign > 0 else "worse"


def _noise_floor(first: Side, side: Side, n: int) -> float | None:
    """The higher of what either run measured when it was asked to; None when neither was."""
    noises = (each.about["noise"] for each in (first, side))
    told = [(noise.get("squares", noise.get("flips")), noise.get("n")) for noise in noises]
    floors = [comparison.noise_floor(flips, count, n) for flips, count in told if count and flips is not None]
    return max(floors, default=None)


def _parts(before: Mapping[str, dict[str, float]], after: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """The same for each rule or subject that both have; not adjusted, as they say where to look, not what is so."""
    both = [name for name in before if name in after and before[name].keys() & after[name].keys()]
    return {name: _figures(comparison.paired(before[name], after[name])) for name in both}


def _by_subject(side: Side) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, score in side.scores.items():
        if subject := side.subjects[name]:
            found.setdefault(subject, {})[name] = score
    return found


def _differences(before: Any, after: Any) -> dict[str, list[Any]] | None:
    """What of the two measurements was not the same, by name: two values; None when it is not known of both."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return None
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {name: [before.get(name), after.get(name)] for name in names}


def write(path: Path, data: bytes) -> None:
    """Put a file where its user wants it, whole or not at all. ConfigError when that cannot be."""
    try:
        durable.replace_whole(path, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from None


def chart(document: Mapping[str, Any]) -> bytes:
    """The runs' scores with their intervals as a PNG picture. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "Charts need matplotlib, which is not installed here. Nothing was drawn.",
            "Install it beside gpu: pip install 'gpu[plots]', or pip install matplotlib",
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = document["tasks"]
    figure, drawn = pyplot.subplots(
        len(tasks), figsize=(8, len(tasks) + 0.6 * len(document["runs"])), layout="constrained", squeeze=False
    )
    for (axes,), task in zip(drawn, tasks, strict=True):
        _draw(axes, [entry for entry in document["runs"] if entry["task"] == task])
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()


def _draw(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """A bar for each run of one task."""
    is_share = entries[0]["measure"] == "score"
    times = 100 if is_share else 1
    values = [times * entry["value"] for entry in entries]
    ends = [[times * abs(entry["value"] - _end(entry, end)) for entry in entries] for end in (0, 1)]
    axes.barh(range(len(entries)), values, xerr=ends, capsize=4, color="#4477aa")
    axes.set_yticks(range(len(entries)), [entry["run"][-_LABELS_MAX:] for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel(f"{entries[0]['task']}: {'score in %' if is_share else 'bits per byte'}, with 95 % interval")


def _end(entry: Mapping[str, Any], place: int) -> float:
    """An end of an interval; where there is none, the value itself."""
    end = entry["ci95"][place]
    return float(entry["value"] if end is None else end)
