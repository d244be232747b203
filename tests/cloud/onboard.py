"""Programs on a stand-in machine's PATH, run there by path: what a cloud's image has and no test may really do."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRIVER, CUDA = "570.148.08", "12.8"
_FOREVER_S = 3600.0


def say(*lines: str) -> None:
    """Print lines."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def refuse(text: str, code: int = 1) -> int:
    """Complain; returns the exit code."""
    sys.stderr.write(f"{text}\n")
    return code


# --- the GPUs --------------------------------------------------------------------------------------------------------


def nvidia_smi(folder: Path, words: list[str]) -> int:
    """What the driver knows of the GPUs: a list, a query, or a table for people."""
    gpus = json.loads((folder / "gpus.json").read_text())
    if gpus["mode"] == "fails":
        say("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
        return 9
    if gpus["mode"] == "hangs":
        wait(gpus["seconds"])
    chosen = [word.partition("=")[2] for word in words if word.startswith(("--id=", "-i="))]
    rows = [_gpu(gpus, index) for index in range(gpus["count"]) if not chosen or str(index) in chosen[0].split(",")]
    if "-L" in words or "--list-gpus" in words:
        say(*(f"GPU {row['index']}: {row['name']} (UUID: {row['uuid']})" for row in rows))
        return 0
    for word in words:
        name, _, fields = word.partition("=")
        if name in ("--query-gpu", "--query-compute-apps"):
            return _query(rows if name == "--query-gpu" else [], fields.split(","), words)
    _table(rows, gpus.get("driver", DRIVER), gpus.get("cuda", CUDA))
    return 0


def _gpu(gpus: dict[str, Any], index: int) -> dict[str, str]:
    total = gpus["memory_mib"]
    return {
        "index": str(index),
        "name": gpus["name"],
        "gpu_name": gpus["name"],
        "uuid": f"GPU-{gpus['seed'][:8]}-0000-4000-8000-{index:012x}",
        "gpu_uuid": f"GPU-{gpus['seed'][:8]}-0000-4000-8000-{index:012x}",
        "count": str(gpus["count"]),
        "driver_version": gpus.get("driver", DRIVER),
        "compute_cap": gpus["compute_cap"],
        "memory.total": f"{total} MiB",
        "memory.used": "0 MiB",
        "memory.free": f"{total} MiB",
        "utilization.gpu": "0 %",
        "utilization.memory": "0 %",
        "temperature.gpu": "31",
        "power.draw": "52.10 W",
        "pci.bus_id": f"00000000:{index + 7:02X}:00.0",
        "mig.mode.current": "[N/A]",
        "ecc.errors.uncorrected.volatile.total": "0",
    }


def _query(rows: list[dict[str, str]], fields: list[str], words: list[str]) -> int:
    """One line for each row, as `--format=csv[,noheader][,nounits]` has it; exit code 2 for a field nobody knows."""
    shape = next((word.partition("=")[2] for word in words if word.startswith("--format=")), "")
    options = shape.split(",")
    if "csv" not in options:
        return refuse('"--format" switch is missing or not supported: csv is.', 1)
    known = set(_gpu({"name": "", "memory_mib": 0, "count": 0, "compute_cap": "", "seed": ""}, 0))
    known |= {"pid", "process_name", "used_memory", "used_gpu_memory"}
    fields = [name.strip() for name in fields]
    if bad := [name for name in fields if name not in known]:
        return refuse(f'Field "{bad[0]}" is not a valid field to query.', 2)
    bare = "nounits" in options
    if "noheader" not in options:
        say(", ".join(f"{name} [MiB]" if name.startswith("memory") and not bare else name for name in fields))
    for row in rows:
        say(", ".join(row[name].partition(" ")[0] if bare and _has_unit(name) else row[name] for name in fields))
    return 0


def _has_unit(name: str) -> bool:
    return name.startswith(("memory.", "utilization.", "power."))


def _table(rows: list[dict[str, str]], driver: str, cuda: str) -> None:
    say(f"| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |")
    say(*(f"|  {row['index']}  {row['name']}  0MiB / {row['memory.total'].replace(' ', '')} |" for row in rows))
    say("|  No running processes found |")


# --- power -----------------------------------------------------------------------------------------------------------


def power(folder: Path, words: list[str], how: str = "off") -> int:
    """Power the machine off (`off`) or begin again (`reboot`): at once, or in minutes as `shutdown +5` has it."""
    pending = folder / "shutdown.pid"
    if "-c" in words:
        stop(pending)
        return 0
    if "-r" in words or "--reboot" in words:
        how = "reboot"
    minutes = next((int(word[1:]) for word in words if re.fullmatch(r"\+\d+", word)), 0)
    if minutes:
        start(["sh", "-c", f"sleep {60 * minutes}; echo {how} > {shlex.quote(str(folder / 'power'))}"], pending)
    else:
        (folder / "power").write_text(how)
    return 0


# --- services --------------------------------------------------------------------------------------------------------


def systemctl(folder: Path, words: list[str]) -> int:
    """Start, stop and enable services from the unit files of this machine; timers and the rest are not played."""
    options = [word for word in words if word.startswith("-")]
    verb, *units = [word for word in words if not word.startswith("-")] or ["list-units"]
    if verb in ("poweroff", "halt", "reboot"):
        return power(folder, [], "reboot" if verb == "reboot" else "off")
    if verb in ("daemon-reload", "daemon-reexec", "reset-failed", "list-units", "is-system-running"):
        return 0
    codes = [_service(folder, verb, unit, options) for unit in units]
    return max(codes, default=0)


def _service(folder: Path, verb: str, unit: str, options: list[str]) -> int:
    unit = unit if "." in unit else f"{unit}.service"
    places = [
        folder / "root/etc/systemd/system",
        folder / "home/.config/systemd/user",
        folder / "root/run/systemd/system",
    ]
    path = next((place / unit for place in places if (place / unit).exists()), None)
    pid = folder / f"services/{unit}.pid"
    enabled = folder / f"services/{unit}.enabled"
    if verb in ("is-active", "status", "show"):
        say("active" if running(pid) else "inactive")
        return 0 if running(pid) else 3
    if verb == "is-enabled":
        say("enabled" if enabled.exists() else "disabled")
        return 0 if enabled.exists() else 1
    if path is None or not unit.endswith(".service"):
        return refuse(f"Failed to {verb} {unit}: Unit {unit} not found, or not a service.", 5)
    if verb in ("enable", "disable"):
        enabled.parent.mkdir(exist_ok=True)
        enabled.touch() if verb == "enable" else enabled.unlink(missing_ok=True)
        verb = {"enable": "start", "disable": "stop"}[verb] if "--now" in options else ""
    if verb in ("stop", "restart"):
        stop(pid)
    if verb in ("start", "restart") and not running(pid):
        _start_service(folder, path, pid)
    return 0


def _start_service(folder: Path, path: Path, pid: Path) -> None:
    text = path.read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    given = [shlex.split(found) for found in re.findall(r"^Environment=(.*)$", text, re.MULTILINE)]
    environment = dict(pair.split("=", 1) for pairs in given for pair in pairs)
    command = re.sub(r"^[-@:+!]+", "", values.get("ExecStart", "true"))
    script = f"exec {command}"
    if values.get("Restart", "no") != "no":
        pause = re.sub(r"\D.*", "", values.get("RestartSec", "")) or "0.1"
        script = f"while :; do {command}; sleep {pause}; done"
    where = values.get("WorkingDirectory", str(folder / "root"))
    start(["sh", "-c", f"cd {shlex.quote(where)} && {script}"], pid, environment)


def systemd_run(folder: Path, words: list[str]) -> int:
    """Run a command detached, after a while if told so."""
    wait_s, unit = "0", f"run-{os.getpid()}"
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        if name == "--on-active":
            wait_s = value
        elif name == "--unit":
            unit = value
        elif name in ("-u", "-p") and words:
            unit = words.pop(0) if name == "-u" else words.pop(0) and unit
    script = f"sleep {wait_s} && exec {shlex.join(words)}"
    start(["sh", "-c", script], folder / f"services/{unit.removesuffix('.service')}.service.pid")
    return 0


def cloud_init(folder: Path, words: list[str]) -> int:
    """`status [--wait]`: whether the first boot is over."""
    finished = folder / "root/var/lib/cloud/instance/boot-finished"
    deadline = time.monotonic() + _FOREVER_S
    while "--wait" in words and not finished.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    say("status: done" if finished.exists() else "status: running")
    return 0


def sudo(folder: Path, words: list[str]) -> int:
    """Run a command as who one is: whoever runs the tests has no other rights to give."""
    while words and (words[0].startswith("-") or "=" in words[0]):
        word = words.pop(0)
        if word in ("-u", "-g", "--user", "--group", "-C", "-D"):
            words.pop(0)
        elif not word.startswith("-"):
            name, _, value = word.partition("=")
            os.environ[name] = value
    if words:
        os.execvp(words[0], words)
    return 0


def uname(folder: Path, words: list[str]) -> int:
    """As the real one, on a machine of another architecture."""
    found = os.uname()
    whole = f"{found.sysname} {found.nodename} {found.release} {found.version} aarch64"
    say(
        {"-m": "aarch64", "-s": found.sysname, "-r": found.release, "-n": found.nodename}.get("".join(words[:1]), whole)
    )
    return 0


def quiet(folder: Path, words: list[str]) -> int:
    """Note what was asked for and do nothing: it would change the computer that the tests run on."""
    with (folder / "asked").open("a") as file:
        file.write(shlex.join(words) + "\n")
    return 0


def apt(folder: Path, words: list[str]) -> int:
    """Note what was asked for; a program that this machine was to lack is there once it is installed."""
    for word in words if "install" in words else []:
        path = folder / "bin" / word
        if path.is_file() and "command not found" in path.read_text():
            path.unlink()
    return quiet(folder, words)


# --- processes -------------------------------------------------------------------------------------------------------


def start(words: list[str], pid: Path, environment: dict[str, str] | None = None) -> None:
    """Start a process in a session of its own and note its id."""
    pid.parent.mkdir(exist_ok=True)
    output = (pid.parent / f"{pid.stem}.log").open("ab")
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env=os.environ | (environment or {}),
    )
    pid.write_text(str(child.pid))


def running(pid: Path) -> bool:
    """Whether the process noted there lives, and its session is what was started."""
    try:
        state = Path(f"/proc/{int(pid.read_text())}/stat").read_text().rpartition(") ")[2]
    except (OSError, ValueError):
        return False
    return state[0] not in "ZX"


def stop(pid: Path) -> None:
    """End the processes of the session noted there."""
    if running(pid):
        os.killpg(int(pid.read_text()), signal.SIGTERM)
    pid.unlink(missing_ok=True)


def wait(seconds: float) -> None:
    """Pass time without work."""
    deadline = time.monotonic() + min(seconds, _FOREVER_S)
    while time.monotonic() < deadline:
        time.sleep(0.05)


PROGRAMS: dict[str, Callable[[Path, list[str]], int]] = {
    "nvidia-smi": nvidia_smi,
    "shutdown": power,
    "poweroff": power,
    "halt": power,
    "reboot": lambda folder, words: power(folder, words, "reboot"),
    "systemctl": systemctl,
    "systemd-run": systemd_run,
    "cloud-init": cloud_init,
    "sudo": sudo,
    "uname": uname,
    **dict.fromkeys(("apt-get", "apt"), apt),
    **dict.fromkeys(("snap", "crontab", "loginctl", "at", "useradd", "usermod", "mount"), quiet),
}


def main() -> int:
    """Be the program that the first word names, on the machine whose folder the second names."""
    name, folder, *words = sys.argv[1:]
    play = PROGRAMS[name]
    return play(Path(folder), [name, *words] if play in (quiet, apt) else words)


if __name__ == "__main__":
    sys.exit(main())
