"""The curves of a training as TensorBoard reads them, written where its package is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs import rows

_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "epoch": "train/epoch",
    "tokens_per_second": "train/tokens_per_second",
    "targets_per_second": "train/targets_per_second",
    "memory_bytes": "train/memory_bytes",
    "eval_loss": "eval/loss",
}
Draw = Callable[[rows.Row], None]


@contextlib.contextmanager
def drawing(path: Path, first_step: int) -> Iterator[Draw]:
    """What a step's line is given to, to be drawn in the file `path`; without the package nothing is written.

    The file says that it begins with `first_step`, so that TensorBoard forgets what files before it have of that step
    and later ones: no curve is there twice after a resume.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield lambda _: None
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("xb") as file:
        out = RecordWriter(file)

        def write(**what: Any) -> None:
            out.write(Event(wall_time=time.time(), **what).SerializeToString())
            file.flush()

        write(file_version="brain.Event:2")
        write(step=first_step, session_log=SessionLog(status=SessionLog.START))
        yield lambda line: write(step=line["step"], summary=_scalars(line))


def _scalars(line: rows.Row) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    known = {tag: line.get(name) for name, tag in _TAGS.items()}
    return Summary(
        value=[
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in known.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
    )
