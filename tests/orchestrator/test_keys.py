"""Account keys: where they are found, how they are kept, and that they are never shown, however a text is cut."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator import config, keys
from orchestrator.errors import ConfigError, UsageError
from orchestrator.keys import MASK, Masker

VALUE = "secret_k3y-Value.0123456789"


@st.composite
def secrets_in_text(draw: st.DrawFn) -> tuple[list[str], str]:
    """Secrets of few letters, which overlap each other and themselves, and a text full of them and their parts."""
    secrets = draw(st.lists(st.text("ab", min_size=6, max_size=9), min_size=1, max_size=3))
    part = st.tuples(st.sampled_from(secrets), st.integers(0, 9), st.integers(0, 9)).map(
        lambda p: p[0][p[1] : -p[2] or 9]
    )
    pieces = st.one_of(st.sampled_from(secrets), part, st.text("ab", max_size=4), st.text(max_size=2))
    return secrets, "".join(draw(st.lists(pieces, max_size=8)))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return folder


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_keys_are_looked_for_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment before the provider's own file before the user config file; each place is named."""
    assert keys.find("lambda") is None
    assert keys.find("vast") is None
    places = {"lambda": home / ".lambda_cloud" / "lambda_keys", "vast": home / ".config" / "vastai" / "vast_api_key"}
    contents = {"lambda": "api_key = from-file\n", "vast": "from-file\n"}
    for provider, variable in keys.VARIABLES.items():
        assert keys.store(provider, "from-config") == keys.user_config()
        found = keys.find(provider)
        assert found == keys.Key(provider, "from-config", str(keys.user_config()), keys.user_config())
        write(places[provider], contents[provider])
        found = keys.find(provider)
        assert found == keys.Key(provider, "from-file", str(places[provider]), places[provider])
        monkeypatch.setenv(variable, " from-environment\n")
        assert keys.find(provider) == keys.Key(provider, "from-environment", variable)


@pytest.mark.parametrize(
    "content",
    [
        "api_key = KEY",
        "api_key=KEY\n",
        "# mine\r\n  api_key  =  KEY  \r\nother = x\r\n",
        "\ufeffapi_key = KEY\n",
        'api_key = "KEY"\n',
        "my_api_key = no\napi_key = KEY\n",
    ],
)
def test_the_file_of_lambda_tools_is_read(home: Path, content: str) -> None:
    """The file is read as other tools write it, and as people edit it."""
    write(home / ".lambda_cloud" / "lambda_keys", content.replace("KEY", VALUE))
    found = keys.find("lambda")
    assert found is not None
    assert found.value == VALUE


@pytest.mark.parametrize("content", ["", "\n", "nothing here", "# api_key = x", "api_key =\n"])
def test_a_file_without_a_key_is_passed_over(home: Path, content: str) -> None:
    """A file in which no key stands is as if it were not there."""
    write(home / ".lambda_cloud" / "lambda_keys", content)
    assert keys.find("lambda") is None


def test_the_users_configuration_folder_counts(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CONFIG_HOME is looked at first where it is set, ~/.config all the same."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    write(home / ".config" / "vastai" / "vast_api_key", "second-place")
    second = keys.find("vast")
    write(tmp_path / "xdg" / "vastai" / "vast_api_key", "first-place")
    first = keys.find("vast")
    assert (second and second.value, first and first.value) == ("second-place", "first-place")


@pytest.mark.parametrize("value", ["two words", "tab\tbed", "line\nbreak", "\x1b[31m", "ключ", "", "a" * 2000])
def test_what_cannot_be_a_key_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Such a value is neither stored nor used, and no message has it."""
    with pytest.raises(UsageError) as caught:
        keys.store("lambda", value)
    assert not keys.user_config().exists()
    said = [caught.value.message]
    if value:
        monkeypatch.setenv("LAMBDA_API_KEY", value)
        with pytest.raises(ConfigError) as found:
            keys.find("lambda")
        assert "LAMBDA_API_KEY" in found.value.message
        said.append(found.value.message)
        assert not [words for words in said if value in words]


def test_a_stored_key_is_for_its_owner_alone() -> None:
    """The user config file is private whatever the umask, and keeps what else stands in it."""
    write(keys.user_config(), '{"color": "never", "keys": {"vast": "old-vast"}}').chmod(0o644)
    before = os.umask(0)
    try:
        keys.store("lambda", VALUE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(keys.user_config().stat().st_mode) == 0o600
    assert keys.stored() == {"color": "never", "keys": {"vast": "old-vast", "lambda": VALUE}}
    keys.store("lambda", "another-key")
    assert keys.stored()["keys"] == {"vast": "old-vast", "lambda": "another-key"}


def test_merging_keeps_what_is_there() -> None:
    """What comes from elsewhere adds to the user config file and changes nothing in it."""
    keys.store("lambda", "mine")
    assert keys.merge({"a": 1, "keys": {"lambda": "theirs", "vast": "new"}}, replace=False) == ["vast"]
    assert keys.stored() == {"a": 1, "keys": {"lambda": "mine", "vast": "new"}}


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"keys": []}', '{"keys": {"vast": 1}}', '{"keys": {"vast": "a b"}}']
)
def test_a_damaged_configuration_is_not_overwritten(text: str) -> None:
    """A user config file that is none is said to be so, and stays as it is when a key is to be stored."""
    write(keys.user_config(), text)
    for action in (lambda: keys.find("vast"), lambda: keys.store("vast", VALUE)):
        with pytest.raises(ConfigError, match=r"config\.json is damaged"):
            action()
    assert keys.user_config().read_text() == text


def test_a_file_that_cannot_be_read_is_named(home: Path) -> None:
    """Where a folder lies in place of a key file, the error names it."""
    (home / ".lambda_cloud" / "lambda_keys").mkdir(parents=True)
    with pytest.raises(ConfigError, match="lambda_keys cannot be read"):
        keys.find("lambda")


def test_a_configuration_that_cannot_be_written_is_said() -> None:
    """A folder in place of the lock file becomes words, not a traceback."""
    (config.state_folder() / "config.lock").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        keys.store("vast", VALUE)


def test_two_keys_stored_at_once() -> None:
    """Two processes that store a key each lose neither."""
    script = "import sys; from orchestrator import keys; keys.store(sys.argv[1], sys.argv[2])"
    words = [[sys.executable, "-c", script, provider, f"key-of-{provider}"] for provider in keys.VARIABLES]
    assert [child.wait(timeout=30) for child in [subprocess.Popen(each) for each in words]] == [0, 0]
    assert keys.stored()["keys"] == {"lambda": "key-of-lambda", "vast": "key-of-vast"}


def test_printing_a_key_does_not_show_it() -> None:
    """No usual way of printing a key object has its value."""
    key = keys.Key("lambda", VALUE, "LAMBDA_API_KEY")
    assert VALUE not in f"{key} {key!r} {[key]}"


def by_hand(text: str, secrets: list[str]) -> str:
    """The slow way: mark every character of every occurrence, then put one MASK for each unbroken stretch."""
    marked = [False] * len(text)
    for secret in secrets:
        for at in range(len(text)):
            if len(secret) >= 6 and text.startswith(secret, at):
                marked[at : at + len(secret)] = [True] * len(secret)
    return "".join(
        (text[at] if not mark else MASK if not (at and marked[at - 1]) else "") for at, mark in enumerate(marked)
    )


@settings(deadline=None)
@given(secrets_in_text())
@example((["abcabc", "bcabcab"], "abcabcab"))
def test_every_character_of_a_secret_goes(case: tuple[list[str], str]) -> None:
    """Masking takes out exactly the characters that belong to a secret, overlapping ones too."""
    secrets, text = case
    assert keys.masked(text, more=secrets) == by_hand(text, secrets)


@settings(max_examples=400, deadline=None)
@given(st.data(), secrets_in_text())
def test_a_stream_is_masked_as_the_whole(data: st.DataObject, case: tuple[list[str], str]) -> None:
    """However a stream is cut, even inside a character, what comes out together is the whole text masked."""
    secrets, text = case
    raw = text.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    masker, shown = Masker(secrets), b""
    for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        shown += masker.feed(raw[start:stop])
    assert (shown + masker.flush()).decode("utf-8", "surrogatepass") == by_hand(text, secrets)


@settings(deadline=None)
@given(secrets_in_text())
def test_only_a_possible_secret_is_held_back(case: tuple[list[str], str]) -> None:
    """What cannot be the start of a secret is shown at once: a progress line does not wait for the next one."""
    secrets, text = case
    masker = Masker(secrets)
    shown = masker.feed(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")
    held = max((n for s in secrets for n in range(len(s)) if text.endswith(s[:n])), default=0)
    assert len(by_hand(text, secrets)) - len(shown) <= held + len(MASK)
    if not held:
        assert shown == by_hand(text, secrets)


def test_which_secrets_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token, account keys and the variables that were passed are masked; what is too short to be a secret is not."""
    for name in (*keys.SECRET_VARIABLES, "MINE", "NOT_MINE"):
        monkeypatch.setenv(name, f"value-of-{name}\n")
    monkeypatch.setenv("SHORT", "short")
    text = "value-of-HF_TOKEN/value-of-LAMBDA_API_KEY/value-of-VAST_API_KEY/value-of-MINE/value-of-NOT_MINE/short"
    assert keys.masked(text, ["MINE", "SHORT", "UNSET"]) == "***/***/***/***/value-of-NOT_MINE/short"
