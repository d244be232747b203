"""Loading a model and its tokenizer as asked, with digests of what was loaded and plain words when it cannot be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import rundir
from worker import quantization
from worker.failures import ConfigFailure

DTYPES = ("float16", "bfloat16", "float32", "float64")

WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
"""Names of weight files that transformers looks for in a folder."""

TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "special_tokens_map.json")

DIGESTED_PATTERNS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.py",
    *TOKENIZER_PATTERNS,
)
"""Names of the files of a folder that can change what a model answers."""

SMALL_MODEL_PARAMETERS = 20_000_000
"""Below this many parameters a forward pass on a CPU is too short to be worth splitting between threads."""


@dataclass(frozen=True)
class ModelRequest:
    """Which model to load and how; `model` and `adapter` are folders or Hub names, `auto` is decided on loading."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    quantization: str = "none"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer (wrapped by peft when it has an adapter), its tokenizer, and what `auto` became.

    `revision` is the Hub commit, None for a folder; digests tell weights, tokenizer and template files apart.
    """

    model: Any
    tokenizer: Any
    device: Any
    dtype: Any
    parameters: int
    revision: str | None
    digest: str
    adapter_digest: str | None = None


def dtype_name(request: ModelRequest) -> str:
    """The number type that `auto` becomes on the request's device, by name."""
    return str(choose_dtype(request.dtype, choose_device(request.device))).removeprefix("torch.")


def load_config(request: ModelRequest) -> Any:
    """The model's transformers configuration; no weights are read."""
    from transformers import AutoConfig

    _check_folder(request)
    with explained(request, "configuration"):
        return AutoConfig.from_pretrained(request.model, **_source(request))


def load_generation_config(request: ModelRequest) -> Any:
    """The model's generation settings, made from its configuration when it has none of its own; no weights are read."""
    from transformers import GenerationConfig

    config = load_config(request)
    try:
        return GenerationConfig.from_pretrained(request.model, **_source(request))
    except OSError:  # older models have no such file
        return GenerationConfig.from_model_config(config)


def end_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: those of the model's generation settings and the tokenizer's own."""
    listed = generation_config.eos_token_id
    ends = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return frozenset(ends - {None})


def load_tokenizer(request: ModelRequest) -> Any:
    """The tokenizer that belongs to the model; no weights are read."""
    from transformers import AutoTokenizer

    _check_folder(request)
    if (folder := Path(request.model)).is_dir() and not _files(folder, TOKENIZER_PATTERNS):
        raise ConfigFailure(
            f"{folder} has no tokenizer files (looked for {', '.join(TOKENIZER_PATTERNS)}).",
            "Save the tokenizer into the same folder: tokenizer.save_pretrained(folder).",
        )
    with explained(request, "tokenizer"):
        return AutoTokenizer.from_pretrained(request.model, **_source(request))


def load_model(request: ModelRequest) -> LoadedModel:
    """The model on its device, in evaluation mode. On a CPU a small model also sets torch to one thread."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # bars are for terminals; this is read as a log
    _check_folder(request)
    if not Path(request.model).is_dir():  # so that all files are of one commit, even if the branch moves meanwhile
        request = dataclasses.replace(request, revision=_commit(request.model, request.revision))
    tokenizer = load_tokenizer(request)
    _check_weights(request)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    how = {"dtype": dtype, "device_map": {"": device}, **quantization.arguments(request.quantization, dtype)}
    with explained(request, "weights"):
        model = AutoModelForCausalLM.from_pretrained(request.model, **how, **_source(request))
    if request.adapter is not None:
        check_base(request)
        model = _with_adapter(model, request.adapter)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu" and parameters < SMALL_MODEL_PARAMETERS:
        torch.set_num_threads(1)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        parameters=parameters,
        revision=None if Path(request.model).is_dir() else request.revision,
        digest=digest(request.model, request.revision),
        adapter_digest=None if request.adapter is None else digest(request.adapter, None),
    )


def choose_device(name: str) -> Any:
    """The torch device of that name; `auto` is the first of cuda, mps and cpu that this machine has."""
    import torch

    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigFailure(
            f"device={name} is not a device torch knows.", "Use auto, cuda, cuda:N, mps or cpu."
        ) from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not has_mps)
    if missing:
        raise ConfigFailure(f"device={name} was asked for, but torch finds none here.", "--set device=auto")
    return device


def choose_dtype(name: str, device: Any) -> Any:
    """The torch dtype of that name; `auto` is float32 on a CPU, else bfloat16 if the hardware has it, else float16."""
    import torch

    if name == "auto":
        if device.type == "cpu":
            name = "float32"
        else:
            brain = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if brain else "float16"
    if name not in DTYPES:
        raise ConfigFailure(f"dtype={name} is not known.", f"Use auto or one of {', '.join(DTYPES)}.")
    return getattr(torch, name)


def digest(name: str, revision: str | None) -> str:
    """What tells one model or adapter from another: `sha256:…` of a folder's files, `commit:…` of a Hub repository.

    The Hub is asked which commit a branch, a tag or None (its main branch) is at; its answer is kept in its cache.
    A folder's MANIFEST.json (`{name: {"bytes": …, "sha256": …}}`) is believed in place of reading the weights again;
    only the sizes are compared, and ConfigFailure names a file that is cut short.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"commit:{_commit(name, revision)}"
    entries = _manifest(folder)
    if entries is None:
        entries = {path.name: _size_and_sha256(path) for path in _files(folder, DIGESTED_PATTERNS)}
    lines = [f"{file} {size} {sha256}\n" for file, (size, sha256) in sorted(entries.items())]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 by file name as the folder's manifest has them; None without a manifest of this form."""
    try:
        listed = json.loads((folder / "MANIFEST.json").read_text())
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    for name, (size, _) in entries.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise ConfigFailure(
                f"{folder / name} has {found} bytes where its manifest says {size}.", "Copy the folder again."
            )
    return entries


def _size_and_sha256(path: Path) -> tuple[int, str]:
    state = path.stat()
    return state.st_size, _file_sha256(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _file_sha256(path: Path, _size: int, _modified_ns: int) -> str:
    """The file's SHA-256; a file that has not changed is read once, as weights take seconds per gigabyte."""
    return rundir.file_sha256(path)


def _commit(name: str, revision: str | None) -> str:
    """The commit that a Hub repository's branch, tag or commit is at: the folder its configuration is cached in."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    with explained(ModelRequest(name, revision), "files"):
        try:
            path = hf_hub_download(name, "config.json", revision=revision)
        except EntryNotFoundError:  # an adapter
            path = hf_hub_download(name, "adapter_config.json", revision=revision)
    return Path(path).parent.name


def _source(request: ModelRequest) -> dict[str, Any]:
    return {"revision": request.revision, "trust_remote_code": request.trust_remote_code}


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _check_folder(request: ModelRequest) -> None:
    """ConfigFailure when `model` is meant as a folder and is none with a model in it."""
    folder = Path(request.model)
    if not folder.is_dir():
        if request.model.startswith((".", "/", "~")) or request.model.count("/") > 1 or folder.exists():
            raise ConfigFailure(
                f"model={request.model}: there is no such folder.", "Check the path, or use a Hub name."
            )
        return
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigFailure(
            f"model={folder} holds an adapter, not a model (adapter_config.json and no config.json).",
            f"--set adapter={folder} --set model={_base_of(folder) or 'ITS_BASE_MODEL'}",
        )
    raise ConfigFailure(
        f"model={folder} is not a model folder: it has no config.json.",
        "Name the folder that save_pretrained wrote (often a sub-folder such as checkpoint-…).",
    )


def _check_weights(request: ModelRequest) -> None:
    if (folder := Path(request.model)).is_dir() and not _files(folder, WEIGHT_PATTERNS):
        raise ConfigFailure(
            f"model={folder} has a config.json but no weights (looked for {' and '.join(WEIGHT_PATTERNS)}).",
            "Copy the weights there too; an ignore rule such as *.safetensors or *.bin may have left them behind.",
        )


def _base_of(adapter: Path) -> str | None:
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    return str(base) if base else None


def check_base(request: ModelRequest) -> None:
    """ConfigFailure when an adapter that we trained says that it was for other weights than this model's."""
    try:
        trained_on = json.loads((Path(str(request.adapter)) / "training.json").read_text())["model_digest"]
    except (OSError, ValueError, KeyError, TypeError):  # not one of ours
        return
    if trained_on != digest(request.model, request.revision):
        raise _other_base(str(request.adapter), "it was trained on weights with another digest")


def _with_adapter(model: Any, adapter: str) -> Any:
    """The model wrapped by peft with the adapter in it; ConfigFailure when the two do not belong together."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ConfigFailure(
            f"adapter={folder} is not an adapter folder: it has no adapter_config.json.",
            "Name the folder that peft's save_pretrained wrote.",
        )
    request = ModelRequest(model=adapter)
    with explained(request, "adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of weights it misses; they are counted below
        wanted = {name for name in load_peft_weights(adapter, device="cpu") if "lora_" in name}
        try:
            wrapped = PeftModel.from_pretrained(model, adapter)
        except (RuntimeError, ValueError) as error:  # sizes differ; no module of the names it is for
            raise _other_base(adapter, f"it does not fit: {_first_line(error)}") from error
        found = {name for name in get_peft_model_state_dict(wrapped, save_embedding_layers=False) if "lora_" in name}
    if wrapped.active_peft_config.is_prompt_learning:
        raise ConfigFailure(f"adapter={adapter} learns prompts, which this engine cannot run.", "Use a LoRA adapter.")
    if wanted != found:
        raise _other_base(
            adapter,
            f"{len(wanted - found)} of its {len(wanted)} weights have no place in it, "
            f"and {len(found - wanted)} places stay empty",
        )
    return wrapped


def _other_base(adapter: str, why: str) -> ConfigFailure:
    base = _base_of(Path(adapter)) if Path(adapter).is_dir() else None
    return ConfigFailure(
        f"adapter={adapter} was made for another base than this model: {why}.",
        f"--set model={base}" if base else "Name the base model that the adapter was trained on.",
    )


@contextlib.contextmanager
def explained(request: ModelRequest, what: str) -> Iterator[None]:
    """Turns what transformers, peft and the Hub client raise while loading into a ConfigFailure with a hint."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        message, hint = _reason(error, request)
        raise ConfigFailure(f"The {what} of {request.model} cannot be loaded: {message}", hint) from error


def _reason(error: BaseException, request: ModelRequest) -> tuple[str, str]:
    """What a loading error means for the user, and what to do: transformers wraps the telling error in others."""
    from huggingface_hub import errors

    chain = list(_chain(error))
    text = " ".join(str(link) for link in chain)
    if _any(chain, errors.GatedRepoError):
        return (
            "it is gated, and this account has no access.",
            f"Accept its terms on https://huggingface.co/{request.model} and set HF_TOKEN to a token of that account.",
        )
    if _any(chain, errors.RevisionNotFoundError):
        return f"it has no revision {request.revision}.", "Use a branch, tag or commit hash of that repository."
    if _any(chain, errors.RepositoryNotFoundError):
        return (
            "the Hub has no model of that name (or it is private).",
            "Check the spelling; for a private model set HF_TOKEN; for a folder give a path such as ./my-model.",
        )
    if _any(chain, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) or "offline" in text:
        return (
            "it is neither a folder here nor in the local cache, and the Hub cannot be reached.",
            "Check the spelling and the network, unset HF_HUB_OFFLINE, or give the path of a folder.",
        )
    if "trust_remote_code" in text:
        return (
            "it brings Python code of its own, which would run on this machine.",
            "If you trust its authors: --set trust_remote_code=true",
        )
    if "does not recognize this architecture" in text:
        return _first_line(
            error
        ), "The model is newer than the transformers installed here, or its config.json is wrong."
    if "out of memory" in text:
        return "it does not fit into the memory of the device.", "Use a larger GPU, or --set dtype=bfloat16."
    return f"{_first_line(error)} ({type(error).__name__})", "Check the folder or name, and that no file is cut short."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _any(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(link, kinds) for link in chain)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
