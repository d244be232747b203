"""Job definitions: parse a TOML file, check it, fill in every default, name the key that was meant by a wrong one."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs import suites

SCHEMA = 1
"""Version of job.json."""
STORIES = ("evaluate", "train", "speed", "command")
"""What a worker can do; each is a module of that name on the machine side."""
ENVIRONMENTS = ("train", "serve", "none")
"""Environments a machine makes for jobs; `none` for commands that need no Python of ours."""
PYTHONS = ("python", "python3", "pip", "torchrun", "accelerate", "hf")
"""Programs that an environment brings: a command that begins with one of them gets the environment made."""
TYPES = ("text", "integer", "number", "flag")
CATALOG = Path(__file__).parent / "catalog"
_COMMON = Path(__file__).parent / "common" / "parameters.toml"
_PLACE = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TOP_KEYS = (
    "name",
    "summary",
    "story",
    "task",
    "command",
    "environment",
    "needs",
    "out",
    "parts",
    "frozen",
    "parameters",
)
_PARAMETER_KEYS = ("type", "default", "help", "min", "max", "choices", "words")
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
Value = Any
"""A JSON value: text, whole number, number, flag, or None for unset."""


class SpecError(ValueError):
    """A job definition or a parameter is wrong; the message says which and what would be right."""


class UnknownJob(SpecError):
    """There is no job of that name."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest right word, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}."


@dataclass(frozen=True)
class Parameter:
    """One typed setting of a job. A default of None means unset."""

    name: str
    type: str
    help: str
    default: Value = None
    min: float | None = None
    max: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def parse(self, text: str) -> Value:
        """The value of a `key=value` typed by a user; raises SpecError."""
        if text in self.words:
            return text
        try:
            if self.type == "integer":
                return self.check(int(text))
            if self.type == "number":
                return self.check(float(text))
            if self.type == "flag":
                return _FLAGS[text.lower()]
        except (ValueError, KeyError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"{self.name}={text!r} is not {self.expected()}") from None
        return self.check(text)

    def check(self, value: Value) -> Value:
        """The value if it has the right type and lies within the bounds; raises SpecError."""
        if value is None or value in self.words:
            return value
        kinds: dict[str, type] = {"text": str, "integer": int, "number": float, "flag": bool}
        if self.type == "number" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kinds[self.type]:
            raise SpecError(f"{self.name}={value!r} is not {self.expected()}")
        if self.choices and value not in self.choices:
            raise SpecError(f"{self.name}={value!r}: {nearest(str(value), self.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(f"{self.name}={value!r} is not {self.expected()}")
        if isinstance(value, (int, float)) and not (self._floor <= value <= self._ceiling):
            raise SpecError(f"{self.name}={value!r} is not {self.expected()}")
        return value

    @property
    def _floor(self) -> float:
        return -math.inf if self.min is None else self.min

    @property
    def _ceiling(self) -> float:
        return math.inf if self.max is None else self.max

    def expected(self) -> str:
        """What this parameter takes, in words."""
        words = {"text": "text", "integer": "a whole number", "number": "a number", "flag": "true or false"}[self.type]
        words += "" if self.min is None else f" from {self.min}"
        words += "" if self.max is None else f" to {self.max}"
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        return " or ".join([words, *self.words])

    def document(self) -> dict[str, Any]:
        """This parameter for `gpu jobs --json`."""
        return {
            "name": self.name,
            "type": self.type,
            "default": self.default,
            "help": self.help,
            "expects": self.expected(),
        }


@dataclass(frozen=True)
class Part:
    """One evaluation of a job that has several: its task, and its parameters by the names they have in it."""

    task: str
    parameters: Mapping[str, Parameter]
    shared: frozenset[str]
    """Those that the job sets for all its parts."""

    def takes(self) -> dict[str, str]:
        """For each of its parameters, what it is called in the job: `samples` is `gsm8k.samples`."""
        return {name: name if name in self.shared else f"{self.task}.{name}" for name in self.parameters}

    def own(self) -> dict[str, Parameter]:
        """The parameters that are its alone, by their names in the job."""
        takes = self.takes()
        named = {takes[name]: parameter for name, parameter in self.parameters.items() if name not in self.shared}
        return {name: replace(parameter, name=name) for name, parameter in named.items()}


@dataclass(frozen=True)
class Job:
    """A job definition: what it does, its parameters by name, the files it needs and those it makes."""

    name: str
    summary: str
    story: str
    task: str | None
    needs: tuple[str, ...]
    """Files and folders of the project that travel whatever the ignore rules say."""
    parameters: Mapping[str, Parameter]
    command: tuple[str, ...] = ()
    """Of the story `command`: its words; `{name}` in one stands for the parameter of that name."""
    out: tuple[str, ...] = ()
    """Patterns of the files that come home."""
    environment: str = "train"
    parts: tuple[Part, ...] = ()
    """The evaluations it is made of; empty for a job that is one."""
    frozen: bool = False
    """What it has made is kept from being changed once it is done."""

    def fill(self, settings: Mapping[str, str]) -> dict[str, Value]:
        """Every parameter's value: as set by `key=value` words, else the default; SpecError names all faults."""
        faults = []
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        for key, text in settings.items():
            parameter = self.parameters.get(key)
            if parameter is None:
                faults.append(f"{self.name} has no parameter {key!r}: {nearest(key, self.parameters)}")
                continue
            try:
                values[key] = parameter.parse(text)
            except SpecError as error:
                faults.append(str(error))
        faults += [] if faults else self._refused(values)
        if faults:
            raise SpecError("; ".join(faults))
        return values

    def _refused(self, values: Mapping[str, Value]) -> Iterator[str]:
        """What a part cannot do with the value that was set for all parts."""
        for part in self.parts:
            for name in part.shared & part.parameters.keys():
                try:
                    part.parameters[name].check(values[name])
                except SpecError as error:
                    yield f"{part.task}: {error}"

    def words(self, params: Mapping[str, Value]) -> list[str]:
        """The words of its command, each `{name}` replaced by that parameter's value."""
        texts = {f"{{{name}}}": "" if value is None else str(value) for name, value in params.items()}
        return [_PLACE.sub(lambda found: texts.get(found[0], found[0]), word) for word in self.command]


def needs_python(words: Sequence[str]) -> bool:
    """Whether a command begins with a program that only an environment brings for sure."""
    return bool(words) and (words[0] in PYTHONS or re.fullmatch(r"python3\.[0-9]+", words[0]) is not None)


def load(path: Path) -> Job:
    """The job a TOML file defines; raises SpecError naming the file and what is at fault. Laptop only (tomllib)."""
    document = _load_toml(path)
    try:
        job = _job(document, _load_toml(_COMMON), path)
        if job.name != path.stem:
            raise SpecError(f"its name {job.name!r} is not that of the file")
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    return job


def find(name: str, folders: Iterable[Path]) -> Job:
    """The job of that name: the first folder that has it wins. Raises UnknownJob naming the nearest one."""
    folders = list(folders)
    if _NAME.fullmatch(name):
        for folder in folders:
            if (folder / f"{name}.toml").is_file():
                return load(folder / f"{name}.toml")
    raise UnknownJob(f"There is no job {name!r}: {nearest(name, names(folders))}")


def names(folders: Iterable[Path]) -> list[str]:
    """The names of all jobs in these folders."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.toml") if _NAME.fullmatch(path.stem)})


def _load_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from None


def _job(document: dict[str, Any], common: dict[str, Any], path: Path) -> Job:
    document = {"name": path.stem, **document}
    if "command" in document:
        document = {"story": "command", "summary": "A command of this project", **document}
    _check_top(document)
    given = [_parameter(name, said, common) for name, said in document.get("parameters", {}).items()]
    parameters = {parameter.name: parameter for parameter in given}
    of_it = _parts(document, parameters, common, path.parent)
    command = tuple(document.get("command", ()))
    return Job(
        name=document["name"],
        summary=document["summary"],
        story=document["story"],
        task=document.get("task"),
        needs=tuple(document.get("needs", ())),
        parameters=parameters | {name: one for part in of_it for name, one in part.own().items()},
        command=command,
        out=tuple(document.get("out", ())),
        environment=document.get("environment", "train" if not command or needs_python(command) else "none"),
        parts=of_it,
        frozen=document.get("frozen", False),
    )


def _parts(
    document: dict[str, Any], shared: Mapping[str, Parameter], common: dict[str, Any], folder: Path
) -> tuple[Part, ...]:
    """The parts of a job: each is a job beside it, or of the catalogue, with other defaults. Raises SpecError."""
    found = []
    for name, changed in document.get("parts", {}).items():
        try:
            found.append(_part(_evaluation(name, [folder, CATALOG]), changed, shared, common))
        except SpecError as error:
            raise SpecError(f"part {name!r}: {error}") from None
    tasks = [part.task for part in found]
    for task in tasks:
        if tasks.count(task) > 1:
            raise SpecError(f"two parts have the task {task}: their rows would have the same keys")
    for name in shared:
        if found and not any(name in part.parameters for part in found):
            raise SpecError(f"no part has a parameter {name!r}")
    return tuple(found)


def _evaluation(name: str, folders: Sequence[Path]) -> Job:
    """The job that a part is. One that has parts itself is none, and is not read: it might name itself."""
    for folder in folders:
        path = folder / f"{name}.toml"
        if _NAME.fullmatch(name) and path.is_file():
            if "parts" in _load_toml(path):
                raise SpecError("a part of a job is one evaluation, and this has parts itself")
            job = load(path)
            if job.task is None:
                raise SpecError("a part of a job is an evaluation, and this has no task")
            return job
    raise SpecError(f"there is no such job: {nearest(name, names(folders))}")


def _part(job: Job, changed: Any, shared: Mapping[str, Parameter], common: dict[str, Any]) -> Part:
    """A job as a part, its own defaults changed where the job that it is part of says so."""
    if not isinstance(changed, dict):
        raise SpecError("it must be a table of parameters, which may be empty")
    kept = {name: one for name, one in job.parameters.items() if name not in suites.LEFT_OUT}
    kept["limit"] = _parameter("limit", {}, common)
    for name, value in changed.items():
        if name not in kept:
            raise SpecError(f"unknown parameter {name!r}: {nearest(name, kept)}")
        if name in shared:
            raise SpecError(f"{name!r} is set for all parts")
        kept[name] = replace(kept[name], default=kept[name].check(value))
    return Part(str(job.task), kept, frozenset(shared))


def _check_top(document: dict[str, Any]) -> None:
    """Raise SpecError for a key that is unknown, missing, or of the wrong type."""
    for key in document:
        if key not in _TOP_KEYS:
            raise SpecError(f"unknown key {key!r}: {nearest(key, _TOP_KEYS)}")
    for key in ("name", "summary", "story"):
        if not isinstance(document.get(key), str):
            raise SpecError(f"{key!r} is missing or not text")
    if not _NAME.fullmatch(document["name"]):
        raise SpecError(f"name {document['name']!r} must be small letters, digits and dashes")
    if not isinstance(document.get("task", ""), str):
        raise SpecError("'task' must be text")
    if not isinstance(document.get("frozen", False), bool):
        raise SpecError("'frozen' is true or false")
    if "parts" in document and (not isinstance(document["parts"], dict) or not document["parts"]):
        raise SpecError("'parts' is a table of jobs, at least one: [parts.eval-mmlu]")
    if "parts" in document and (document.get("story") != "evaluate" or "task" in document):
        raise SpecError("'parts' belongs to the story `evaluate`, and then each part has the task")
    for key in ("needs", "out", "command"):
        if not _texts(document.get(key, [])):
            raise SpecError(f"{key!r} must be a list of texts")
    if document["story"] not in STORIES:
        raise SpecError(f"unknown story {document['story']!r}: {nearest(document['story'], STORIES)}")
    if (document["story"] == "command") is not bool(document.get("command")):
        raise SpecError("'command' and the story `command` belong together, and a command has at least one word")
    if document.get("environment", "train") not in ENVIRONMENTS:
        raise SpecError(f"unknown environment: {nearest(str(document['environment']), ENVIRONMENTS)}")
    if not isinstance(document.get("parameters", {}), dict):
        raise SpecError("'parameters' is not a table")


def _parameter(name: str, given: Any, common: dict[str, Any]) -> Parameter:
    """A parameter from its TOML value: a bare value is a common one's default; a table adds to it or defines anew."""
    fields = {**common.get(name, {}), **(given if isinstance(given, dict) else {"default": given})}
    for key in fields:
        if key not in _PARAMETER_KEYS:
            raise SpecError(f"parameter {name!r}: unknown key {key!r}: {nearest(key, _PARAMETER_KEYS)}")
    if fields.get("type") not in TYPES:
        raise SpecError(f"parameter {name!r} needs a type: {', '.join(TYPES)}")
    if not all(isinstance(fields.get(key, 0), (int, float)) for key in ("min", "max")):
        raise SpecError(f"parameter {name!r}: 'min' and 'max' are numbers")
    if not (_texts(fields.get("choices", [])) and _texts(fields.get("words", [])) and _texts([fields.get("help", "")])):
        raise SpecError(f"parameter {name!r}: 'help' is text, 'choices' and 'words' are lists of texts")
    default = fields.pop("default", None)
    for key in ("choices", "words"):
        fields[key] = tuple(fields.get(key, ()))
    parameter = Parameter(**{"name": name, "help": "", **fields})
    return replace(parameter, default=parameter.check(default))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def canonical(document: Any) -> bytes:
    """One way to write a JSON document as bytes, for digests: sorted keys, no spaces, UTF-8."""
    return json.dumps(document, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def digest(document: Any) -> str:
    """What tells one JSON document from another: SHA-256, in hex, of its canonical bytes."""
    return hashlib.sha256(canonical(document)).hexdigest()
