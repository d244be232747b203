"""What a test tells the stand-in over HTTP, `POST /__control`, and what it says of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.cloud.answers import Failure, Json
from tests.cloud.core import Core
from tests.cloud.faults import Fault

PATH = "/__control"


def apply(cloud: Core, asked: Json) -> Json:
    """Do what is asked, and return what there is; Failure that names what is not understood, nothing done then.

    `faults`: a list of the fields of `Fault`; `clear`: true; `timings`: fields of `Timings`; `foreign`: a list of
    names of other people's instances; the knobs of the cloud (`Core.knobs`), and what it can be asked to do
    (`Core.acts`).
    """
    try:
        faults = [Fault(**fields) for fields in asked.get("faults", [])]
        if alien := [fault.what for fault in faults if fault.what not in cloud.faults.kinds]:
            raise ValueError(f"this cloud has no fault {alien[0]!r}")
        timings = dataclasses.replace(cloud.timings, **asked.get("timings", {}))
    except (TypeError, ValueError) as error:
        raise Failure("global/invalid-parameters", str(error)) from None
    known = {"faults", "clear", "timings", "foreign", *cloud.knobs, *cloud.acts}
    if unknown := set(asked) - known:
        raise Failure("global/invalid-parameters", f"unknown: {', '.join(sorted(unknown))}")
    if asked.get("clear"):
        cloud.faults.clear()
    for fault in faults:
        cloud.faults.add(fault)
    cloud.timings = timings
    for name in asked.get("foreign", []):
        cloud.add_foreign(name)
    for word in cloud.acts:
        if word in asked:
            cloud.act(word, asked[word])
    for knob in cloud.knobs:
        if knob in asked:
            setattr(cloud, knob, asked[knob])
    return report(cloud)


def report(cloud: Core) -> Json:
    """What is set and what it has cost."""
    return {
        "still_billing": [one.instance_id for one in cloud.still_billing()],
        "per_name": {str(name): count for name, count in cloud.per_name().items()},
        "bills": [_bill(bill) for bill in cloud.bills()],
        "cents": float(cloud.cents()),
        "faults": [dataclasses.asdict(fault) for fault in cloud.faults.all],
        "timings": dataclasses.asdict(cloud.timings),
        "touched_foreign": cloud.touched_foreign,
        "calls": len(cloud.calls),
    }


def _bill(bill: Any) -> Json:
    return {**dataclasses.asdict(bill), "cents": float(bill.cents)}
