"""A job is looked at before a machine is rented: what the Hub says, refuses or never says, and what follows from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import spec
from orchestrator import planning, preflight
from orchestrator.preflight import Preflight, hub
from orchestrator.preflight.findings import Fault
from orchestrator.preflight.hub import Hub
from orchestrator.preflight.model import fetched
from orchestrator.providers.base import Need, Offer
from tests.orchestrator import playing_hub
from tests.orchestrator.playing_hub import COMMIT, PlayedHub, Repository, instruct_8b
from worker import libraries

TOKEN = "hf_SecretOfTheUser0123456789"
NAME = "maker/chat-8b"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedHub]:
    """A Hub with one instruction model, asked quickly and given up soon."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "_PAUSE_S", 0.001)
    monkeypatch.setattr(hub, "_PAUSE_MAX_S", 0.01)
    with playing_hub.running() as server:
        server.repositories[NAME] = instruct_8b()
        server.accounts[TOKEN] = True
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def job(**params: Any) -> dict[str, Any]:
    """An evaluation as planning makes it, with these parameters."""
    words = {name: str(value) for name, value in {"model": NAME, **params}.items()}
    return planning.request(planning.Asked("local", words), spec.find("eval-gsm8k", [spec.CATALOG]))


def offer(vram_gb: float | None = 24.0, disk_gb: float | None = 200.0, count: int = 1) -> Offer:
    return Offer("lambda", "1", "gpu_1x_a10", "A10", count, vram_gb, 30, 200.0, disk_gb, "us-east-1", 0.75)


def codes(found: Preflight) -> list[tuple[str, str]]:
    return [(finding.level, finding.code) for finding in found.findings]


def everything(found: Preflight) -> str:
    return "\n".join([json.dumps(found.document()), *found.lines(), repr(found)])


def test_a_sound_model_is_sized_from_small_reads_alone(played: PlayedHub) -> None:
    """Weights, memory, disk and download time follow from sizes and configuration; no weight is asked for."""
    found = preflight.check(job(), offer())
    assert codes(found) == []
    # 8,030,261,248 parameters of 2 bytes; four shards of together 16,060,556,376 bytes, at 100 MB/s.
    assert found.weights_gb == pytest.approx(16.060522496)
    assert found.download_s == pytest.approx(160.7, abs=0.2)  # with the tokenizer, not with original/*.pth
    assert found.needed_disk_gb == pytest.approx(16.07 + 8 + 2, abs=0.01)
    assert found.needed_vram_gb == pytest.approx(17.3, abs=0.1)
    assert not [path for path in played.paths() if "safetensors" in path and not path.endswith(".index.json")]
    assert "tokenizer.json" not in " ".join(path.rpartition("/")[2] for path in played.paths())
    assert found.lines()[0].startswith(f"model={NAME}: 16.1 GB of weights, about 17.3 GB of GPU memory")


def test_files_are_read_from_the_commit_that_was_listed(played: PlayedHub) -> None:
    """A branch that moves meanwhile does not mix two versions: all small files are of one commit."""
    preflight.look(job(revision="main"))
    assert all(f"/resolve/{COMMIT}/" in path for path in played.paths()[1:])


@pytest.mark.parametrize(
    ("settings_", "level", "code", "words"),
    [
        ({"model": "maker/chat-9b"}, "error", "no_such_model", "maker/chat-9b"),
        ({"model": "gpt17"}, "error", "no_such_model", "gpt17"),
        ({"revision": "v2"}, "error", "no_such_revision", "v2"),
        ({"adapter": "maker/nothing"}, "error", "no_such_model", "adapter=maker/nothing"),
        ({"adapter": NAME}, "error", "no_adapter", "adapter_config.json"),
    ],
)
def test_what_does_not_exist_is_named(
    played: PlayedHub, settings_: dict[str, str], level: str, code: str, words: str
) -> None:
    """A name or revision that the Hub does not have stops the job, with what was asked in the message."""
    found = preflight.look(job(**settings_))
    assert codes(found) == [(level, code)]
    assert words in found.findings[0].message
    assert found.errors == found.findings


def test_gated_models_say_where_to_accept_their_terms(played: PlayedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token, with one of an account without access, and with one that has it."""
    played.repositories[NAME].gated = True
    found = preflight.look(job())
    assert codes(found) == [("error", "gated")]
    assert "HF_TOKEN is not set" in found.findings[0].message
    assert f"{played.url}/{NAME}" in found.findings[0].hint
    played.accounts[TOKEN] = False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = preflight.look(job())
    assert codes(found) == [("error", "gated")]
    assert "no access" in found.findings[0].message
    played.accounts[TOKEN] = True
    assert codes(preflight.look(job())) == []
    del played.accounts[TOKEN]
    found = preflight.look(job())
    assert codes(found) == [("error", "bad_token")]
    assert TOKEN not in everything(found)


def test_a_token_without_the_right_is_told_so(played: PlayedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine-grained token that may not read gated repositories is refused in the Hub's words."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    played.odd["/config.json"] = lambda handler: handler.refuse(403, None, f"Please enable access {TOKEN}\x1b[31m")
    found = preflight.look(job())
    assert codes(found) == [("error", "no_access")]
    assert "Please enable access" in found.findings[0].message
    assert "fine-grained" in found.findings[0].hint
    assert TOKEN not in everything(found)
    assert "\x1b" not in found.findings[0].message


def test_what_was_typed_cannot_move_the_terminal(played: PlayedHub) -> None:
    """A name with escape sequences in it is shown without them, to people and to scripts."""
    found = preflight.look(job(model="maker/\x1b[31mred"))
    assert codes(found) == [("error", "no_such_model")]
    assert "\x1b" not in "".join(found.lines())
    shown = found.document()
    assert "\x1b" not in shown["model"] + shown["findings"][0]["message"]


def test_the_token_goes_to_the_hub_alone(played: PlayedHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A redirect to another host is followed without the token, one on the same host with it; ~/.netrc adds nothing."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password FromNetrc\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with playing_hub.running() as elsewhere:
        elsewhere.odd["/config.json"] = lambda handler: handler.answer(
            200, played_config, {"Content-Type": "text/plain"}
        )
        played_config = playing_hub.document(playing_hub.LLAMA_8B)
        played.odd["/config.json"] = playing_hub.redirect(f"{elsewhere.url}/cdn/config.json")
        assert codes(preflight.look(job())) == []
        assert elsewhere.asked == [("/cdn/config.json", None)]
    assert {sent for _, sent in played.asked} == {f"Bearer {TOKEN}"}
    played.odd = {"/old/name/revision/main": playing_hub.redirect(f"/api/models/{NAME}/revision/main?blobs=true")}
    played.asked.clear()
    Hub("model", "old/name").listing()
    assert [sent for _, sent in played.asked] == [f"Bearer {TOKEN}"] * 2
    monkeypatch.delenv("HF_TOKEN")
    Hub("model", NAME).listing()
    assert played.asked[-1][1] is None


def test_the_token_does_not_go_where_anybody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect from an encrypted Hub to an address that is not is not followed."""
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    asked = Hub("model", NAME)
    opened: list[str] = []

    class Redirect:
        is_redirect = True

        def __init__(self) -> None:
            self.headers = {"location": "http://127.0.0.1:9/x"}

        def __enter__(self) -> Redirect:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(asked, "_open", lambda url: opened.append(url) or Redirect())
    with pytest.raises(Fault, match="not encrypted"):
        asked._follow("https://127.0.0.1:9/api", 10)
    assert opened == ["https://127.0.0.1:9/api"]


@pytest.mark.parametrize(
    ("path", "act"),
    [
        ("/revision/main", playing_hub.hang),
        ("/revision/main", playing_hub.drip(b"HTTP/1.1 200 OK\r\nX-A: ")),
        ("/revision/main", playing_hub.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{")),
        ("/config.json", playing_hub.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{")),
    ],
    ids=["hangs", "drips headers", "drips a body", "drips a file"],
)
def test_a_hub_that_never_ends_is_given_up(
    played: PlayedHub, monkeypatch: pytest.MonkeyPatch, path: str, act: Callable[[Any], None]
) -> None:
    """However slowly the Hub answers, looking ends by its deadline with a warning, and the job is not stopped."""
    monkeypatch.setattr(hub, "DEADLINE_S", 0.6)
    played.odd[path] = act
    began = time.monotonic()
    found = preflight.check(job(), offer())
    assert time.monotonic() - began < 10
    assert codes(found) == [("warning", "not_looked_at")]
    assert "is not known" in found.findings[0].message


@pytest.mark.parametrize(
    "act",
    [
        playing_hub.page(200),
        playing_hub.page(403),
        playing_hub.page(404),
        lambda handler: handler.answer(200, b"[1, 2]", {"Content-Type": "application/json"}),
        lambda handler: handler.answer(200, b'{"siblings": 3}', {"Content-Type": "application/json"}),
        lambda handler: handler.answer(200, b"[" * 100_000, {"Content-Type": "application/json"}),
        lambda handler: handler.answer(418, b"{}", {"Content-Type": "application/json"}),
        playing_hub.redirect("/around"),
        playing_hub.redirect("file:///etc/passwd"),
        playing_hub.redirect("http://[bad"),
        lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"),
    ],
)
def test_what_is_no_answer_of_the_hub_is_a_warning(played: PlayedHub, act: Callable[[Any], None]) -> None:
    """A login page, nonsense, or redirects without end: nothing is known, which is said and stops nothing."""
    played.odd["/revision/main"] = act
    played.odd["/around"] = playing_hub.redirect("/around")
    assert codes(preflight.check(job(), offer())) == [("warning", "not_looked_at")]
    assert len(played.asked) <= 6


def test_an_endless_file_is_not_read_to_its_end(played: PlayedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that is none costs its cap, is a warning, and its content is held for unknown."""
    monkeypatch.setattr(preflight.hub, "FILE_MAX_BYTES", 1_000_000)
    played.odd["/tokenizer_config.json"] = playing_hub.endless
    found = preflight.look(job())
    assert codes(found) == [("warning", "not_looked_at")]  # and not: it has no chat template
    assert "1 MB" in found.findings[0].message
    assert found.needed_vram_gb
    assert played.sent < 30_000_000  # what the system's own buffers hold comes on top of the cap


def test_a_busy_hub_is_asked_again_a_few_times(played: PlayedHub) -> None:
    """Two refusals are waited out; a Hub that stays busy is asked three times and no more."""
    answers = iter([503, 429])

    def busy(handler: Any) -> None:
        if (status := next(answers, None)) is None:
            played.odd.clear()
            handler.do_GET()
        else:
            handler.answer(status, b"", {"Retry-After": "3000"})

    played.odd["/revision/main"] = busy
    assert codes(preflight.look(job())) == []
    played.odd["/revision/main"] = playing_hub.page(503)
    played.asked.clear()
    assert codes(preflight.look(job())) == [("warning", "not_looked_at")]
    assert len(played.asked) == 3


def test_no_hub_at_all_is_a_warning(played: PlayedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that cannot be reached, an address that is none, and a user who wants to stay offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = preflight.look(job())
    assert "HF_HUB_OFFLINE" in found.findings[0].message
    assert played.asked == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for endpoint in ("http://127.0.0.1:9", "nonsense", "http://[", "ftp://127.0.0.1", "http://"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert codes(preflight.look(job())) == [("warning", "not_looked_at")], endpoint


@pytest.mark.parametrize(
    "name", ["../../api/whoami", "a/../b", "a/b/c", "a b/c", "a/b?x=1", "a/b#x", "", "a//b", "ä/b"]
)
def test_a_name_that_is_none_is_never_asked_for(played: PlayedHub, name: str) -> None:
    """What cannot be a repository's name makes no request at all, so it leads to no other address of the Hub."""
    with pytest.raises(Fault) as caught:
        Hub("model", name).listing()
    assert caught.value.finding.code == "no_such_model"
    assert played.asked == []


def test_a_revision_stays_one_word_of_the_path(played: PlayedHub) -> None:
    """Whatever is typed for a revision, the request asks for that revision of that model."""

    @settings(max_examples=40, deadline=None)
    @given(st.text("a/?#%.&\\: é", min_size=1, max_size=8) | st.text(min_size=1).filter(str.isprintable))
    def asks_for_it(revision: str) -> None:
        played.asked.clear()
        with pytest.raises(Fault):
            Hub("model", NAME, f"no-{revision}").listing()
        path = played.paths()[0]
        assert path.startswith(f"/api/models/{NAME}/revision/no-")
        assert path.endswith("?blobs=true")
        assert path.count("/") == 6
        assert path.count("?") == 1

    asks_for_it()
    played.asked.clear()
    for dots in (".", ".."):
        assert codes(preflight.look(job(revision=dots))) == [("error", "no_such_revision")]
    assert played.asked == []


def test_nothing_is_asked_for_a_command_or_the_built_in_model(played: PlayedHub) -> None:
    """A command and `tiny` need no look: no request, no finding, whatever the machine."""
    command = planning.command(("nvidia-smi",))
    of_a_model = {**job(), "story": "command"}  # a command may have a parameter of that name
    for document in (planning.request(planning.Asked("local", {}), command), of_a_model, job(model="tiny")):
        found = preflight.check(document, offer(vram_gb=None, disk_gb=None))
        assert found == Preflight()
        assert found.lines() == []
    assert played.asked == []


def test_adapters_are_looked_at_too(played: PlayedHub) -> None:
    """An adapter's weights count, one of a kind that the engine cannot run stops the job."""
    config = playing_hub.document({"peft_type": "LORA"})
    files: dict[str, bytes | int] = {"adapter_config.json": config, "adapter_model.safetensors": 500_000_000}
    played.repositories["maker/lora"] = Repository(files)
    plain, adapted = preflight.look(job()), preflight.look(job(adapter="maker/lora"))
    assert (adapted.weights_gb or 0) - (plain.weights_gb or 0) == pytest.approx(0.5)
    files["adapter_config.json"] = playing_hub.document({"peft_type": "PREFIX_TUNING"})
    assert codes(preflight.look(job(adapter="maker/lora"))) == [("error", "adapter_kind")]
    found = preflight.look(job(model="maker/lora"))
    assert codes(found) == [("error", "is_adapter")]


def test_what_is_needed_narrows_what_is_asked_for(played: PlayedHub) -> None:
    """The least memory and disk become part of what is asked of a cloud; a user who asks for more keeps that."""
    found = preflight.look(job())
    need = found.need(Need(gpu="A100"))
    assert need.gpu == "A100"
    assert (need.min_vram_gb, need.disk_gb) == (found.needed_vram_gb, found.needed_disk_gb)
    more = found.need(Need(min_vram_gb=80.0, disk_gb=500.0))
    assert (more.min_vram_gb, more.disk_gb) == (80.0, 500.0)
    assert Preflight().need(Need()) == Need()


def test_the_same_files_count_as_the_worker_fetches() -> None:
    """What a machine downloads is decided by the same rule on both sides."""
    listed = (
        "config.json model.safetensors consolidated.safetensors pytorch_model.bin x.gguf onnx/m.onnx original/a.pth"
    )
    more = "sub/model.safetensors vocab.txt a.jinja README.md tf.h5 sub/x.json"
    names = st.sampled_from(f"{listed} {more}".split())

    @given(st.lists(names, unique=True))
    def same(files: list[str]) -> None:
        assert fetched(files) == libraries.wanted(files)

    same()
