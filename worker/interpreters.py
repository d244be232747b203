"""Which Python an environment is made from and which build of PyTorch fits the machine: uv's Python, else its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import durable
from worker.programs import Asker, ran

KINDS = ("train", "serve")
UV_PIN = "uv==0.13.8"
"""The version that is installed where a machine has none."""
_UV_PYTHON = "3.12"
_UV_OLDEST = (0, 9)  # has --torch-backend for the CUDA builds named below
_UV_INSTALL_S = 60.0
_UV_PYTHON_S = 180.0
_UV_CONNECT_S = 5
_UV_RETRIES = 1  # with uv's own three a machine without the internet waits 9 s instead of 1.3 s
_NO_UV_FOR_S = 86400.0
_PROBE_S = 30.0
_PROBE = """import importlib.util, sys
print("%d.%d" % sys.version_info[:2])
print(sys.executable)
print(all(importlib.util.find_spec(name) for name in ("ensurepip", "venv")))"""
_SMI_PLACES = ("/usr/bin", "/usr/local/nvidia/bin", "/usr/lib/wsl/lib")
_DRIVER = Path("/proc/driver/nvidia/version")
_DEFAULT_CUDA = (13, 0)
"""The CUDA version of the torch 2.13 that a package index gives by default, and of vLLM 0.32."""
_DEFAULT_CAPABILITY = (7, 5)  # CUDA 13 dropped Maxwell, Pascal and Volta
_OLDEST_CUDA = (12, 0)  # a driver of 12.0 runs every build of CUDA 12 (minor version compatibility)
_OWN_PYTHON = "Name a Python there that has what is needed, by --python PATH of gpu add, or of gpu launch."


class Refused(Exception):
    """No environment can be made on this machine as it is; the message says why, the hint what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Lock:
    """A file of pins for one kind and Python version, with what it says of itself in its comments."""

    path: Path
    text: str

    @property
    def pins(self) -> dict[str, str]:
        """Each pinned package's requirement (`torch==2.13.0`) by its name, lower case and with `_` for `-`."""
        lines = [line.strip() for line in self.text.splitlines()]
        return {_plain(line.partition("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}

    @property
    def packages(self) -> list[str]:
        """The packages asked for, by name; the others come with them."""
        return [word.partition("=")[0] for word in self._said("packages").split()]

    @property
    def modules(self) -> list[str]:
        """What each of them is imported as: its own name, but for `package=module`."""
        return [word.rpartition("=")[2] for word in self._said("packages").split()]

    def gb(self, build: str) -> float:
        """About how much an environment takes on disk, in GB, with a CUDA or a `cpu` build; 0 when it does not say."""
        return float(self._said("gb_cpu" if build == "cpu" else "gb_cuda") or 0)

    def _said(self, name: str) -> str:
        found = re.search(rf"^# {name}: (.+)$", self.text, re.MULTILINE)
        return found[1] if found else ""


@dataclass(frozen=True)
class Plan:
    """How one environment is made: everything its digest follows from, and with what."""

    kind: str
    python: str
    """The interpreter that the environment is made from, never written to."""
    version: str
    uv: str
    """Path of uv, empty when pip installs."""
    builds: list[str]
    """Builds of PyTorch to try in turn: `cpu`, `cu130`…, as uv names them, or `default`: what the index gives."""
    lock: str
    seen: str
    """What of the machine this follows from; when it differs, the plan is made anew."""
    gpu: bool = False

    @property
    def digest(self) -> str:
        """What names the environment: 16 hex digits over kind, Python version, the lock's text and the builds."""
        text = Path(self.lock).read_text(encoding="utf-8")
        identity = json.dumps([self.kind, self.version, text, self.builds])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def document(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Gpu:
    """What the NVIDIA driver says: the CUDA version it runs, and the lowest compute capability of its devices."""

    cuda: tuple[int, int]
    capability: tuple[int, int]


def locks_for(kind: str, folder: Path) -> dict[str, Lock]:
    """The lock of each Python version that there is one for, newest version first."""
    paths = {path.stem.partition("-")[2]: path for path in folder.glob(f"{kind}-3.*.txt")}
    versions = sorted(paths, key=lambda version: int(version.partition(".")[2]), reverse=True)
    return {version: Lock(paths[version], paths[version].read_text(encoding="utf-8")) for version in versions}


def plan(folder: Path, kind: str, locks: Path, asker: Asker) -> Plan:
    """Choose interpreter and build for an environment of this kind; Refused when this machine has nothing that fits.

    `folder` is where environments lie: uv and its Python are put there when they can be had. Takes minutes at most.
    """
    by_version = locks_for(kind, locks)
    gpu = nvidia(asker)
    wanted = _UV_PYTHON if _UV_PYTHON in by_version else next(iter(by_version))
    builds(kind, gpu, uv=True)  # what no installer can help is said before anything is downloaded
    uv, python = uv_python(folder, wanted, asker) or ("", "")
    fitting = builds(kind, gpu, uv=bool(uv))
    python, version = (python, wanted) if uv else machine_python(list(by_version), asker)
    lock = str(by_version[version].path)
    return Plan(kind, python, version, uv, fitting, lock, seen(), gpu is not None)


# --- the build of PyTorch --------------------------------------------------------------------------------------------


def nvidia(asker: Asker) -> Gpu | None:
    """What nvidia-smi says; None where there is no NVIDIA driver, or none that works."""
    smi = _smi()
    if smi is None:
        return None
    code, text = ran([smi], _PROBE_S, asker)
    found = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+)\.(\d+)", text)  # drivers from 610 on say UMD
    if code != 0 or found is None:
        asker.say(f"nvidia-smi does not work here, so PyTorch without CUDA is installed. It said: {_last_line(text)}")
        return None
    _, listed = ran([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], _PROBE_S, asker)
    capabilities = [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)\s*$", listed, re.MULTILINE)]
    return Gpu((int(found[1]), int(found[2])), min(capabilities, default=_DEFAULT_CAPABILITY))


def builds(kind: str, gpu: Gpu | None, *, uv: bool) -> list[str]:
    """The builds of PyTorch that fit this machine, best first; Refused when there is none."""
    if gpu is None:
        if kind == "serve":
            raise Refused("vLLM needs an NVIDIA GPU, and this machine has no NVIDIA driver.", "Leave out engine=vllm.")
        return ["cpu", "default"] if uv else ["default"]
    fits_default = gpu.cuda >= _DEFAULT_CUDA and gpu.capability >= _DEFAULT_CAPABILITY
    if kind == "serve" or not uv:
        if fits_default:
            return ["default"]
        what = "vLLM" if kind == "serve" else "The PyTorch that pip installs"
        raise Refused(f"{what} needs CUDA 13.0 and compute capability 7.5; {_says(gpu)}.", _hint(gpu))
    if gpu.cuda < _OLDEST_CUDA:
        raise Refused(f"No PyTorch that gpu works with runs on CUDA before 12.0; {_says(gpu)}.", _hint(gpu))
    if fits_default:
        return ["cu130", "default"]
    return ["cu129", "cu126"] if (12, 9) <= gpu.cuda < (13, 0) and gpu.capability >= (7, 5) else ["cu126"]


def _says(gpu: Gpu) -> str:
    cuda, capability = (".".join(map(str, pair)) for pair in (gpu.cuda, gpu.capability))
    return f"this machine's driver runs CUDA {cuda}, its GPU has compute capability {capability}"


def _hint(gpu: Gpu) -> str:
    renew = "Renew its NVIDIA driver (580 or later). Or: " if gpu.capability >= _DEFAULT_CAPABILITY else ""
    return renew + _OWN_PYTHON


def seen() -> str:
    """What of the machine a plan follows from, read within a millisecond: the driver, and where nvidia-smi is."""
    driver = ""
    with contextlib.suppress(OSError):
        driver = _DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    smi = _smi()
    return json.dumps([driver, smi, os.stat(smi).st_mtime_ns if smi else 0])  # noqa: PTH116


def _smi() -> str | None:
    places = os.pathsep.join([os.environ.get("PATH", ""), *_SMI_PLACES])
    return shutil.which("nvidia-smi", path=places)


# --- the interpreter -------------------------------------------------------------------------------------------------


def uv_python(folder: Path, version: str, asker: Asker) -> tuple[str, str] | None:
    """Paths of uv and of its own Python of that version, installed when they can be had; None when they cannot.

    That they cannot is remembered for a day in `no-uv.json`, so that it is waited for once.
    """
    memory = folder / "no-uv.json"
    told = durable.load_news(memory)
    age_s = time.time() - told["at"] if isinstance(told.get("at"), (int, float)) else -1.0
    if 0 <= age_s < _NO_UV_FOR_S:
        return None
    found = _uv(folder, asker)
    python = _uvs_python(found, folder, version, asker) if found else None
    if found and python:
        return found, python
    durable.save_json(memory, {"at": time.time()}, synced=False)
    return None


def _uv(folder: Path, asker: Asker) -> str | None:
    own = str(folder / "tools" / "bin" / "uv")
    for path in (shutil.which("uv"), str(Path("~/.local/bin/uv").expanduser()), own):
        if path and _is_new_enough(path, asker):
            return path
    asker.say("getting uv, which brings a Python of its own")
    shutil.rmtree(folder / "tools", ignore_errors=True)
    deadline = time.monotonic() + _UV_INSTALL_S
    made, _ = ran([sys.executable, "-I", "-m", "venv", str(folder / "tools")], _UV_INSTALL_S, asker)
    python = folder / "tools" / "bin" / "python"
    pip = [str(python) if made == 0 else sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-input"]
    if made != 0:  # without ensurepip a machine may still have pip
        pip += ["--target", str(folder / "tools")]
    code, text = ran([*pip, "--only-binary=:all:", UV_PIN], deadline - time.monotonic(), asker)
    if code == 0 and _is_new_enough(own, asker):
        return own
    asker.say(f"uv cannot be had here: {_last_line(text)}")
    return None


def _is_new_enough(uv: str, asker: Asker) -> bool:
    if not os.access(uv, os.X_OK):
        return False
    code, text = ran([uv, "--version"], _PROBE_S, asker)
    found = re.match(r"uv (\d+)\.(\d+)", text)
    return code == 0 and found is not None and (int(found[1]), int(found[2])) >= _UV_OLDEST


def _uvs_python(uv: str, folder: Path, version: str, asker: Asker) -> str | None:
    asker.say(f"getting Python {version} by uv")
    place = {"UV_PYTHON_INSTALL_DIR": str(folder / "python"), "UV_HTTP_CONNECT_TIMEOUT": str(_UV_CONNECT_S)}
    place["UV_HTTP_RETRIES"] = str(_UV_RETRIES)
    install = [uv, "--no-progress", "python", "install", "--no-bin", version]
    code, text = ran(install, _UV_PYTHON_S, asker, place)
    if code != 0:
        reasons = [line.strip() for line in text.splitlines() if line.strip()]
        asker.say(
            f"uv cannot get a Python here, which is tried again in a day: {(reasons or ['it took too long'])[-1]}"
        )
        return None
    find = [uv, "python", "find", "--managed-python", "--no-project", version]
    code, text = ran(find, _PROBE_S, asker, place)
    return text.strip().splitlines()[-1] if code == 0 and text.strip() else None


def machine_python(versions: list[str], asker: Asker) -> tuple[str, str]:
    """The machine's own newest Python of these versions that can make environments, with its version.

    Refused, with what to install, when there is none.
    """
    lacking = ""
    for version in versions:
        for path, can_make in _candidates(version, asker):
            if can_make:
                return path, version
            lacking = version
    if lacking:
        raise Refused(
            f"This machine's Python {lacking} cannot make environments: it lacks venv or ensurepip.",
            f"Install them there (Debian, Ubuntu: apt-get install python{lacking}-venv). Or: {_OWN_PYTHON}",
        )
    own = ".".join(map(str, sys.version_info[:2]))
    raise Refused(
        f"This machine has none of Python {', '.join(reversed(versions))} (its own is {own}), and uv could bring none.",
        f"Install one there (apt-get install python{versions[0]} python{versions[0]}-venv). Or: {_OWN_PYTHON}",
    )


def _candidates(version: str, asker: Asker) -> Iterator[tuple[str, bool]]:
    """Interpreters of that version by what they say of themselves, each with whether it can make environments."""
    for name in (f"python{version}", "python3", sys.executable):
        path = shutil.which(name)
        code, text = ran([path, "-I", "-c", _PROBE], _PROBE_S, asker) if path else (127, "")
        said = text.splitlines()
        if code == 0 and len(said) == 3 and said[0] == version:
            yield said[1], said[2] == "True"


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1]
