"""Where the records of a dataset come from: generated problems, a file, or the Hugging Face Hub."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.failures import BadRecord, ConfigFailure

GENERATED = "generated"
"""The dataset that needs neither file nor network: problems made by `worker.problems`."""

HUB_PINS: dict[str, tuple[str, str | None]] = {
    "openai/gsm8k": ("main", "e53f048856ff4f594e959d75785d2c2d37b678ee"),
    "cais/mmlu": ("all", None),
    "allenai/ai2_arc": ("ARC-Challenge", None),
    "EleutherAI/wikitext_document_level": ("wikitext-2-raw-v1", None),
}
"""Hub datasets with their configuration, and the commit that is read unless another revision is asked for (None: the
newest; should its rows change, so does the fingerprint)."""

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".txt")
_SPLIT_SUFFIX = re.compile(r"_(test|dev|val|validation|train)$")
_FILE_SUFFIX = re.compile(
    r"\.(jsonl|ndjson|json|parquet|csv|tsv|txt|ya?ml|xlsx?|arrow|gz|bz2|xz|zst|zip)$", re.IGNORECASE
)
_WORDS_MAX = 400  # characters of somebody else's error message that are worth showing


@dataclass(frozen=True)
class Source:
    """A dataset as asked for: `generated`, a path, or a Hub name; `revision`: a commit, tag or branch of the Hub's."""

    dataset: str
    split: str = "test"
    revision: str | None = None
    columns: tuple[str, ...] = ()
    """Of a .csv file that has no header: one whose first line holds none of these names."""
    with_choices: bool = False
    """Whether generated problems come with choices, for tasks that weigh them."""


@dataclass(frozen=True)
class Records:
    """The rows of a dataset in their order, at least one, and what they are called in messages.

    The digest (SHA-256) depends on the rows alone: the same rows as JSON lines, Parquet or from the Hub have one
    digest. A null field counts as absent, since Parquet cannot tell the two apart.
    """

    rows: list[dict[str, Any]]
    digest: str
    name: str


def load(source: Source) -> Records:
    """Read every record of a source; raises ConfigFailure (BadRecord where a line or row is to blame).

    Of a file, the split is only a label: it is read whole. A folder has one folder for each split, with a file for
    each subject, which a row then names. Reads the network only for a Hub name.
    """
    if source.dataset == GENERATED:
        from worker import problems

        made = problems.quizzes(source.split) if source.with_choices else problems.records(source.split)
        return _records(made, f"the generated problems ({source.split})")
    if is_path(source.dataset):
        path = Path(source.dataset).expanduser()
        if has_split(source.dataset, source.split):
            return _records(_read_folder(path / source.split, source), f"{source.dataset} ({source.split})")
        return _records(_read_file(path, source.dataset, source.columns), source.dataset)
    return _records(_read_hub(source), f"{source.dataset} ({source.split})")


def is_path(dataset: str) -> bool:
    """Whether a dataset is meant as a path: it exists, or could not be a Hub name (`owner/name`, no file suffix)."""
    return (
        dataset.startswith(("/", ".", "~"))
        or "\\" in dataset
        or dataset.count("/") > 1
        or dataset.endswith("/")
        or _FILE_SUFFIX.search(dataset) is not None
        or Path(dataset).exists()
    )


def has_split(dataset: str, split: str) -> bool:
    """Whether a dataset is a folder here that has a folder of that split."""
    return bool(split) and (Path(dataset).expanduser() / split).is_dir()


def _records(rows: list[Any], name: str) -> Records:
    """The rows with their digest; every row is an object with text that UTF-8 can hold."""
    if not rows:
        raise ConfigFailure(f"The dataset {name} has no rows.")
    digest = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadRecord(f"{name}, row {number}: {_kind(row)}, not an object with named fields.")
        try:
            digest.update(json.dumps(_without_nulls(row), ensure_ascii=False, sort_keys=True, default=_plain).encode())
        except UnicodeEncodeError as error:
            raise BadRecord(f"{name}, row {number}: half of a surrogate pair, which is no character.") from error
        except TypeError as error:
            raise BadRecord(f"{name}, row {number}: {error}.") from error
        digest.update(b"\n")
    return Records(rows, digest.hexdigest(), name)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(held) for key, held in value.items() if held is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(held) for held in value]
    return value


def _plain(value: Any) -> str:
    """What Parquet has and JSON lacks, as text; TypeError for what has no text of its own, such as an image."""
    if isinstance(value, (bytes, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(f"a field holds a {type(value).__name__}, which is neither text nor number")


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


# --- files -----------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, source: Source) -> list[Any]:
    """The rows of every file of a split, by name; `anatomy_test.csv` holds the subject anatomy."""
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(_SUFFIXES))
    return [row for path in files for row in _read_file(path, f"{source.dataset}/{path.name}", source.columns)]


def _read_file(path: Path, name: str, columns: tuple[str, ...]) -> list[Any]:
    if not path.exists():
        raise ConfigFailure(
            f"The dataset file {name} does not exist.",
            "Check the path; a run on another machine carries it with --need PATH.",
        )
    if path.is_dir():
        found = sorted(one.name for one in path.iterdir() if one.is_dir() or one.name.lower().endswith(_SUFFIXES))
        raise ConfigFailure(
            f"The dataset {name} is a folder, not a file, and has no folder of the split that is asked for.",
            f"Name one of its files or splits: {', '.join(found[:5])}." if found else "",
        )
    suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ConfigFailure(
            f"The dataset file {name} has a suffix that says nothing of its form.",
            f"Known are {', '.join(_SUFFIXES)}.",
        )
    if suffix == ".parquet":
        return _read_parquet(path, name)
    text = _text(_bytes(path, name, zipped=suffix.endswith(".gz")), name)
    if suffix == ".txt":
        return [{"text": text}]
    if suffix == ".csv":
        return _table(text, name, columns, _SPLIT_SUFFIX.sub("", path.stem))
    return _json_lines(text, name) if suffix.startswith(".jsonl") else _json_document(text, name)


def _table(text: str, name: str, columns: tuple[str, ...], subject: str) -> list[Any]:
    """A row for each line of a CSV file, with the subject that the file's name tells where no column does."""
    lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    if not columns or set(columns) & set(lines[0]):
        columns, lines = tuple(lines[0]), lines[1:]
    for number, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise BadRecord(
                f"{name}, row {number}: {len(line)} columns, not {len(columns)} ({', '.join(columns)}).",
                "Put texts that hold a comma or a newline in quotes.",
            )
    return [{"subject": subject, **dict(zip(columns, line, strict=True))} for line in lines]


def _bytes(path: Path, name: str, *, zipped: bool) -> bytes:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if zipped else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # BadGzipFile is an OSError: this comes first
        raise ConfigFailure(
            f"The dataset file {name} cannot be unzipped: {error or 'it ends too early'}.",
            "It may have been cut off on the way: copy it again, and check with gzip -t.",
        ) from error
    except OSError as error:
        raise ConfigFailure(f"The dataset file {name} cannot be read: {error.strerror or error}.") from error
    if not data.strip():
        raise ConfigFailure(f"The dataset file {name} is empty.")
    return data


def _text(data: bytes, name: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise BadRecord(
            f"{name}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8.",
            f"Convert the file: iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8 (if that is what it is in).",
        ) from error


def _json_lines(text: str, name: str) -> list[Any]:
    """One value a line; empty lines are passed over. Only a newline ends a line, whatever else Unicode has for it."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            whole = line.lstrip().startswith("[") or line.strip() == "{"
            hint = "If the file is one JSON value over many lines, name it .json." if number == 1 and whole else ""
            raise BadRecord(f"{name}, line {number}: not JSON: {error}.", hint) from error
        if not isinstance(row, dict):
            raise BadRecord(f"{name}, line {number}: {_kind(row)}, not an object with named fields.")
        rows.append(row)
    return rows


def _json_document(text: str, name: str) -> list[Any]:
    """A list, or an object that holds exactly one list."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        many = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        hint = "If the file has one object a line, name it .jsonl." if many else ""
        raise BadRecord(f"{name}: not JSON: {error}.", hint) from error
    if isinstance(document, list):
        return document
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    if len(lists) != 1:
        found = "no list" if not lists else f"{len(lists)} lists"
        raise ConfigFailure(
            f"The dataset file {name} must hold a list of objects, or one under one key; it has {found}."
        )
    return lists[0]


def _read_parquet(path: Path, name: str) -> list[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigFailure(
            f"The dataset file {name} is Parquet, and pyarrow, which reads it, is not installed here.",
            "Install pyarrow, or save the dataset as .jsonl.",
        ) from error
    try:
        rows: list[Any] = parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigFailure(f"The dataset file {name} cannot be read as Parquet: {_first_words(error)}") from error
    return rows


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _read_hub(source: Source) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigFailure(
            f"The dataset {source.dataset} is no file here, and the Hub cannot be asked: datasets is not installed.",
            "Give a file (.jsonl), or install datasets.",
        ) from error
    configuration, pinned = HUB_PINS.get(source.dataset, (None, None))
    try:
        found = datasets.load_dataset(
            source.dataset, configuration, split=source.split, revision=source.revision or pinned
        )
        return list(found)
    except Exception as error:  # not ours: the Hub's clients raise a dozen kinds, and others in each version
        raise _hub_failure(source, error) from error


def _hub_failure(source: Source, error: Exception) -> ConfigFailure:
    """What went wrong with the Hub, told by the words of `datasets` (5.2) rather than by its classes."""
    words = _first_words(error)
    kind = type(error).__name__
    if "gated" in words:
        said = "is gated: the Hub gives it only to accounts that accepted its terms"
        hint = f"Accept them at https://huggingface.co/datasets/{source.dataset} and set HF_TOKEN."
    elif "Revision" in words:
        said, hint = (
            f"has no revision {source.revision!r} on the Hub",
            "Leave revision out, or name an existing commit.",
        )
    elif kind == "DatasetNotFoundError":
        said = "was not found: no such file here, and none of that name on the Hub (or it is private)"
        hint = "Check the spelling; a private dataset needs HF_TOKEN."
    elif isinstance(error, ConnectionError) or "connection" in words.lower():
        offline = "OfflineModeIsEnabled" in words
        said = "could not be fetched: " + ("HF_HUB_OFFLINE forbids it" if offline else "the Hub cannot be reached")
        hint = "Give a file (.jsonl) or dataset=generated, or run where the Hub can be reached."
    else:
        said, hint = (
            f"could not be loaded from the Hub ({kind}): {words}",
            "Check the name, the split and the revision.",
        )
    return ConfigFailure(f"The dataset {source.dataset} {said}.", hint)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:_WORDS_MAX].rstrip(".")
