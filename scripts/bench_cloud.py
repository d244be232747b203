"""Renting at a stand-in cloud: offers beside the provider's own answer, and from `active` to a worker that runs."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from figures import Figure, show

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.cloud import LambdaCloud, Server, SshMachines, Timings, VastCloud  # noqa: E402
from tests.cloud.answers import Answer  # noqa: E402

GPU = [sys.executable, "-m", "orchestrator.cli"]
ROUNDS = 3
PACE_S = 1.1
"""Between two commands that ask the cloud: it allows one request a second, and waiting for that is not ours."""


FAST_S, SLOW_S = 0.4, 1.5
"""What two clouds take for an answer."""


class SlowLambda(LambdaCloud):
    """A stand-in whose answers take time."""

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """As without, but later."""
        time.sleep(FAST_S)
        return super().handle(method, path, headers, body)


class SlowVast(VastCloud):
    """A stand-in whose answers take more time."""

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """As without, but much later."""
        time.sleep(SLOW_S)
        return super().handle(method, path, headers, body)


def main() -> Iterator[Figure | str]:
    """Every figure of this part."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-cloud-", dir=ROOT / "build") as scratch, contextlib.chdir(scratch):
        subprocess.run(["git", "init", "-q"], check=True)  # a project of its own
        core = LambdaCloud(timings=Timings(boot_s=5.0))
        with SshMachines(Path(scratch) / "cloud") as machines, Server(core) as server:
            core.machines = machines
            os.environ.update(GPU_HOME=str(Path(scratch) / "state"), PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
            os.environ.update(GPU_LAMBDA_URL=server.url, LAMBDA_API_KEY=core.key)
            os.environ["GPU_LAMBDA_SSH_PORT"] = str(machines.port)
            yield from offers(server.url, core.key)
            yield from runs(core)
        yield from both()


def offers(url: str, key: str) -> Iterator[Figure]:
    """`gpu offers`, beside the provider's own answer."""
    asked = urllib.request.Request(f"{url}/api/v1/instance-types", headers={"Authorization": f"Bearer {key}"})  # noqa: S310

    def raw() -> None:
        with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310 -- our own server
            answer.read()

    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(timed(raw))
        time.sleep(PACE_S)
        ours.append(timed(lambda: subprocess.run([*GPU, "offers", "--json"], check=True, stdout=subprocess.DEVNULL)))
        time.sleep(PACE_S)
    start = min(timed(lambda: subprocess.run([*GPU, "--version"], check=True, stdout=subprocess.DEVNULL)) for _ in ours)
    words = f"the answer itself {statistics.median(theirs):.3f} s; gpu --version {start:.2f} s"
    yield Figure(
        "gpu offers, beyond the answer", statistics.median(ours) - statistics.median(theirs), "s", words, at_most=0.3
    )


def both() -> Iterator[Figure]:
    """`gpu offers` over two clouds that take their time: they are asked side by side."""
    one, other = SlowLambda(), SlowVast()
    with Server(one, others=[other]):
        os.environ.update(GPU_LAMBDA_URL=one.url, LAMBDA_API_KEY=one.key)
        os.environ.update(GPU_VAST_URL=other.url, VAST_API_KEY=other.key)
        said: list[bytes] = []

        def ours() -> None:
            words = [*GPU, "offers", "--gpu", "A100", "--json"]
            said.append(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)

        spans = [timed(ours) for _ in range(ROUNDS)]
        for document in said:
            assert {offer["provider"] for offer in json.loads(document)} == {"lambda", "vast"}
    words = f"one answers after {FAST_S} s, the other after {SLOW_S} s"
    name = "gpu offers over two clouds, beyond the slower"
    yield Figure(name, statistics.median(spans) - SLOW_S, "s", words, at_most=0.3)


def runs(core: LambdaCloud) -> Iterator[Figure]:
    """From the moment that the provider calls the machine active until its worker runs a command."""
    Path("began.py").write_text("import time\nprint(time.time(), file=open('began.txt', 'w'))\n")
    spans = []
    for _ in range(ROUNDS):
        words = ["run", "--gpu", "A10", "--terminate", "-y", "-q", "--environment", "none", "--out", "began.txt"]
        subprocess.run([*GPU, *words, "--", sys.executable, "began.py"], check=True, stdout=subprocess.DEVNULL)
        newest = max(Path("results").glob("*/out/began.txt"), key=lambda path: path.stat().st_mtime)
        bill = core.bills()[-1]
        spans.append(float(newest.read_text()) - (bill.began + core.timings.boot_s))
    words = f"median {statistics.median(spans):.1f} s; slowest of {ROUNDS}; the cloud is asked once in a second"
    yield Figure("from active to the worker that runs", max(spans), "s", words, at_most=15)


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    sys.exit(show(main()))
