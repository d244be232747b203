"""What of ours a stranger's host sees when several containers share a run and one is outbid: no key, and no token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import fleet, machines, runs, tenancy
from orchestrator.providers.base import Need
from orchestrator.rentals import Caps
from orchestrator.renting import Wish
from tests.cloud import Timings, Vast
from tests.journeys import sharers
from tests.journeys.sharers import rented, started
from tests.waiting import until

TOKEN = "hf_canary0123456789"


@pytest.fixture
def quick(vast_cloud: Vast, monkeypatch: pytest.MonkeyPatch) -> Vast:
    """A stand-in whose containers start at once, and a token that jobs are given."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    vast_cloud.core.timings = Timings(boot_s=0.2, ip_delay_s=0.05, sshd_delay_s=0.05, term_s=0.1)
    return vast_cloud


def seen(cloud: Vast, hosts: Path, run: runs.Run) -> list[str]:
    """Where a secret of ours stands: files and logs of hosts, words of processes, orders, our own records."""
    own = [machines.folder(rental.name) / "key" for rental in fleet.live(run)]
    keys = [path.read_text().splitlines()[3].encode() for path in own if path.exists()]
    secrets = [cloud.key.encode(), TOKEN.encode(), *keys]
    there = [path for path in hosts.rglob("*") if path.is_file() and not path.is_symlink()]
    words = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    at_home = [path for path in run.home.folder.rglob("*") if path.is_file()]
    found = [str(path) for path in (*there, *words, *at_home) if _has(path, secrets)]
    sent = [*(json.dumps(one.order) for one in cloud.core.ours()), *map(str, cloud.core.calls)]
    return found + [text[:80] for text in sent if any(secret.decode() in text for secret in secrets)]


def _has(path: Path, secrets: list[bytes]) -> bool:
    try:
        content = path.read_bytes()
    except OSError:  # it has ended, or is gone
        return False
    return any(secret in content for secret in secrets)


def is_given(hosts: Path) -> bool:
    """Whether a process of a worker has the token: by its environment alone."""
    return any(_has(path, [TOKEN.encode()]) for path in Path("/proc").glob("[0-9]*/environ") if _is_of(path, hosts))


def _is_of(path: Path, hosts: Path) -> bool:
    return _has(path, [str(hosts).encode()])


@pytest.mark.slow
def test_no_secret_reaches_a_host_of_a_shared_run_or_a_new_bid(quick: Vast, tmp_path: Path) -> None:
    """Two containers on bids, one outbid and replaced: at no moment does a host's file, log or process tell one."""
    run, hosts = rented(2, Caps(budget_usd=3.0), 120, pace_s=0.2), tmp_path / "vast"
    wish = Wish(Need(gpu="RTX 4090", count=1, spot=True), Caps(budget_usd=3.0), "vast")
    run.save(rents=tenancy.document(wish))
    command = started("resume", run.run_id)
    until(lambda: sum(share.record.rows_home >= 3 for share in runs.shares(runs.find(run.run_id))) == 2, 90)
    assert is_given(hosts)
    assert seen(quick, hosts, run) == []
    quick.core.outbid(quick.core.ours()[0].instance_id)
    until(lambda: len(quick.core.ours()) == 3 and len(runs.shares(runs.find(run.run_id))) == 3, 90)
    until(lambda: runs.shares(runs.find(run.run_id))[-1].record.rows_home >= 1, 90)
    assert seen(quick, hosts, run) == []
    Path("calm").touch()
    _, said = command.communicate(timeout=110)
    assert command.returncode == 0, said
    assert TOKEN not in said
    sharers.assert_whole(run, 120)
    assert seen(quick, hosts, run) == []
    assert quick.core.still_billing() == []
