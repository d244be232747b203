"""Where a run is copied to and where it comes home, for the tests of mirrors."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import durable, rundir
from tests.worker.guarding import RUN


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """An empty mirror."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    return folder


@pytest.fixture
def home(tmp_path: Path) -> rundir.Home:
    """The run at home, with nothing in it yet."""
    durable.have_folder(tmp_path / "results" / RUN)
    return rundir.Home(tmp_path / "results" / RUN)
