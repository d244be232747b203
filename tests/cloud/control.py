"""What a test tells the stand-in over HTTP, `POST /__control`, and what it says of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.cloud.answers import Failure, Json
from tests.cloud.faults import Fault
from tests.cloud.lambda_cloud import LambdaCloud

PATH = "/__control"
_KNOBS = ("quota", "enforces_rates", "unknown_status")


def apply(cloud: LambdaCloud, asked: Json) -> Json:
    """Do what is asked, and return what there is; Failure that names what is not understood, nothing done then.

    `faults`: a list of the fields of `Fault`; `clear`: true; `timings`: fields of `Timings`; `capacity`: regions by
    type; `foreign`: a list of names of other people's instances; `quota`, `enforces_rates`, `unknown_status`.
    """
    try:
        faults = [Fault(**fields) for fields in asked.get("faults", [])]
        timings = dataclasses.replace(cloud.timings, **asked.get("timings", {}))
    except (TypeError, ValueError) as error:
        raise Failure("global/invalid-parameters", str(error)) from None
    if unknown := set(asked) - {"faults", "clear", "timings", "capacity", "foreign", *_KNOBS}:
        raise Failure("global/invalid-parameters", f"unknown: {', '.join(sorted(unknown))}")
    if asked.get("clear"):
        cloud.faults.clear()
    for fault in faults:
        cloud.faults.add(fault)
    cloud.timings = timings
    cloud.catalogue.capacity.update(asked.get("capacity", {}))
    for name in asked.get("foreign", []):
        cloud.add_foreign(name)
    for knob in _KNOBS:
        if knob in asked:
            setattr(cloud, knob, asked[knob])
    return report(cloud)


def report(cloud: LambdaCloud) -> Json:
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
