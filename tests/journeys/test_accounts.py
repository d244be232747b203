"""A machine is looked for in the account it was rented in: another account's silence says nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import rentals
from tests.cloud import Cloud, LambdaCloud, Server, Timings
from tests.journeys.hurried import document, gpu

A10 = ("launch", "--gpu", "A10", "-y", "--no-wait")
CONFIG, COSTS = 3, 20
SHORT = {"outcome.SETTLED_S": 0.1, "outcome._NOTHING_AFTER_S": 0.1, "returning._PATIENCE_S": 1.0}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own is touched."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def quick(light_cloud: Cloud) -> Cloud:
    """A stand-in without machines, where everything happens at once."""
    light_cloud.core.timings = Timings(0.05, 0.1, 0.0, 0.0, term_s=0.1)
    return light_cloud


@pytest.fixture
def other() -> Iterator[Server]:
    """A stand-in that is another account, with a key of its own."""
    core = LambdaCloud()
    core.key = "secret_other_0123456789abcdef"
    with Server(core) as server:
        yield server


def billing(cloud: Cloud) -> list[str]:
    return [instance.instance_id for instance in cloud.core.still_billing()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("booting", ("terminate", "a10", "-y", "--discard")),
        ("launching", ("terminate", "a10", "-y")),
        ("launching", ("audit", "--fix", "-y")),
        ("stopping", ("audit", "--fix", "-y")),
    ],
)
def test_another_accounts_key_makes_no_machine_gone(
    quick: Cloud, other: Server, monkeypatch: pytest.MonkeyPatch, state: str, words: tuple[str, ...]
) -> None:
    """With the key of another account, where nothing is known of it, a machine is neither gone nor asked for anew."""
    assert gpu(*A10).returncode == 0
    mine, rental = quick.url, rentals.find("a10")
    assert rental is not None
    rental.save(state=state, raw_state="active", **({"instance_id": None} if state == "launching" else {}))
    monkeypatch.setenv("GPU_LAMBDA_URL", other.url)
    monkeypatch.setenv("LAMBDA_API_KEY", other.core.key)
    done = gpu(*words, waits=SHORT)
    assert done.returncode == COSTS, done.stderr
    assert "rented with another account key" in done.stderr
    assert gpu("wait", "a10", waits=SHORT).returncode in (CONFIG, COSTS)
    assert other.core.ours() == []
    assert [entry["open"] for entry in document("cost")["machines"]] == [True]
    monkeypatch.setenv("GPU_LAMBDA_URL", mine)
    monkeypatch.setenv("LAMBDA_API_KEY", quick.key)
    assert gpu("terminate", "a10", "-y").returncode == 0
    assert billing(quick) == []
    assert [entry["open"] for entry in document("cost")["machines"]] == [False]


def test_a_new_key_of_the_same_account_will_do(quick: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was replaced by another one of its account shows what it left there, and ends the machine."""
    assert gpu(*A10).returncode == 0
    quick.core.key = "secret_new_0123456789abcdef"
    monkeypatch.setenv("LAMBDA_API_KEY", quick.core.key)
    assert gpu("terminate", "a10", "-y").returncode == 0
    assert billing(quick) == []


def test_gone_on_the_dashboard_by_a_new_key(quick: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended by hand meanwhile: the public key that the launch left in the account shows that it is the same one."""
    assert gpu(*A10).returncode == 0
    (instance,) = quick.core.ours()
    rental = rentals.find("a10")
    assert rental is not None
    rental.save(raw_state="active")
    del quick.core.instances[instance.instance_id]
    quick.core.key = "secret_new_0123456789abcdef"
    monkeypatch.setenv("LAMBDA_API_KEY", quick.core.key)
    assert gpu("terminate", "a10", "-y").returncode == 0
    assert quick.core.account.keys == {}
