"""The rows of all shares of a run in the run's one rows.jsonl, and what its first machine resolved for all others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs import durable, rows, rundir
from orchestrator import runs
from orchestrator.home import Arrivals
from orchestrator.runs import Run

_BATCH_ROWS = 10_000


class Gathering:
    """The one writer of what is common to a run's shares; holds the run's lock. Its methods may be called by threads.

    A share's rows are durable in the share's own folder first: dying anywhere is mended by taking them in again.
    """

    def __init__(self, run: Run, arrivals: Arrivals) -> None:
        self.run = run
        self.arrivals = arrivals
        self.mutex = threading.RLock()
        self._offsets: dict[Path, int] = {}
        self._fingerprint = _fingerprint(run.home.shared)
        for copy in run.home.copies():
            self.resolve(copy)
        for share in runs.shares(run):
            self.take_in(share)

    @classmethod
    def open(cls, run: Run) -> Gathering | None:
        """Take the run's lock and merge what is home already; None while another process of ours follows the run."""
        arrivals = Arrivals.open(run.home, run.record.machine)
        if arrivals is None:
            return None
        try:
            run.reload()
            return cls(run, arrivals)
        except BaseException:
            arrivals.close()
            raise

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.mutex:
            self.arrivals.close()

    @property
    def rows_home(self) -> int:
        """How many keys have a good row in the run's rows.jsonl."""
        return self.arrivals.rows.good

    @property
    def is_resolved(self) -> bool:
        """Whether it is settled here what every machine starts with."""
        return self._fingerprint is not None

    def resolve(self, copy: rundir.Run) -> bool:
        """Let what a machine resolved be that of the run, unless there is one; whether it is this run's now.

        Not before the weights that it names are home, too. What another machine resolved otherwise changes nothing.
        """
        with self.mutex:
            if self._fingerprint is None and _is_whole(copy):
                _keep(copy, self.run.home.shared)
                self._fingerprint = _fingerprint(self.run.home.shared)
            is_ours = self._fingerprint is not None and _fingerprint(copy) == self._fingerprint
            examples = self.run.home.shared.examples
            if is_ours and not examples.exists() and ids_in(copy) is not None:
                durable.replace_whole(examples, copy.examples.read_bytes())
            return is_ours

    def example_ids(self) -> list[str] | None:
        """All examples of the run in their order; None while that is not known here."""
        return ids_in(self.run.home.shared)

    def take_in(self, share: Run) -> bytes:
        """Merge what is home of a share and was not looked at yet; returns the rows that were news.

        Of one that began before it was known what the run's first machine had resolved, only once it is the same.
        """
        with self.mutex:
            if share.record.leads and not any(self.resolve(copy) for copy in share.home.copies()):
                return b""
            for batch in self._fresh(share.home.selections):
                self.arrivals.take_selections(batch)
            for batch in self._fresh(share.home.noise):
                self.arrivals.take_noise(batch)
            return b"".join(self.arrivals.take_rows(batch) for batch in self._fresh(share.home.rows))

    def _fresh(self, path: Path) -> Iterator[list[bytes]]:
        """The whole lines of a file that only grows and were not given before, in batches."""
        batch: list[bytes] = []
        end = self._offsets.get(path, 0)
        for offset, line in rows.whole_lines(path, end):
            batch.append(line)
            end = offset + len(line) + 1
            if len(batch) >= _BATCH_ROWS:
                yield batch
                self._offsets[path], batch = end, []
        if batch:
            yield batch
        self._offsets[path] = end


def _fingerprint(copy: rundir.Run) -> Any:
    """What a machine's resolved.json has for a fingerprint; None without one."""
    return durable.load_news(copy.resolved).get("fingerprint")


def ids_in(copy: rundir.Run) -> list[str] | None:
    """The ids a machine's examples.json lists; None for what is no list of texts, each once."""
    ids = durable.load_news(copy.examples).get("ids")
    is_list = isinstance(ids, list) and all(isinstance(name, str) for name in ids) and len(set(ids)) == len(ids)
    return ids if is_list else None


def _is_whole(copy: rundir.Run) -> bool:
    """Whether all that a machine resolved is home: the document, and the weights that it names."""
    if _fingerprint(copy) is None:
        return False
    wanted = durable.load_news(copy.resolved).get("weights", [])
    return isinstance(wanted, list) and set(map(str, wanted)) <= {folder.name for folder in copy.folders()}


def _keep(copy: rundir.Run, shared: rundir.Run) -> None:
    """Copy what a machine resolved to where all shares take it from, the document last: then all of it is there."""
    for folder in copy.folders():
        durable.have_folder(shared.folder / folder.name)
        for path in rundir.weights(folder):
            durable.replace_whole(shared.folder / folder.name / path.name, path.read_bytes())
    durable.have_folder(shared.folder)
    durable.replace_whole(shared.resolved, copy.resolved.read_bytes())
