"""Cores of the stand-ins on a clock that stands still."""

from __future__ import annotations

import json

import pytest

from tests.cloud import Clock, LambdaCloud
from tests.cloud.asking import PUBLIC_KEY
from tests.cloud.vast_cloud import VastCloud


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def core(clock: Clock) -> LambdaCloud:
    made = LambdaCloud(clock)
    made.account.add_key(json.dumps({"name": "mine", "public_key": PUBLIC_KEY}).encode())
    return made


@pytest.fixture
def vast(clock: Clock) -> VastCloud:
    made = VastCloud(clock)
    made.keys.add(PUBLIC_KEY)
    return made
