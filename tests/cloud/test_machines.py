"""Real machines behind the stand-in: who is let in, what the first boot does, what nvidia-smi says, what ends."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Cloud, Timings, computers, first_boot, machines
from tests.cloud.asking import ask, end
from tests.cloud.renting import A100, GH200, H100S, Renter
from tests.waiting import until

CUDA = "python3 -c \"import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))\""
QUERY = "nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader,nounits"


@pytest.fixture
def renter(cloud: Cloud, tmp_path: Path) -> Renter:
    cloud.core.timings = Timings(0.0, 0.05, 0.0, 0.05, 0.1, 0.1, 0.5)
    return Renter(cloud, tmp_path)


def test_ubuntu_logs_in_with_the_account_s_key(renter: Renter) -> None:
    """On one port, each at its own address: `ubuntu` with the account's key, at the host key that user_data brought."""
    rented = [renter.ready() for _ in range(2)]
    assert len({it.machine.instance.address for it in rented}) == 2
    first = rented[0]
    assert first.said("echo $USER $HOME; pwd").split() == ["ubuntu", *[str(first.machine.sshd.home)] * 2]
    assert first.said("nvidia-smi -L").startswith("GPU 0: NVIDIA A10 (UUID: GPU-")
    rented[0].words[-1] = f"ubuntu@{rented[1].machine.instance.address}"
    assert "Host key verification failed" in rented[0].run("true").stderr
    rented[1].words[-1] = f"someone@{rented[1].machine.instance.address}"
    assert "Permission denied" in rented[1].run("true").stderr


def test_another_key_is_not_let_in(renter: Renter) -> None:
    """Only the key that the launch named is let in, though the account has others."""
    rented = renter.ready()
    rented.words[rented.words.index("-i") + 1] = str(renter.folder / "host1")
    assert "Permission denied (publickey)" in rented.run("true").stderr


def test_nvidia_smi_answers_as_the_real_one(renter: Renter) -> None:
    """Queries, lists, units, headers, a table with the CUDA version, and an error for a field it does not know."""
    rented = renter.ready(**H100S)
    lines = rented.said(QUERY).splitlines()
    assert lines == [f"{number}, NVIDIA H100 80GB HBM3, 81559" for number in range(8)]
    assert rented.said("nvidia-smi --query-gpu=name,memory.total,utilization.gpu --format=csv -i=0").splitlines() == [
        "name, memory.total [MiB], utilization.gpu",
        "NVIDIA H100 80GB HBM3, 81559 MiB, 0 %",
    ]
    assert len(rented.said("nvidia-smi -L").splitlines()) == 8
    assert "CUDA Version: 12." in rented.said("nvidia-smi")
    assert rented.said("nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader") == ""
    assert rented.run("nvidia-smi --query-gpu=nonsense --format=csv").returncode == 2
    assert rented.said(CUDA) == "0\n"


@pytest.mark.parametrize(("order", "wanted"), [(GH200, "aarch64"), (A100, None)])
def test_the_architecture_is_that_of_the_type(renter: Renter, order: dict[str, str], wanted: str | None) -> None:
    """A GH200 says that it is an ARM machine, another says what this computer is."""
    found = renter.ready(**order).said("uname -m").strip()
    assert found == (wanted or subprocess.check_output(["uname", "-m"], text=True).strip())


GPU_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "smi-missing": ({}, "127"),
    "smi-fails": ({}, "9 NVIDIA-SMI has failed"),
    "smi-hangs": ({"seconds": 60}, "124"),
    "smi-wrong-gpu": ({}, "0 0, Tesla T4, 40960"),
    "smi-wrong-count": ({"detail": 3}, "0 0, NVIDIA A100-SXM4-40GB, 40960 1, NVIDIA"),
    "smi-wrong-memory": ({}, "0 0, NVIDIA A100-SXM4-40GB, 20480"),
    "cuda-error": ({}, "0 0, NVIDIA A100-SXM4-40GB, 40960 802"),
}


@pytest.mark.parametrize("what", GPU_FAULTS)
def test_a_gpu_is_not_as_it_should_be(renter: Renter, what: str) -> None:
    """nvidia-smi and CUDA say what the fault has it."""
    how, wanted = GPU_FAULTS[what]
    renter.cloud.fault(what, **how)
    rented = renter.ready(**A100)
    done = rented.run(f"timeout 1 {QUERY}")
    said = f"{done.returncode} {done.stdout}"
    if what == "cuda-error":
        said += rented.said(CUDA)
    assert " ".join(said.split()).startswith(wanted)


def test_sshd_may_be_late(renter: Renter) -> None:
    """The instance is active and sshd refuses; later it lets in."""
    renter.cloud.fault("sshd-late", seconds=1.0)
    rented = renter.rent()
    assert "Connection refused" in rented.run("true").stderr
    until(lambda: rented.run("true").returncode == 0, 10)


def test_keys_may_be_denied_at_first(renter: Renter) -> None:
    """sshd answers and denies the right key for a while."""
    renter.cloud.fault("publickey-denied", seconds=1.5)
    rented = renter.rent()
    until(lambda: "Permission denied (publickey)" in rented.run("true").stderr, 10)
    until(lambda: rented.run("true").returncode == 0, 10)


def test_another_host_key_after_the_first_login(renter: Renter) -> None:
    """After a first login the machine has another host key, and whoever has pinned the first does not get in."""
    renter.cloud.fault("other-host-key")
    rented = renter.rent()
    until(lambda: rented.run("true").returncode == 0, 10)
    until(lambda: "Host key verification failed" in rented.run("true").stderr, 10)


def test_an_image_may_ignore_the_host_key(renter: Renter) -> None:
    """The machine has a host key of its own from the beginning, and does all else that user_data says."""
    renter.cloud.fault("ignores-host-key")
    rented = renter.rent({"runcmd": ["touch /var/lib/gpu-here"]})
    until(lambda: "Host key verification failed" in rented.run("true").stderr, 10)
    until(lambda: (rented.machine.root / "var/lib/gpu-here").exists(), 10)


def test_an_image_may_ignore_user_data(renter: Renter) -> None:
    """Nothing of user_data is done: neither its key nor its commands."""
    renter.cloud.fault("ignores-user-data")
    rented = renter.rent({"runcmd": ["touch /var/lib/gpu-here"]})
    until(lambda: "Host key verification failed" in rented.run("true").stderr, 10)
    until(lambda: (rented.machine.root / "var/lib/cloud/instance/boot-finished").exists(), 10)
    assert not (rented.machine.root / "var/lib/gpu-here").exists()


def test_the_first_boot_writes_and_runs(renter: Renter) -> None:
    """Files, their modes and encodings, and commands of both forms, run as root's, on paths of the machine's own."""
    files = [
        {"path": "/etc/gpu/a", "content": "one /var/lib/gpu/x\n", "permissions": "0600"},
        {"path": "/etc/gpu/a", "content": "two\n", "append": True, "permissions": "0600"},
        {"path": "/var/lib/gpu-b", "content": base64.b64encode(b"\x00\xff").decode(), "encoding": "b64"},
        {"path": "/etc/odd.conf", "content": "odd"},
    ]
    commands = ["mkdir -p /var/lib/gpu; echo $HOME >/var/lib/gpu/x", ["cp", "/etc/odd.conf", "/home/ubuntu/a b"]]
    rented = renter.ready({"write_files": files, "runcmd": commands})
    root = rented.machine.root
    assert (root / "etc/gpu/a").read_text() == f"one {root}/var/lib/gpu/x\ntwo\n"
    assert (root / "etc/gpu/a").stat().st_mode & 0o777 == 0o600
    assert (root / "var/lib/gpu-b").read_bytes() == b"\x00\xff"
    assert rented.said("cat /var/lib/gpu/x") == f"{root}/root\n"
    assert rented.said("cat '/home/ubuntu/a b'; cat ~/'a b'") == "oddodd"
    assert not Path("/etc/gpu").exists()


def test_a_script_is_run_as_it_is(renter: Renter) -> None:
    """user_data that begins with #! is a program of the machine; what it says is in the machine's log."""
    rented = renter.rent("#!/bin/bash\necho ${BASH_VERSION:0:1}; mkdir /opt/gpu; echo hello >/opt/gpu/x\n")
    until(lambda: (rented.machine.root / "var/lib/cloud/instance/boot-finished").exists(), 10)
    assert (rented.machine.root / "opt/gpu/x").read_text() == "hello\n"
    assert (rented.machine.root / "var/log/cloud-init-output.log").read_text() == "5\n"


def test_a_service_is_started_again_and_outlives_a_restart(renter: Renter) -> None:
    """A unit with Restart=always is started again when it ends, and, being enabled, after a restart of the machine."""
    unit = "[Service]\nExecStart=/bin/sh -c 'echo tick >>/var/lib/gpu-ticks'\nRestart=always\nRestartSec=0.1\n"
    files = [{"path": "/etc/systemd/system/gpu-guard.service", "content": unit}]
    rented = renter.ready({"write_files": files, "runcmd": ["systemctl enable --now gpu-guard"]})
    ticks = rented.machine.root / "var/lib/gpu-ticks"
    until(lambda: ticks.exists() and ticks.read_text().count("tick") > 2, 10)
    assert rented.said("systemctl is-active gpu-guard") == "active\n"
    asked = {"instance_ids": [rented.instance_id]}
    said = ask(renter.cloud.core, "POST", "/instance-operations/restart", asked)[1]
    assert said["restarted_instances"][0]["status"] == "booting"
    until(lambda: renter.shown(rented.instance_id)["status"] == "active", 10)
    ticks.write_text("")
    until(lambda: ticks.read_text().count("tick") > 2, 10)
    until(lambda: rented.run("true").returncode == 0, 10)
    rented.said("systemctl stop gpu-guard")
    assert rented.run("systemctl is-active gpu-guard").stdout == "inactive\n"


def test_terminate_ends_every_process(renter: Renter) -> None:
    """Daemons that were started over SSH and by the first boot are gone, and sshd with them."""
    rented = renter.ready({"runcmd": ["setsid sleep 301 >/dev/null 2>&1 &"]})
    rented.said("setsid -f sleep 302 >/dev/null 2>&1")
    alive = {word for it in rented.machine.sshd.processes() for word in it.words}
    assert {"301", "302"} <= alive
    assert end(renter.cloud.core, rented.instance_id)[0] == 200
    until(lambda: not rented.machine.sshd.processes() + rented.machine.sshd.connections(), 10)
    assert "Connection refused" in rented.run("true").stderr
    until(lambda: not renter.shown(rented.instance_id), 10)
    assert renter.cloud.core.still_billing() == []


def test_powered_off_from_inside_it_still_costs_money(renter: Renter) -> None:
    """`sudo shutdown -h now` ends its processes, makes it unhealthy, and costs on; a restart brings it back."""
    rented = renter.ready()
    rented.run("sudo shutdown -h now")
    until(lambda: renter.shown(rented.instance_id)["status"] == "unhealthy", 10)
    until(lambda: "Connection refused" in rented.run("true").stderr, 10)
    assert [it.instance_id for it in renter.cloud.core.still_billing()] == [rented.instance_id]
    ask(renter.cloud.core, "POST", "/instance-operations/restart", {"instance_ids": [rented.instance_id]})
    until(lambda: rented.run("true").returncode == 0, 10)
    assert renter.shown(rented.instance_id)["status"] == "active"


def test_nothing_is_done_to_this_computer(renter: Renter) -> None:
    """Package managers and schedules are noted and not asked; `sudo` runs the command and has no questions."""
    rented = renter.ready({"runcmd": ["apt-get install -y nothing-such"]})
    rented.said("crontab -r; sudo -n env A=b true && sudo -u root sh -c 'exit 0'")
    assert (rented.machine.folder / "asked").read_text().splitlines() == [
        "apt-get install -y nothing-such",
        "crontab -r",
    ]


def test_paths_are_moved_by_sed_and_python_alike(tmp_path: Path) -> None:
    """What is the machine's own is found below its folder by both, and nothing else is touched."""
    paths = first_boot.Paths(tmp_path / "root", tmp_path / "home", ["/etc/motd"])
    text = (
        "a=/var/lib/gpu/x:/opt/gpu '/etc/systemd/system/gpu.service' /etc/passwd /home/ubuntu/x /home/ubuntu2 "
        "/x/var/lib/gpu /etc/motd /usr/local/bin/.gpu /var/lib/cloud/instance /run/systemd https://a/run/gpu\n/run/gpu"
    )
    root, home = tmp_path / "root", tmp_path / "home"
    wanted = (
        f"a={root}/var/lib/gpu/x:{root}/opt/gpu '{root}/etc/systemd/system/gpu.service' /etc/passwd {home}/x "
        f"/home/ubuntu2 /x/var/lib/gpu {root}/etc/motd {root}/usr/local/bin/.gpu {root}/var/lib/cloud/instance "
        f"/run/systemd https://a/run/gpu\n{root}/run/gpu"
    )
    assert paths.moved(text) == wanted
    rules = tmp_path / "rules"
    rules.write_text(paths.sed())
    assert subprocess.check_output(["sed", "-E", "-f", str(rules)], input=text, text=True) == wanted


def test_user_data_of_several_parts_is_read() -> None:
    """A MIME message is read part by part; what the stand-in does not play is named."""
    text = (
        'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="x"\n\n--x\nContent-Type: text/cloud-config\n\n'
        "#cloud-config\npackages: [rsync]\nruncmd: [[echo, a b]]\n--x\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n"
        "echo c\n--x--\n"
    )
    plan = first_boot.read(text)
    assert [script.splitlines() for script in plan.scripts] == [["#!/bin/sh", "echo 'a b'"], ["#!/bin/sh", "echo c"]]
    assert plan.not_played == ["packages"]


def test_skips_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can log in as ubuntu, a test that asks for machines is skipped with the line that helps."""
    monkeypatch.setattr(computers, "wrapper", lambda: None)
    monkeypatch.setattr(machines, "USER", "nobody-is-called-so")
    with pytest.raises(pytest.skip.Exception, match="apt-get install libnss-wrapper"):
        machines.need_machines()
