"""Fields and ids of a dataset's records, with words for what is wrong with them; rows are counted from 1."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker.failures import BadRecord
from worker.tasks import Example

ID_DIGITS = 12
"""Of an id made from content: 48 bits; over 10,000 rows, two share one with a chance of 2 in 10 million."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True)
class Record:
    """One record, the number of its row, and what rows of its dataset hold, in words."""

    fields: Mapping[str, Any]
    row: int
    holds: str

    def get(self, name: str) -> Any:
        """The value of a field; BadRecord when it is absent or null."""
        if self.fields.get(name) is None:
            raise BadRecord(
                f"row {self.row} has no field {name!r}; it has: {', '.join(map(str, self.fields)) or 'nothing'}",
                self.holds,
            )
        return self.fields[name]

    def text(self, name: str, *, empty: bool = False) -> str:
        """The text of a field; BadRecord when it is none, or is blank and may not be."""
        value = self.get(name) if not empty else self.fields.get(name) or ""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise BadRecord(
                f"row {self.row}: the field {name!r} must be a text{'' if empty else ' that is not empty'}", self.holds
            )
        return value

    def label(self, name: str) -> str | None:
        """The value of a field as text; None where there is none."""
        value = self.fields.get(name)
        return None if value is None else str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """At least two texts of a field, none of them empty."""
        return self.checked(name, self.get(name))

    def checked(self, name: str, values: Any) -> tuple[str, ...]:
        """The values as choices: at least two texts, none of them empty."""
        if not isinstance(values, (list, tuple)) or len(values) < 2:
            raise BadRecord(f"row {self.row}: the field {name!r} must be a list of two choices or more", self.holds)
        if not all(isinstance(value, str) and value for value in values):
            raise BadRecord(f"row {self.row}: the field {name!r} must hold texts that are not empty", self.holds)
        return tuple(values)

    def number(self, name: str, of: int) -> int:
        """A field that says which of so many choices is right, counted from 0; digits may stand as text."""
        value = self.get(name)
        found = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < of:
            raise BadRecord(
                f"row {self.row}: the field {name!r} is {value!r}, but the choices are 0 to {of - 1}", self.holds
            )
        return found


@dataclass
class Ids:
    """Gives each record its id: its own where it has one, else one made from its content, which no filter changes."""

    rows: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def take(self, record: Record, content: Any) -> str:
        """The id of a record; the second with the same content gets `-2`, and so on. BadRecord for an id twice."""
        given = record.fields.get("id")
        name = self._made(content) if given is None else _checked(given, record)
        if name in self.rows:
            raise BadRecord(
                f"row {record.row} has the same id as row {self.rows[name]}: {name!r}", "Give every row its own id."
            )
        self.rows[name] = record.row
        return name

    def _made(self, content: Any) -> str:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]
        self.times[name] = self.times.get(name, 0) + 1
        return name if self.times[name] == 1 else f"{name}-{self.times[name]}"


def read(records: Sequence[Mapping[str, Any]], holds: str, example: Callable[[Record, Ids], Example]) -> list[Example]:
    """What `example` makes of every record, in order; raises BadRecord naming the row and what it lacks."""
    ids = Ids()
    return [example(Record(record, row, holds), ids) for row, record in enumerate(records, start=1)]


def _checked(given: Any, record: Record) -> str:
    name = str(given)
    if isinstance(given, bool) or not isinstance(given, (str, int)) or not _ID.fullmatch(name):
        raise BadRecord(
            f"row {record.row}: the id {name[:120]!r} cannot be used",
            "An id is 1 to 100 letters, digits, dots, dashes or underscores; without the field, ids are made.",
        )
    return name
