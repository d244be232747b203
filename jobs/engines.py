"""What the choice of an engine asks of a run: settings that belong together, an environment, and a secret."""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds the key of an OpenAI-compatible server."""
_FOR_SERVERS = ("base_url", "server", "allow_http", "usd_per_million_in", "usd_per_million_out")
_BUILT_IN = "tiny"


def faults(params: Mapping[str, Any]) -> list[str]:
    """What is wrong with the engine's settings, in sentences; nothing is looked at but the settings."""
    engine, base_url, server = params.get("engine"), params.get("base_url"), params.get("server")
    found = [] if engine == "openai" else [f"{name} is for engine=openai." for name in _FOR_SERVERS if params.get(name)]
    if engine == "openai":
        if bool(base_url) is bool(server):
            found.append("engine=openai needs either base_url=URL of a server, or server='COMMAND' to start one.")
        if base_url and params.get("model") == _BUILT_IN:
            found.append("engine=openai needs the name the server gives the model: model=NAME.")
        if params.get("adapter"):
            found.append("engine=openai takes no adapter: name it as the server does, by model=NAME.")
        if params.get("chat_template") not in (None, "auto", "none"):
            found.append("engine=openai takes no chat template of yours: a server has its own. Use auto, or none.")
        found += _address_faults(base_url, bool(params.get("allow_http"))) if base_url else []
        found += _command_faults(server) if server else []
    if engine == "vllm":
        temperature = params.get("temperature") or 0.0
        if temperature > 2 or 0 < temperature < 0.01:
            found.append(f"engine=vllm takes temperature=0, or 0.01 to 2, not {temperature}.")
        if params.get("dtype") == "float64":
            found.append("engine=vllm has no float64.")
    return found


def environment(params: Mapping[str, Any]) -> str | None:
    """The kind of environment that the engine, or the server to start, surely needs; None: the job's own will do."""
    words = shlex.split(params.get("server") or "")
    return "serve" if params.get("engine") == "vllm" or words[:1] == ["vllm"] else None


def expected(params: Mapping[str, Any], environment: str | None, python: str | None) -> dict[str, str | None] | None:
    """The `name` of the engine that a run will use on another machine, and `why`, as far as that is known before
    anybody has looked there (None: not); None for a job that has no engine. `python`: one that is there, as it is.
    """
    asked = params.get("engine")
    if asked is None:
        return None
    if asked != "auto":
        return {"name": str(asked), "why": "as asked for"}
    if "temperature" not in params:
        return {"name": "hf", "why": "texts are weighed by transformers"}
    if python:
        return {"name": None, "why": f"The engine will be vllm if {python} has it and the run has a CUDA GPU, else hf"}
    if environment == "serve":
        return {
            "name": None,
            "why": "The engine will be vllm, of the environment serve, if the run has a CUDA GPU, else hf",
        }
    return {"name": "hf", "why": "the environment made there has no vLLM; it gets one by --set engine=vllm"}


def secrets(params: Mapping[str, Any]) -> list[str]:
    """Names of variables that the job gets beside those its user named, where they are set."""
    return [KEY_VARIABLE] if params.get("base_url") else []


def is_loopback(host: str) -> bool:
    """Whether a host name or address means the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address_faults(base_url: str, allow_http: bool) -> list[str]:
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        return [f"base_url is no URL: {error}."]
    if parts.scheme not in ("http", "https") or not host:
        return ["base_url must begin with https:// (or http:// on the machine itself) and name a host."]
    if parts.username or parts.password or parts.query or parts.fragment:
        return [f"base_url must hold no user, query or fragment; a key goes into {KEY_VARIABLE}."]
    if parts.scheme == "http" and not is_loopback(host) and not allow_http:
        return [f"http:// to {host} would send prompts and key in the clear. If that is meant: allow_http=true."]
    return []


def _command_faults(server: str) -> list[str]:
    try:
        words = shlex.split(server)
    except ValueError as error:
        return [f"server is no list of words ({error})."]
    if not any("{port}" in word for word in words[1:]):
        return ["server must say where the port goes, such as 'vllm serve {model} --host 127.0.0.1 --port {port}'."]
    return []
