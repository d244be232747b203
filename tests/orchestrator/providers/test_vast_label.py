"""A label at Vast.ai tells what tags tell elsewhere, whole or not at all, and what others wrote is never ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import guarding
from orchestrator.providers import vast_label
from orchestrator.providers.base import marker_of

MARKER = "gpu-20260101t120000-7f3a9c001122"
GUARDS = (*guarding.HOW, *guarding.OF_CLOUDS)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
DEADLINES = st.one_of(st.just("none"), st.integers(0, 10**12 - 1).map(str))


@given(DEADLINES, st.sampled_from(GUARDS), NAMES)
def test_what_a_label_tells_is_what_was_said(deadline: str, guard: str, name: str) -> None:
    """Marker, deadline and guard always come back, and the name whole or not at all, in no more than is kept."""
    tags = {"gpu-deadline": deadline, "gpu-guard": guard, "gpu-name": name}
    label = vast_label.encode(MARKER, tags)
    assert len(label) <= vast_label.LABEL_MAX
    found, told = vast_label.decode(label)
    assert (found, told["gpu-deadline"], told["gpu-guard"]) == (MARKER, deadline, guard)
    assert told.get("gpu-name", name) == name
    assert ("gpu-name" in told) == (len(f"{MARKER}.{deadline}c.{name}") <= vast_label.LABEL_MAX)


def test_a_name_as_long_as_usual_has_room() -> None:
    """Beside a deadline of our time, fifteen signs of a name are told."""
    tags = {"gpu-deadline": "1800007200", "gpu-guard": "container", "gpu-name": "rtx-4090-spot-1"}
    assert vast_label.encode(MARKER, tags) == f"{MARKER}.1800007200c.rtx-4090-spot-1"
    assert vast_label.encode(MARKER, {**tags, "gpu-name": "rtx-4090-spot-12"}) == f"{MARKER}.1800007200c"


@given(DEADLINES, st.sampled_from(GUARDS), NAMES, st.integers(1, 59))
def test_a_label_cut_short_is_no_earlier_deadline(deadline: str, guard: str, name: str, length: int) -> None:
    """Wherever it was cut off, it tells the deadline that was said, or none at all."""
    label = vast_label.encode(MARKER, {"gpu-deadline": deadline, "gpu-guard": guard, "gpu-name": name})
    assert vast_label.decode(label[:length])[1].get("gpu-deadline", deadline) == deadline


@pytest.mark.parametrize(
    "label",
    [
        *(None, 7, "", "theirs", MARKER.upper(), f"{MARKER}x", f"{MARKER} copy", f"x{MARKER}.nonec"),
        *(f"{MARKER}.", f"{MARKER}.box", f"{MARKER}.1800007200", f"{MARKER}.1800007200q", f"{MARKER}.-5c"),
        *(
            f"{MARKER}.1800007200c.",
            f"{MARKER}.1800007200c box",
            f"{MARKER}.1800007200c\n",
            f"{MARKER}.1800007200c.b x",
        ),
        *(f"{MARKER}.١٨٠٠c", f"{MARKER}-1800007200c.box", f"{MARKER}.1800007200C.box"),
    ],
)
def test_what_others_wrote_is_not_ours(label: object) -> None:
    """What is not a label of ours from its first sign to its last has no marker and tells nothing."""
    name, tags = vast_label.decode(label)
    assert (marker_of(name, {}), tags) == (None, {})


def test_a_marker_alone_is_ours() -> None:
    """An instance that bears nothing but a marker is one of ours, of which no deadline is known."""
    name, tags = vast_label.decode(MARKER)
    assert (marker_of(name, {}), tags) == (MARKER, {})
