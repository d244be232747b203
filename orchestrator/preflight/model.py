"""What a model's small files tell of it: configuration, tokenizer, weights to load, and what is wrong with them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.decoders import text_part
from orchestrator.preflight.findings import Fault, Finding, error, quoted, unknown
from orchestrator.preflight.shelf import Folder, Listing, Shelf, json_object

CONFIG, ADAPTER_CONFIG, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE, PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "special_tokens_map.json")
_NEVER = ("original/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*/*.bin", "*/*.safetensors", "*.pth")
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.vocab")
_CAUSAL = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
_LORA_KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "IA3", "FOURIERFT", "RANDLORA", "LN_TUNING")


@dataclass(frozen=True)
class Model:
    """A model as its small files describe it; a file that there is none of is an empty object."""

    asked: str
    listing: Listing
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    """The text of chat_template.jinja."""
    unread: Mapping[str, Finding] = field(default_factory=dict)
    """Files that are there and could not be read, with the reason: what they say is not known."""
    here: bool = False
    """A folder on this computer, which travels to the machine from here."""

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the part that writes."""
        return text_part(self.config)

    def weight_files(self) -> list[str]:
        """The files that transformers loads: one file or the shards of an index, safetensors before pickles."""
        files = self.listing.files
        if "model.safetensors" in files:
            return ["model.safetensors"]
        shards = self.index.get("weight_map")
        if isinstance(shards, dict) and shards:
            return sorted({str(name) for name in shards.values()})
        found = [[name for name in files if fnmatch.fnmatchcase(name, pattern)] for pattern in _WEIGHTS]
        return sorted(next(filter(None, found), []))

    def weight_bytes(self) -> int | None:
        """The size of those files; None when one is not known."""
        sizes = [self.listing.files.get(name) for name in self.weight_files()]
        if sizes and None not in sizes:
            return sum(filter(None, sizes))
        said = self.index.get("metadata")
        total = said.get("total_size") if isinstance(said, dict) else None
        return int(total) if isinstance(total, (int, float)) and total > 0 else None

    def transfer_bytes(self) -> int | None:
        """What a machine gets of it: the same files that the worker fetches; None when a size is not known."""
        names = list(self.listing.files) if self.here else fetched(list(self.listing.files))
        sizes = [self.listing.files[name] for name in names]
        return None if None in sizes else sum(filter(None, sizes))

    def is_quantised(self) -> bool:
        """Whether its weights are stored in fewer bits, which loading keeps."""
        return any(part.get("quantization_config") for part in (self.config, self.text_config))


def fetched(names: list[str]) -> list[str]:
    """Of a repository's files those that a worker fetches; the rule is the worker's own (`worker/libraries.py`)."""
    fit = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _NEVER)]
    weights = [name for name in fit if name.endswith(".safetensors")] or [name for name in fit if name.endswith(".bin")]
    if any(not name.startswith("consolidated") for name in weights):
        weights = [name for name in weights if not name.startswith("consolidated")]
    return sorted({*weights, *(name for name in fit if any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL))})


def read(shelf: Shelf, *, bare: bool = False) -> Model:
    """A model's small files; raises Fault when there is no model, or nothing can be known of it.

    `bare`: its configuration is all that is needed.
    """
    listing = shelf.listing()
    files = listing.files
    if CONFIG not in files:
        raise _no_config(shelf, files)
    config = _object(shelf, CONFIG)
    if not bare and not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in _WEIGHTS):
        raise error(
            "no_weights",
            f"{shelf.asked} has a config.json but no weights (looked for {' and '.join(_WEIGHTS)}).",
            "Copy the weights there too; a repository of GGUF files alone cannot be used: take the original model.",
        )
    if not bare and not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in _TOKENIZER):
        raise error(
            "no_tokenizer",
            f"{shelf.asked} has no tokenizer files (looked for {', '.join(_TOKENIZER)}).",
            "Save the tokenizer into the same place: tokenizer.save_pretrained(folder).",
        )
    unread: dict[str, Finding] = {}
    objects = {name: _optional(shelf, name, listing, unread) for name in _OPTIONAL}
    return Model(
        asked=shelf.asked,
        listing=listing,
        config=config,
        tokenizer=objects[TOKENIZER_CONFIG],
        special_tokens=objects[SPECIAL_TOKENS],
        generation=objects[GENERATION_CONFIG],
        index=objects[INDEX],
        template=_template(shelf, listing, unread),
        unread=unread,
        here=isinstance(shelf, Folder),
    )


_OPTIONAL = (TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION_CONFIG, INDEX)


def check(model: Model, *, trusted: bool) -> list[Finding]:
    """What is doubtful about the model as such; `trusted`: its own Python code may run."""
    found = list(model.unread.values())
    names = model.config.get("architectures")
    if isinstance(names, list) and names and not any(_CAUSAL.search(str(name)) for name in names):
        message = f"{model.asked} is a {quoted(', '.join(map(str, names)))}, which may not be a model that writes text."
        found.append(Finding("warning", "not_causal", message, "Take a model for text generation (…ForCausalLM)."))
    if model.config.get("auto_map") and not trusted:
        found.append(
            Finding(
                "warning",
                "remote_code",
                f"{model.asked} brings Python code of its own. Where transformers does not know its kind "
                f"({quoted(model.config.get('model_type', '?'))}), the run stops on the machine.",
                "If you trust its authors: --set trust_remote_code=true",
            )
        )
    if model.is_quantised():
        method = (model.config.get("quantization_config") or model.text_config["quantization_config"]) or {}
        kind = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        found.append(
            Finding(
                "warning",
                "quantised",
                f"{model.asked} is stored quantised ({quoted(kind)}): it loads only where the machine's environment "
                "has the library for that, and the memory it takes is known roughly.",
                "Take the original model where there is one.",
            )
        )
    return found


def adapter_bytes(shelf: Shelf) -> int | None:
    """The size of an adapter's files, None when not said; raises Fault when there is none that can be used."""
    listing = shelf.listing()
    if ADAPTER_CONFIG not in listing.files:
        raise error(
            "no_adapter",
            f"{shelf.asked} holds no adapter: it has no adapter_config.json.",
            "Name the folder, or repository, that peft's save_pretrained wrote.",
        )
    kind = str(_object(shelf, ADAPTER_CONFIG).get("peft_type", "LORA")).upper()
    if kind not in _LORA_KINDS:
        raise error(
            "adapter_kind",
            f"{shelf.asked} is of the kind {quoted(kind)}, which this engine cannot run.",
            "Use a LoRA adapter.",
        )
    sizes = [size for name, size in listing.files.items() if name.startswith("adapter_model.")]
    if not sizes:
        raise error("no_adapter", f"{shelf.asked} has an adapter_config.json but no adapter_model file.")
    return None if None in sizes else max(filter(None, sizes), default=0)


def place_of(parameter: str, name: str) -> Folder | None:
    """The folder that a parameter names, as planning made it absolute; None: a name on the Hub."""
    return Folder(parameter, Path(name)) if name.startswith("/") else None


def _no_config(shelf: Shelf, files: Mapping[str, int | None]) -> Fault:
    if ADAPTER_CONFIG in files:
        base = _object(shelf, ADAPTER_CONFIG).get("base_model_name_or_path")
        return error(
            "is_adapter",
            f"{shelf.asked} holds an adapter, not a model (adapter_config.json and no config.json).",
            f"--set adapter={shelf.asked.partition('=')[2]} --set model={quoted(base or 'ITS_BASE_MODEL')}",
        )
    return error(
        "no_config",
        f"{shelf.asked} is not a model: it has no config.json.",
        "Name the folder that save_pretrained wrote (often a sub-folder such as checkpoint-…), or another repository.",
    )


def _object(shelf: Shelf, name: str) -> dict[str, Any]:
    """A JSON file that must be there."""
    content = shelf.read(name)
    document = None if content is None else json_object(content)
    if document is None:
        raise unknown(
            "unreadable_config", f"{shelf.asked}: its {name} is no JSON object, so nothing is known of the model."
        )
    return document


def _optional(shelf: Shelf, name: str, listing: Listing, unread: dict[str, Finding]) -> dict[str, Any]:
    """A JSON file that need not be there; when it cannot be read, that is a finding."""
    if name not in listing.files:
        return {}
    try:
        content = shelf.read(name)
    except Fault as fault:
        unread[name] = fault.finding
        return {}
    document = {} if content is None else json_object(content)
    if document is None:
        unread[name] = Finding("warning", "unreadable_file", f"{shelf.asked}: its {name} is no JSON object.")
    return document or {}


def _template(shelf: Shelf, listing: Listing, unread: dict[str, Finding]) -> str | None:
    if TEMPLATE not in listing.files:
        return None
    try:
        content = shelf.read(TEMPLATE)
    except Fault as fault:
        unread[TEMPLATE] = fault.finding
        return None
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        unread[TEMPLATE] = Finding("warning", "unreadable_file", f"{shelf.asked}: its {TEMPLATE} is not UTF-8.")
        return None
