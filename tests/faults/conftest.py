"""Where the storms of commands make their worlds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.money_world import Stage

_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Where worlds are made: in memory where there is such a disk, since each run writes hundreds of files."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-storm-", dir=_MEMORY if _MEMORY.is_dir() else None))
    with Stage(folder).set() as made:
        yield made
    shutil.rmtree(folder)
