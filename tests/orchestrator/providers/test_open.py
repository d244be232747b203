"""Opening a cloud: the key that is found, the words when there is none, and who else can read it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import config, keys, providers
from orchestrator.errors import ConfigError, UsageError
from orchestrator.providers import base
from orchestrator.providers.lambda_cloud import LambdaCloud
from tests.orchestrator.providers.loopback import Scripted, Server, Time

ROOT = Path(__file__).parents[3]
KEY = "secret_k3y-Value.0123456789"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(providers, "_WARNED", set())


def test_a_cloud_is_opened_with_the_key_that_is_found(
    server: Server, time: Time, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key of the environment is what is sent; opening asks nothing and says nothing."""
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    monkeypatch.setenv("GPU_LAMBDA_URL", server.url)
    cloud = providers.open("lambda")
    assert isinstance(cloud, LambdaCloud)
    assert (server.asked, tuple(capsys.readouterr())) == ([], ("", ""))
    server.usual = lambda _: Scripted(200, {"data": {}})
    assert cloud.offers(base.Need()) == []
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_one_is_told_where_to_get_it() -> None:
    """The error names the variable, the page where keys are made, and the command that takes one."""
    with pytest.raises(ConfigError) as caught:
        providers.open("lambda")
    for word in ("LAMBDA_API_KEY", "https://cloud.lambda.ai/api-keys", "gpu doctor"):
        assert word in caught.value.hint


def test_an_unknown_cloud_is_a_typo() -> None:
    """A name that is not in the table is answered with those that are."""
    with pytest.raises(UsageError, match="lambda"):
        providers.open("lambada")


def test_a_key_file_that_others_can_read_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A file readable by others still works, and is told of on stderr, once, with what to type, without the key."""
    path = keys.store("lambda", KEY)
    providers.open("lambda")
    assert tuple(capsys.readouterr()) == ("", "")
    path.chmod(0o644)
    for _ in range(2):
        providers.open("lambda")
    out, err = capsys.readouterr()
    assert (out, err.count("chmod 600"), err.count(str(config.state_folder() / "config.json"))) == ("", 1, 2)
    assert KEY not in err


def test_the_table_imports_nothing_heavy() -> None:
    """Looking at the clouds' table, or making one, imports neither requests nor tenacity."""
    script = (
        "import sys; from orchestrator import providers; "
        "providers.PROVIDERS['lambda'].kind()('some-long-key'); "
        "print([name for name in ('requests', 'tenacity', 'urllib3') if name in sys.modules])"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
