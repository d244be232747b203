"""THE STORY of a check before renting: small reads of a model, its template rendered, what it needs and lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import suites
from jobs.training_memory import CONTEXT_BYTES, FULL
from orchestrator.plain import plain
from orchestrator.preflight import memory, template
from orchestrator.preflight import model as models
from orchestrator.preflight.findings import Fault, Finding
from orchestrator.preflight.fitting import Training
from orchestrator.preflight.hub import Hub
from orchestrator.preflight.memory import GB, Load, Needs
from orchestrator.preflight.model import Model
from orchestrator.providers.base import Need, Offer

DOWNLOAD_BYTES_PER_S = 100e6
"""From the Hub: a gigabit line brings 125 MB/s, less what it loses; data centres have more, rented homes less."""
_BUILT_IN = "tiny"
_SIZES_GB = (16, 24, 32, 40, 48, 80, 96, 141, 180)
"""What GPUs that can be rented have."""
_REPORT_TOKENS = 1_000
"""The KV cache is told by so many tokens."""


@dataclass(frozen=True)
class Preflight:
    """What was found, and what the job needs; None: not known, or nothing is needed."""

    findings: tuple[Finding, ...] = ()
    model: str | None = None
    """As it was asked for; None: nothing was looked at, because nothing has to be."""
    weights_gb: float | None = None
    """On the GPU, in the job's dtype, with the adapter."""
    needed_vram_gb: float | None = None
    """The least that one GPU must have: one completion at a time."""
    wanted_vram_gb: float | None = None
    """What the batch asked for takes at its longest; the worker halves a batch that does not fit."""
    needed_disk_gb: float | None = None
    download_s: float | None = None
    """The model from the Hub to a machine; 0 when it travels from here."""
    needs: Needs | None = field(default=None, repr=False)
    load: Load | None = field(default=None, repr=False)
    """What the job asks of a GPU; None when it asks nothing, or the model could not be looked at."""
    training: Training | None = field(default=None, repr=False)
    """What is to be trained there, and takes other memory than answering does."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What must stop the run."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    def need(self, asked: Need) -> Need:
        """What is asked of a machine, with the memory and disk that this job needs at least."""
        vram_gb = max(filter(None, (asked.min_vram_gb, self.needed_vram_gb)), default=None)
        disk_gb = max(filter(None, (asked.disk_gb, self.needed_disk_gb)), default=None)
        return replace(asked, min_vram_gb=vram_gb, disk_gb=disk_gb)

    def against(self, offer: Offer) -> Preflight:
        """The same with what this machine lacks for it, errors first."""
        if self.weights_gb is None and self.needed_disk_gb is None and self.load is None:
            return self
        found = [*self.findings, *_check_memory(self, offer), *_check_disk(self, offer)]
        return replace(self, findings=_sorted(found))

    def document(self) -> dict[str, Any]:
        """All of it for --json: numbers in GB and seconds."""
        numbers = ("weights_gb", "needed_vram_gb", "wanted_vram_gb", "needed_disk_gb", "download_s")
        shown = {name: None if (one := getattr(self, name)) is None else round(one, 3) for name in numbers}
        model = None if self.model is None else plain(self.model)
        if self.training is not None:
            shown["training"] = self.training.needs.document()
        return {"model": model, **shown, "findings": [finding.document() for finding in self.findings]}

    def lines(self) -> list[str]:
        """The same for people; nothing when nothing was looked at."""
        lines = [] if self.model is None else [plain(f"{self.model}: {', '.join(self._facts())}.")]
        lines += [] if self.training is None else [self.training.line()]
        for finding in self.findings:
            lines.append(f"{finding.level}: {plain(finding.message)}")
            lines += [f"  {plain(finding.hint)}"] if finding.hint else []
        return lines

    def _facts(self) -> list[str]:
        known = {
            "{:.1f} GB of weights": self.weights_gb,
            "about {:.1f} GB of GPU memory at least": self.needed_vram_gb,
            "about {:.0f} GB of disk": self.needed_disk_gb,
            "about {:.0f} s to download": self.download_s,
        }
        return [words.format(value) for words, value in known.items() if value] or ["what it needs is not known"]


def check(document: Mapping[str, Any], offer: Offer, prompt_tokens: int | None = None) -> Preflight:
    """What speaks against running a job on a machine; see `look`."""
    return look(document, prompt_tokens).against(offer)


def look(document: Mapping[str, Any], prompt_tokens: int | None = None) -> Preflight:
    """What small reads of a job's model tell, whatever the machine; nothing is asked for a command or `tiny`.

    `document` is the job as `planning.request` returns it, `prompt_tokens` the longest prompt where it is known.
    Of several parts the one that writes most stands for all. Never raises for what is wrong with a model: that stands
    in the findings.
    """
    document = max(suites.parts(document), key=lambda part: part["params"].get("max_new_tokens") or 0)
    params = document["params"]
    name = params.get("model")
    is_elsewhere = params.get("engine") == "openai" and not params.get("server")  # with the server, on its own machine
    if document["story"] == "command" or is_elsewhere or not isinstance(name, str) or name == _BUILT_IN:
        return Preflight()
    asked = f"model={name}"
    found: list[Finding] = []
    try:
        model = _model(params)
        found += models.check(model, trusted=bool(params.get("trust_remote_code")))
        adapter = _adapter_bytes(params)
        found += _template(model, params)
    except Fault as fault:
        return Preflight(_sorted([*found, fault.finding]), asked)
    if document["story"] != "evaluate":
        training = Training.of(document["story"], params, model.text_config, memory.dtype_of(params))
        return _sized(
            Preflight(_sorted([*found, *_not_counted(model, training)]), asked, training=training),
            model,
            params,
            adapter,
        )
    load = Load.of(params, document.get("limit"), prompt_tokens)
    found += [] if load is None else _check_context(model, load)
    return _sized(Preflight(_sorted(found), asked, load=load), model, params, adapter)


def _not_counted(model: Model, training: Training | None) -> list[Finding]:
    words = f"{model.asked} is of a kind whose memory in training is not known: a GPU may be too small for it."
    return [] if training is not None else [_finding("memory_not_known", words)]


def _model(params: Mapping[str, Any]) -> Model:
    folder, bare = models.place_of("model", params["model"]), _is_blank(params)
    if folder is not None:
        return models.read(folder, bare=bare)
    with Hub("model", params["model"], params.get("revision")) as hub:
        return models.read(hub, bare=bare)


def _is_blank(params: Mapping[str, Any]) -> bool:
    """Whether only the model's configuration is wanted: its weights are random, and stay where they are."""
    return params.get("weights") == "random"


def _adapter_bytes(params: Mapping[str, Any]) -> int | None:
    """The size of the adapter, 0 without one."""
    if not params.get("adapter"):
        return 0
    folder = models.place_of("adapter", params["adapter"])
    if folder is not None:
        return models.adapter_bytes(folder)
    with Hub("adapter", params["adapter"]) as hub:
        return models.adapter_bytes(hub)


def _template(model: Model, params: Mapping[str, Any]) -> list[Finding]:
    return template.check(model, params) if "chat_template" in params else []


def _sized(found: Preflight, model: Model, params: Mapping[str, Any], adapter: int | None) -> Preflight:
    """The same with what the job needs, where that is known."""
    dtype = memory.dtype_of(params)
    weights = memory.weights_bytes(model, dtype)
    needs = None if found.load is None else memory.needs(model, found.load, adapter or 0)
    transfer = 0 if _is_blank(params) else model.transfer_bytes()
    training = found.training.needs if found.training else None
    on_gpu = params.get("device") in (None, "auto", "cuda")
    rows = found.load.rows if found.load is not None else None
    return replace(
        found,
        weights_gb=training.weights / GB if training else None if weights is None else (weights + (adapter or 0)) / GB,
        needed_vram_gb=training.on_gpu / FULL / GB if training else needs.total() / GB if needs and on_gpu else None,
        wanted_vram_gb=needs.total(rows) / GB if needs and on_gpu and rows else None,
        needed_disk_gb=None if transfer is None else _disk_gb(transfer + (adapter or 0), params),
        download_s=None if transfer is None else 0.0 if model.here else transfer / DOWNLOAD_BYTES_PER_S,
        needs=needs if on_gpu else None,
        load=found.load if on_gpu else None,
    )


def _disk_gb(transfer: float, params: Mapping[str, Any]) -> float:
    """With the dataset's own size where it is a file here."""
    path = Path(str(params.get("dataset") or ""))
    return memory.needs_disk_gb(transfer, path.stat().st_size if path.is_absolute() and path.is_file() else 0)


def _check_context(model: Model, load: Load) -> list[Finding]:
    """Whether prompt and completion have room in what the model was made for."""
    limit = memory.context_tokens(model.text_config)
    if limit is None or load.scored_tokens is not None or load.prompt_tokens + load.max_new_tokens <= limit:
        return []
    hint = f"--set max_new_tokens={max(1, limit - load.prompt_tokens)}"
    if load.max_new_tokens >= limit:
        message = (
            f"max_new_tokens {load.max_new_tokens} leaves no room for a prompt: the model's context holds {limit}."
        )
        return [Finding("error", "context_overflow", message, hint)]
    message = (
        f"Prompts of about {load.prompt_tokens} tokens + max_new_tokens {load.max_new_tokens} are "
        f"{load.prompt_tokens + load.max_new_tokens}, but the model's context holds {limit}."
    )
    return [_finding("context_overflow", message, hint)]


def _check_memory(found: Preflight, offer: Offer) -> list[Finding]:
    """Whether the job fits on one GPU of this machine."""
    if found.training is not None:
        return found.training.check(offer)
    if found.load is None:
        return []
    if offer.gpu is None:
        return [_finding("no_gpu", f"{offer.type_name} has no GPU: {found.model} would run on its processors, slowly.")]
    if offer.vram_gb is None or found.needs is None:
        what = f"the memory of {offer.gpu}" if offer.vram_gb is None else f"the size of {found.model}"
        return [_finding("memory_not_known", f"Whether it fits on the GPU is not known, because {what} is not.")]
    needs, has = found.needs, offer.vram_gb * GB
    if needs.total() > has:
        return [_too_large(found, needs, offer)]
    if needs.cache_per_row is None:
        return [
            _finding("cache_not_known", f"The cache of {found.model} is of a kind whose size is not known beforehand.")
        ]
    if found.wanted_vram_gb and found.wanted_vram_gb * GB > has and found.load:
        message = f"batch_size={found.load.rows} takes about {found.wanted_vram_gb:.1f} GB at its longest"
        return [
            _finding(
                "batch_too_large", f"{message}, and {_one(offer)}.", "It is halved until it fits; nothing is lost."
            )
        ]
    return []


def _too_large(found: Preflight, needs: Needs, offer: Offer) -> Finding:
    """Says by which numbers it does not fit; doubtful where only a cache counted at its most does not."""
    parts = f"weights {needs.weights / GB:.1f}, cache {needs.cache() / GB:.1f}, work {needs.work() / GB:.1f}"
    message = (
        f"{found.model} needs about {needs.total() / GB:.1f} GB on one GPU ({parts}, CUDA "
        f"{CONTEXT_BYTES / GB:.1f}), and {_one(offer)}."
    )
    if offer.count > 1:
        message += f" The other {offer.count - 1} do not help: a model is loaded onto one."
    enough = next((size for size in _SIZES_GB if size * GB >= needs.total()), None)
    hint = f"Take a GPU with {enough} GB, or a smaller model." if enough else "Take a smaller model."
    doubtful = not needs.cache_is_exact and needs.total() - needs.cache() <= offer.vram_gb * GB if offer.vram_gb else 0
    return Finding("warning" if doubtful else "error", "does_not_fit", message, hint)


def _one(offer: Offer) -> str:
    return f"one {offer.gpu} has {offer.vram_gb:g} GB"


def _check_disk(found: Preflight, offer: Offer) -> list[Finding]:
    if found.needed_disk_gb is None or offer.disk_gb is None:
        what = "needed" if found.needed_disk_gb is None else f"{offer.type_name} has"
        return [_finding("disk_not_known", f"How much disk {what} is not known.")]
    if found.needed_disk_gb <= offer.disk_gb:
        return []
    message = (
        f"About {found.needed_disk_gb:.0f} GB of disk are needed (model, dataset, and "
        f"{memory.ENVIRONMENT_GB:.0f} GB of packages), and {offer.type_name} has {offer.disk_gb:.0f} GB."
    )
    return [Finding("error", "disk_too_small", message, f"Ask for a disk of {found.needed_disk_gb + 1:.0f} GB.")]


def _finding(code: str, message: str, hint: str = "") -> Finding:
    return Finding("warning", code, message, hint)


def _sorted(found: list[Finding]) -> tuple[Finding, ...]:
    """Errors first."""
    return tuple(sorted(found, key=lambda finding: finding.level != "error"))
