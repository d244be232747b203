"""Models load as asked, are told apart by digest, and say in words why they cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny_models import model, tokenizer

from worker import models
from worker.failures import ConfigFailure
from worker.models import ModelRequest, choose_device, choose_dtype, digest, load_config, load_model, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft 0.21 reads it


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model("qwen2", torch.float32).save_pretrained(folder)
    tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def adapter_for(kind: str, target: Path, **changes: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    base = model(kind, torch.float32)
    base.name_or_path = "org/base"
    get_peft_model(base, LoraConfig(**{**settings, **changes})).save_pretrained(target, save_embedding_layers=False)
    return target


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def failure(request: ModelRequest) -> ConfigFailure:
    with pytest.raises(ConfigFailure) as caught:
        load_model(request)
    return caught.value


def test_a_folder_loads_with_what_auto_became(folder: Path) -> None:
    """On a CPU auto is float32; weights, tokenizer and template are those saved, in evaluation mode."""
    loaded = load_model(ModelRequest(str(folder), device="cpu"))
    assert (loaded.device.type, loaded.dtype, loaded.revision) == ("cpu", torch.float32, None)
    assert not loaded.model.training
    assert loaded.parameters == sum(one.numel() for one in loaded.model.parameters())
    for name, weight in model("qwen2", torch.float32).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert loaded.tokenizer("<s>é")["input_ids"] == tokenizer()("<s>é")["input_ids"]
    assert loaded.tokenizer.chat_template == "{{ messages[0].content }}"
    assert load_config(ModelRequest(str(folder))).model_type == "qwen2"


@pytest.mark.parametrize("name", models.DTYPES)
def test_a_dtype_asked_for_is_the_weights_dtype(folder: Path, name: str) -> None:
    """Whatever dtype the file has, the weights come in the one asked for."""
    loaded = load_model(ModelRequest(str(folder), dtype=name, device="cpu"))
    assert {one.dtype for one in loaded.model.parameters()} == {getattr(torch, name)} == {loaded.dtype}


def test_a_small_model_on_a_cpu_runs_in_one_thread(folder: Path) -> None:
    """Below 20 million parameters splitting work between threads only costs."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        load_model(ModelRequest(str(folder), device="cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_devices_and_dtypes_that_do_not_exist_are_refused() -> None:
    """Names torch or we do not know, and a GPU where there is none, are ConfigFailures."""
    for wrong in ("gpu", "cuda:zero", "cuda"):
        if wrong != "cuda" or not torch.cuda.is_available():
            with pytest.raises(ConfigFailure, match=f"device={wrong}"):
                choose_device(wrong)
    with pytest.raises(ConfigFailure, match="dtype=int8"):
        choose_dtype("int8", torch.device("cpu"))
    assert choose_dtype("auto", torch.device("mps")) == torch.float16


def test_end_tokens_are_known_before_weights_load(folder: Path) -> None:
    """They come from generation_config.json, or without one from config.json, and from the tokenizer."""
    (folder / "model.safetensors").unlink()
    request = ModelRequest(str(folder))
    words = load_tokenizer(request)
    change_json(folder / "generation_config.json", eos_token_id=[7, 8])
    assert models.end_token_ids(models.load_generation_config(request), words) == {2, 7, 8}
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", eos_token_id=9)
    assert models.end_token_ids(models.load_generation_config(request), words) == {2, 9}


def test_a_cached_hub_model_is_known_by_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Revision and digest of a Hub model or adapter are the commit its branch is at, also before weights load."""
    commits = {"model": "a" * 40, "adapter": "b" * 40}
    adapter_for("qwen2", tmp_path / "adapter")
    for name, commit in commits.items():
        repository = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(tmp_path / name, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert digest("org/model", None) == digest("org/model", "main") == f"commit:{commits['model']}"
    loaded = load_model(ModelRequest("org/model", adapter="org/adapter", device="cpu"))
    assert (loaded.revision, loaded.digest) == (commits["model"], f"commit:{commits['model']}")
    assert loaded.adapter_digest == f"commit:{commits['adapter']}"


def test_an_adapter_is_put_over_the_model(folder: Path, tmp_path: Path) -> None:
    """The adapter changes the model's scores, and has a digest of its own beside the model's."""
    adapter = adapter_for("qwen2", tmp_path / "adapter")
    plain = load_model(ModelRequest(str(folder), device="cpu"))
    tuned = load_model(ModelRequest(str(folder), adapter=str(adapter), device="cpu"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert not torch.allclose(plain.model(ids).logits, tuned.model(ids).logits)
    assert tuned.digest == plain.digest
    assert tuned.adapter_digest == digest(str(adapter), None) != plain.digest
    assert plain.adapter_digest is None


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    """An adapter with other module names, other sizes or fewer layers is not half applied; its own base is named."""
    other_names = adapter_for("gpt2", tmp_path / "names", target_modules=["c_attn"], fan_in_fan_out=True)
    other_sizes = adapter_for("qwen2", tmp_path / "sizes")
    change_json(other_sizes / "adapter_config.json", r=4)
    fewer_layers = adapter_for("qwen2", tmp_path / "layers", layers_to_transform=[0])
    change_json(fewer_layers / "adapter_config.json", layers_to_transform=None)
    reasons = {other_names: "it does not fit", other_sizes: "it does not fit", fewer_layers: "2 places stay empty"}
    for adapter, reason in reasons.items():
        error = failure(ModelRequest(str(folder), adapter=str(adapter), device="cpu"))
        assert "made for another base" in error.message
        assert reason in error.message
        assert error.hint == "--set model=org/base"


def test_a_folder_that_is_no_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    """A folder without adapter_config.json is named as such."""
    assert "no adapter_config.json" in failure(ModelRequest(str(folder), adapter=str(tmp_path))).message


def test_an_adapter_given_as_the_model_is_told_apart(tmp_path: Path) -> None:
    """The hint has the two settings that were meant."""
    adapter = adapter_for("qwen2", tmp_path / "adapter")
    assert failure(ModelRequest(str(adapter))).hint == f"--set adapter={adapter} --set model=org/base"


def test_folders_without_a_model_are_refused(folder: Path, tmp_path: Path) -> None:
    """A missing folder, a folder of something else, and one that lost its weights or tokenizer are each named."""
    assert "no such folder" in failure(ModelRequest(str(tmp_path / "nowhere"))).message
    assert "no such folder" in failure(ModelRequest("./nowhere")).message
    assert "no config.json" in failure(ModelRequest(str(tmp_path))).message
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    error = failure(ModelRequest(str(folder)))
    assert "model*.safetensors and pytorch_model*.bin" in error.message
    assert "ignore rule" in error.hint
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer files" in failure(ModelRequest(str(folder))).message


def test_damaged_files_are_refused(folder: Path) -> None:
    """Weights cut short, an unknown architecture and a broken configuration end in words, not in a traceback."""
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    error = failure(ModelRequest(str(folder), device="cpu"))
    assert "weights" in error.message
    assert "cut short" in error.hint
    change_json(folder / "config.json", model_type="from_the_future")
    assert "newer than the transformers" in failure(ModelRequest(str(folder))).hint
    (folder / "config.json").write_text("{")
    assert str(folder) in failure(ModelRequest(str(folder))).message


def test_code_of_the_model_runs_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    """A model that brings code is refused with the setting that allows it, and its code has not run."""
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nfrom transformers import Qwen2Config\n"
        "class MyConfig(Qwen2Config):\n    model_type = 'mine'\n"
    )
    change_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    with pytest.raises(ConfigFailure) as caught:
        load_config(ModelRequest(str(folder)))
    assert "trust_remote_code=true" in caught.value.hint
    assert not ran.exists()
    load_config(ModelRequest(str(folder), trust_remote_code=True))
    assert ran.exists()


def test_the_digest_changes_with_every_file_that_matters(folder: Path) -> None:
    """Weights, configuration, tokenizer and template change it; a readme or the folder's own name do not."""
    seen = {digest(str(folder), None)}
    (folder / "README.md").write_text("hello")
    moved = folder.rename(folder.with_name("moved"))
    assert digest(str(moved), None) in seen
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        with (moved / name).open("a") as file:
            file.write(" ")
        seen.add(digest(str(moved), None))
    assert len(seen) == 6


def test_a_manifest_is_believed_but_for_sizes(folder: Path) -> None:
    """With a MANIFEST.json its entries are the digest, whatever their order; a file of another size is refused."""
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": "00"} for name in ("config.json", "tokenizer.json")
    }
    manifest = folder / "MANIFEST.json"
    manifest.write_text(json.dumps(entries))
    first = digest(str(folder), None)
    manifest.write_text(json.dumps(dict(reversed(entries.items()))))
    assert digest(str(folder), None) == first
    entries["config.json"]["sha256"] = "01"
    manifest.write_text(json.dumps(entries))
    assert digest(str(folder), None) != first
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigFailure, match=r"config\.json has 2 bytes"):
        digest(str(folder), None)


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face Hub does for a gated repository, an unknown one, and an unknown revision."""

    def do_HEAD(self) -> None:
        """The Hub tells the cases apart by the header X-Error-Code."""
        status, code = (403, "GatedRepo") if "/gated/" in self.path else (404, "RepoNotFound")
        if "/known/" in self.path:
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815  the name http.server looks for

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""


ASK = """
import sys, json
from worker.failures import ConfigFailure
from worker.models import ModelRequest, load_config
for name in sys.argv[1:]:
    try:
        load_config(ModelRequest(name, revision="v9"))
    except ConfigFailure as failure:
        print(json.dumps([failure.message, failure.hint]))
"""


def ask_hub(endpoint: str, cache: Path, *names: str) -> list[list[str]]:
    """Message and hint for each name, from a process of its own: the Hub client reads its settings once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(models.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_the_hub_says_is_told_in_words(tmp_path: Path) -> None:
    """Gated, unknown, unknown revision: each has its own sentence, and the gated one mentions HF_TOKEN."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        gated, unknown, revision = ask_hub(endpoint, tmp_path, "gated/model", "nobody/model", "known/model")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert "it is gated" in gated[0]
    assert "HF_TOKEN" in gated[1]
    assert "no model of that name" in unknown[0]
    assert "no revision v9" in revision[0]


def test_offline_a_name_that_is_not_cached_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network the message says that the name is neither a folder nor cached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = failure(ModelRequest("nobody/model"))
    assert "neither a folder here nor in the local cache" in error.message
