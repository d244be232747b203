"""The stand-ins as a program, to be tried by hand: `python -m tests.cloud [--light] [--port N]` until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from pathlib import Path

from tests.cloud import Containers, LambdaCloud, Server, SshMachines, VastCloud, announce, catalogue
from tests.cloud.server import as_text


def main() -> None:
    """Serve until a signal comes, then say what everything has cost."""
    words = argparse.ArgumentParser(prog="python -m tests.cloud", description=__doc__)
    words.add_argument("--light", action="store_true", help="no machines behind the instances")
    words.add_argument("--port", type=int, default=0)
    words.add_argument("--recorded", action="store_true", help="Lambda's recorded catalogue, where there is one")
    asked = words.parse_args()
    core, other, port = LambdaCloud(), VastCloud(), 22
    if asked.recorded:
        core.catalogue = catalogue.recorded() or core.catalogue
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with contextlib.ExitStack() as stack:
        if not asked.light:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-cloud-")))
            core.machines = machines = stack.enter_context(SshMachines(folder / "lambda"))
            other.machines = stack.enter_context(Containers(folder / "vast"))
            port = machines.port
        server = stack.enter_context(Server(core, port=asked.port, others=[other]))
        announce(lambda name, value: print(f"export {name}={value}"), server, port)  # noqa: T201
        sys.stdout.flush()
        try:
            signal.pause()
        finally:
            sys.stderr.write(as_text(server.cores) + "\n")


if __name__ == "__main__":
    main()
