"""Launches that cannot be: one paragraph that says why and what to type, the promised exit code, nothing rented."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator import keys, providers
from tests.cloud import Cloud
from tests.journeys.hurried import Done, begun, document, gpu

A10 = ("launch", "--gpu", "A10", "-y")
USAGE, CONFIG, PROVIDER = 2, 3, 4
LAUNCHES = "/instance-operations/launch"
BAD_WISHES: list[tuple[list[str], int, str]] = [
    (["--gpu", "A1000"], USAGE, "Did you mean A10"),
    (["--gpu", ""], USAGE, "No offer has the GPU ''"),
    (["--gpu", "???"], USAGE, "No offer has the GPU"),
    (["--type", "gpu_1x_a11"], USAGE, "Did you mean gpu_1x_a10"),
    (["--gpu", "H100", "--max-price", "1"], PROVIDER, "'--max-price 1' excludes the last"),
    (["--min-vram", "1000"], PROVIDER, "'--min-vram 1000', which alone excludes all 11"),
    (["--type", "gpu_1x_a10", "--region", "us-south-2"], PROVIDER, "'--region us-south-2' excludes the last 2"),
    (["--gpu", "A10", "--region", "us-east-x"], PROVIDER, "Did you mean us-east-1"),
    (["--type", "gpu_8x_a100_80gb_sxm4", "--count", "8"], PROVIDER, "excludes the last"),
    (["--gpu", "A10", "--spot"], PROVIDER, "'--spot', which alone excludes all"),
    (["--gpu", "A10", "--budget", "-5"], USAGE, "-5.0 is not above 0"),
    (["--gpu", "A10", "--budget", "nan"], USAGE, "nan is not above 0"),
    (["--gpu", "A10", "--max-hours", "-1"], USAGE, "not a number above 0, and not `none`"),
    (["--gpu", "A10", "--budget", "0.05"], USAGE, "A budget of 0.05 USD buys 4 minutes"),
    (["../../etc", "--gpu", "A10"], USAGE, "cannot be the name of a machine"),
    (["local", "--gpu", "A10"], USAGE, "cannot be the name of a machine"),
    (["x" * 64, "--gpu", "A10"], USAGE, "at most 63 of them"),
    (["a b", "--gpu", "A10", "--dry-run"], USAGE, "cannot be the name of a machine"),
    (["--gpu", "A10", "--provider", "nosuch"], USAGE, "'nosuch' is not"),
]


def is_refused(done: Done, code: int, words: str) -> bool:
    """Whether it ended with that code and one paragraph that has the words: no traceback, no bug, nothing on stdout."""
    text = " ".join(done.stderr.split())
    assert done.returncode == code, done.stderr
    assert words in text, done.stderr
    assert "Traceback" not in text
    assert "bug" not in text.lower()
    assert len(done.stderr.strip().splitlines()) <= 6
    return done.stdout == ""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the developer's is found."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(("words", "code", "said"), BAD_WISHES, ids=lambda value: str(value)[:30])
@pytest.mark.first(8)
def test_a_wish_that_cannot_be(light_cloud: Cloud, words: list[str], code: int, said: str) -> None:
    """What nobody offers, or what makes no sense, is refused before anything is asked for or remembered."""
    assert is_refused(gpu("launch", "-y", "-q", *words), code, said)
    assert light_cloud.core.count(LAUNCHES) == 0
    assert light_cloud.core.account.keys == {}
    assert document("status") == []


def test_without_a_key(light_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where to get a key and where to put it is said; with a wrong one, that it is wrong, and never the key itself."""
    monkeypatch.setenv("LAMBDA_API_KEY", "wr0ng-Key-0123456789")
    for words in (A10, ("offers",), ("audit",)):
        wrong = gpu(*words)
        assert is_refused(wrong, CONFIG, "does not accept the account key")
        assert "wr0ng" not in wrong.stderr
    monkeypatch.delenv("LAMBDA_API_KEY")
    for words in (A10, ("offers",), ("audit",)):
        missing = gpu(*words)
        assert is_refused(missing, CONFIG, "LAMBDA_API_KEY")
        assert "https://cloud.lambda.ai/api-keys" in missing.stderr
    assert light_cloud.core.count(LAUNCHES) == 0


def test_a_key_file_that_others_can_read(light_cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the provider's own file is used, and a file that others can read is told of, with what to type."""
    monkeypatch.delenv("LAMBDA_API_KEY")
    path = tmp_path / ".lambda_cloud" / "lambda_keys"
    path.parent.mkdir()
    path.write_text(f"api_key = {light_cloud.key}\n")
    path.chmod(0o644)
    found = gpu("offers", "--json")
    assert found.returncode == 0
    assert json.loads(found.stdout)
    assert f"chmod 600 {path}" in found.stderr
    assert light_cloud.key not in found.stdout + found.stderr


@pytest.mark.parametrize("place", ["/dev/null/gpu", "/proc/gpu", "/proc"])
def test_a_state_folder_that_cannot_be_written(light_cloud: Cloud, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be remembered is not rented."""
    monkeypatch.setenv("GPU_HOME", place)
    assert is_refused(gpu(*A10, "-q"), CONFIG, "Set GPU_HOME to a folder you can write to")
    assert light_cloud.core.count(LAUNCHES) == 0


@pytest.mark.parametrize("fault", ["proxy-page", "failed", "not-sent", "closed", "empty", "redirect"])
def test_a_provider_that_does_not_answer_as_it_should(light_cloud: Cloud, fault: str) -> None:
    """A proxy's page, a provider that is down, half an answer: it is said, and nothing was rented."""
    light_cloud.fault(fault, times=None)
    assert is_refused(gpu(*A10), PROVIDER, "Nothing was rented")
    assert is_refused(gpu("offers", "--json"), PROVIDER, "Lambda Cloud could not list its machines")
    assert light_cloud.core.instances == {}


@pytest.mark.parametrize(("fault", "code"), [("quota", PROVIDER), ("inactive", PROVIDER), ("no-capacity", PROVIDER)])
@pytest.mark.first(1)
def test_a_provider_that_says_no(light_cloud: Cloud, fault: str, code: int) -> None:
    """A launch that is refused ends, says why, leaves the name free, and is not asked for again; cost is nothing."""
    light_cloud.fault(fault, when="launch", times=None)
    refused = gpu(*A10, "-q")
    assert is_refused(refused, code, "Nothing ")
    assert light_cloud.core.count(LAUNCHES) == (2 if fault == "no-capacity" else 1)
    light_cloud.core.faults.clear()
    assert document("cost")["total_usd"] == 0
    assert providers.open("lambda").key_names() == [], "its public key is not left in the account"
    assert gpu(*A10, "--dry-run").returncode == 0
    assert json.loads(gpu(*A10, "--no-wait", "--json").stdout)["state"] == "booting"


def test_a_name_that_is_taken(light_cloud: Cloud) -> None:
    """A second machine of a name is not rented, nor is a rented one forgotten or overwritten."""
    assert gpu("launch", "box", "--gpu", "A10", "-y", "--no-wait").returncode == 0
    before = light_cloud.core.count(LAUNCHES)
    assert is_refused(gpu("launch", "box", "--gpu", "H100", "-y", "-q"), USAGE, "There is a rented machine box already")
    assert is_refused(gpu("add", "box", "someone@127.0.0.1:1"), USAGE, "box is rented")
    assert gpu("forget", "box").returncode == USAGE
    assert light_cloud.core.count(LAUNCHES) == before
    (entry,) = document("status")
    assert entry["instance_id"] == light_cloud.core.ours()[0].instance_id


def test_nobody_is_there_to_say_yes(light_cloud: Cloud) -> None:
    """Without -y and without a terminal, what costs money or ends something is refused, and does not hang."""
    assert is_refused(gpu("launch", "--gpu", "A10", "-q"), USAGE, "Nobody can be asked here")
    assert light_cloud.core.count(LAUNCHES) == 0
    assert gpu(*A10, "--no-wait").returncode == 0
    for words in (("terminate",), ("guard", "setup")):
        assert gpu(*words).returncode == USAGE
    assert len(light_cloud.core.still_billing()) == 1


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"usd_per_hour": 0.5}, "limits.usd_per_hour"),
        ({"usd_per_machine": 1}, "limits.usd_per_machine"),
        ({"usd_per_month": 1}, "limits.usd_per_month"),
        ({"usd_per_moth": 1000}, "must be among"),
        ({"usd_per_month": "much"}, "is not a number"),
    ],
)
def test_limits_of_the_config_file(light_cloud: Cloud, limits: dict[str, object], said: str) -> None:
    """A launch that the config file does not allow, or whose limits cannot be read, is refused."""
    keys.user_config().write_text(json.dumps({"limits": limits}))
    assert is_refused(gpu(*A10, "-q"), CONFIG, said)
    assert light_cloud.core.count(LAUNCHES) == 0


def test_a_damaged_config_file(light_cloud: Cloud) -> None:
    """A config file that is no JSON object stops a launch, with its name: its limits cannot be known."""
    for text in ("{", "[]", "null"):
        keys.user_config().write_text(text)
        assert is_refused(gpu(*A10, "-q"), CONFIG, os.environ["GPU_HOME"])
    assert light_cloud.core.count(LAUNCHES) == 0


def test_two_launches_at_once_keep_a_limit_together(light_cloud: Cloud) -> None:
    """What one of two commands is about to rent counts for the other: a month's limit holds for both."""
    keys.user_config().write_text(json.dumps({"limits": {"usd_per_month": 10}}))
    names = [f"m{number}" for number in range(4)]
    at_once = [begun("launch", name, "--gpu", "A10", "--max-hours", "10", "-y", "--no-wait", "-q") for name in names]
    said = [command.communicate(timeout=100)[1] for command in at_once]
    assert sorted(command.returncode for command in at_once) == [0, CONFIG, CONFIG, CONFIG], said
    assert len(light_cloud.core.still_billing()) == 1
    assert gpu("terminate", "--all", "-y").returncode == 0


@pytest.mark.parametrize(
    "words", [("run", "--on", "local", "--budget", "2"), ("run", "--count", "8"), ("resume", "--max-hours", "1")]
)
@pytest.mark.first(1)
def test_a_cap_that_would_not_hold_is_refused(light_cloud: Cloud, words: tuple[str, ...]) -> None:
    """A cap, or a wish about a machine, is not passed over in silence where nothing is rented."""
    assert gpu("run", "-q", "--environment", "none", "--", "true").returncode == 0
    more = () if words[0] == "resume" else ("--", "true")
    assert is_refused(gpu(*words, *more), USAGE, f"{words[-2]} is for a machine that is rented for the run")
    assert light_cloud.core.calls == []


@pytest.mark.parametrize(("ahead_s", "how"), [(5400, "90 minutes behind"), (-5400, "90 minutes ahead of")])
def test_a_clock_that_is_wrong(light_cloud: Cloud, ahead_s: int, how: str) -> None:
    """Where this computer's clock is not the provider's, deadlines would be wrong: nothing is rented."""
    light_cloud.fault("clock-skew", detail=ahead_s, times=None)
    assert is_refused(gpu(*A10, "-q"), CONFIG, how)
    assert light_cloud.core.count(LAUNCHES) == 0
    assert light_cloud.core.account.keys == {}
