"""Containers behind the stand-in for Vast: who is let in and where, what starts with them, what ends, what stays."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Fault, Timings, Vast
from tests.cloud.vast_asking import RUNNING, SAFE, STOPPED, end, offers, said, shown
from tests.cloud.vast_renting import RentedContainer, VastRenter
from tests.waiting import until

SMI = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader,nounits"
CUDA = "python3 -c \"import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))\""


@pytest.fixture
def renter(vast_cloud: Vast, tmp_path: Path) -> VastRenter:
    vast_cloud.core.timings = Timings(0.0, 0.05, 0.0, 0.05, 0.1, 0.1, key_delay_s=0.0, stop_lag_s=0.0)
    vast_cloud.core.result_refusals = 0
    return VastRenter(vast_cloud, tmp_path)


def status(rented: RentedContainer) -> str:
    """The word for what an instance is."""
    return str(shown(rented.renter.cloud.core, rented.instance_id).get("actual_status"))


def test_root_logs_in_directly_and_by_the_proxy(renter: VastRenter) -> None:
    """Both ways lead to the same container, at addresses of their own, with the banner apart from what is said."""
    rented = renter.ready()
    assert rented.direct.host != rented.proxy.host
    for via in ("direct", "proxy"):
        done = rented.run("echo $USER $HOME; pwd", via)
        assert done.stdout.split() == ["root", *[str(rented.machine.home)] * 2]
        assert "Welcome to vast.ai. If authentication fails" in done.stderr
        assert "Have fun!\n" in done.stderr
    renter.made("other")
    assert "Permission denied (publickey)" in rented.run("true", key="other").stderr


def test_ways_in_that_lead_nowhere(renter: VastRenter) -> None:
    """A direct port that is dead or absent, and a proxy that is dead: the other way works."""
    for what, order, works in [
        ("direct-dead", {}, "proxy"),
        ("proxy-dead", {}, "direct"),
        ("no-direct", {}, "proxy"),
        ("", {"runtype": "ssh_proxy"}, "proxy"),
    ]:
        if what:
            renter.cloud.fault(what)
        rented = renter.rent(**order)
        until(lambda one=rented, via=works: one.run("true", via).returncode == 0, 20)
        if what in ("direct-dead", "proxy-dead"):
            dead = {"proxy": "direct", "direct": "proxy"}[works]
            assert "Connection refused" in rented.run("true", dead).stderr
        else:
            ports = shown(renter.cloud.core, rented.instance_id).get("ports", {})
            assert "22/tcp" not in ports


def test_the_container_s_own_start(renter: VastRenter) -> None:
    """`onstart` runs with the container's variables, which a login has not; what it says is in the log."""
    onstart = (
        "touch /root/.no_auto_tmux\n"
        "echo host key: $(cat /etc/ssh/ssh_host_ed25519_key.pub)\n"
        "echo $CONTAINER_ID $VAST_CONTAINERLABEL $PUBLIC_IPADDR $VAST_TCP_PORT_22 $GPU_COUNT $HF_HOME\n"
        "env | grep HF_HOME >> /etc/environment\n"
        "echo $CONTAINER_API_KEY\n"
    )
    rented = renter.ready(onstart)
    one = renter.cloud.core.instances[rented.instance_id]
    until(lambda: one.api_key in rented.log(), 10)
    label = f"C.{one.number}"
    told = f"{one.number} {label} {one.direct.host} {one.direct.port} 1 {rented.machine.disk}/workspace/hf"
    assert told in rented.log().splitlines()
    assert f"host key: {rented.machine.sshd.host_key()}" in rented.log()
    assert rented.said("echo ${CONTAINER_API_KEY-none} ${CONTAINER_ID-none}; ls -a ~").split()[:2] == ["none", "none"]
    assert rented.said("echo $HF_HOME") == f"{rented.machine.disk}/workspace/hf\n"
    environ = rented.said("tr '\\0' '\\n' </proc/1/environ").splitlines()
    assert f"CONTAINER_API_KEY={one.api_key}" in environ
    assert rented.said("cat /root/onstart.sh").startswith(f"touch {rented.machine.home}/.no_auto_tmux")
    url = said(renter.cloud.core, f"PUT /instances/request_logs/{rented.instance_id}/", {"tail": "1000"})["result_url"]
    found = renter.cloud.core.handle("GET", url.removeprefix(renter.cloud.url), {})
    assert b"host key: ssh-ed25519 " in found.body


def test_onstart_may_be_passed_over(renter: VastRenter) -> None:
    """With the fault nothing of it is done."""
    renter.cloud.fault("ignores-user-data")
    assert renter.ready("touch /root/seen; echo seen").run("ls ~/seen").returncode != 0


def test_the_container_s_key_ends_it_from_inside(renter: VastRenter) -> None:
    """What runs in it can destroy it with the key it was given, and nothing of it is left then."""
    call = f"curl -s -X DELETE -H \"Authorization: Bearer $CONTAINER_API_KEY\" -d '{{}}' {renter.cloud.url}/api/v0"
    rented = renter.ready(f"while [ ! -e /root/now ]; do sleep 0.02; done; {call}/instances/$CONTAINER_ID/")
    disk = rented.machine.disk
    rented.said("touch /root/now")
    until(lambda: not renter.cloud.core.still_billing(), 10)
    until(lambda: not disk.exists(), 10)
    assert not rented.machine.sshd.processes()


def test_a_stop_ends_everything_but_the_disk(renter: VastRenter) -> None:
    """Every process ends abruptly when the stop is answered; started again, the home is there and onstart runs anew."""
    rented = renter.ready("trap 'touch /root/told' TERM; echo started >> /root/starts; sleep 300 & wait")
    rented.said("echo precious > /root/rows; setsid -f sleep 301 >/dev/null 2>&1")
    before, key = rented.direct, rented.machine.sshd.host_key()
    until(lambda: {"300", "301"} <= {word for it in rented.machine.sshd.processes() for word in it.words}, 10)
    rented.asked(**STOPPED)
    assert not rented.machine.sshd.processes() + rented.machine.sshd.connections()
    assert "ports" not in shown(renter.cloud.core, rented.instance_id)
    assert sorted(path.name for path in rented.machine.home.iterdir() if path.name[0] != ".") == [
        "onstart.sh",
        "rows",
        "starts",
    ]
    rented.asked(**RUNNING)
    until(lambda: "ports" in shown(renter.cloud.core, rented.instance_id), 10)
    until(lambda: rented.run("true").returncode == 0, 10)
    assert rented.said("cat /root/rows /root/starts").split() == ["precious", "started", "started"]
    assert rented.direct.host == before.host
    assert rented.direct.port != before.port
    assert rented.machine.sshd.host_key() == key


def test_a_recycled_one_is_another(renter: VastRenter) -> None:
    """Its disk is empty and it has another host key; a reboot keeps both."""
    rented = renter.ready("echo started")
    key = rented.machine.sshd.host_key()
    for word, stays in (("reboot", True), ("recycle", False)):
        rented.said("echo precious > /root/rows")
        said(renter.cloud.core, f"PUT /instances/{word}/{rented.instance_id}/", {})
        assert not rented.machine.sshd.processes()
        until(lambda: status(rented) == "running", 10)
        renter.known.unlink()
        until(lambda: rented.run("true").returncode == 0, 10)
        assert (rented.run("cat /root/rows").returncode == 0) == stays
        assert (rented.machine.sshd.host_key() == key) == stays


def test_an_outbid_one_is_cut_and_comes_back(renter: VastRenter) -> None:
    """A higher bid kills its processes at once; its disk stays, and it starts by itself when its bid wins again."""
    offer = offers(renter.cloud.core, type="bid")[-1]
    rented = renter.ready("echo up >> /root/starts", ask_id=offer["id"], price=offer["min_bid"])
    rented.said("setsid -f sleep 301 >/dev/null 2>&1")
    renter.cloud.core.outbid(rented.instance_id)
    assert not rented.machine.sshd.processes() + rented.machine.sshd.connections()
    assert status(rented) == "stopped"
    renter.cloud.core.outbid(rented.instance_id, seconds=0.0)
    until(lambda: status(rented) == "running", 10)
    until(lambda: rented.machine.home.joinpath("starts").read_text() == "up\nup\n", 10)


def test_destroy_leaves_nothing(renter: VastRenter) -> None:
    """When the answer comes no process of it is left, and its disk is gone."""
    rented = renter.ready("setsid sleep 302 >/dev/null 2>&1 &")
    place = rented.direct
    assert end(renter.cloud.core, rented.instance_id) == 200
    assert not rented.machine.sshd.processes() + rented.machine.sshd.connections()
    assert not rented.machine.disk.exists()
    done = subprocess.run([*renter.ssh(place), f"root@{place.host}", "true"], capture_output=True, timeout=20)
    assert b"Connection refused" in done.stderr
    until(lambda: not renter.cloud.core.still_billing(), 10)


def test_keys_take_their_time(renter: VastRenter) -> None:
    """A key that is attached is let in after a while; one that is detached no longer; the account's was there."""
    rented = renter.ready()
    other = renter.made("other")
    path, core = f"/instances/{rented.instance_id}/ssh/", renter.cloud.core

    def attach_for(delay_s: float) -> int:
        core.timings.key_delay_s = delay_s
        said(core, f"POST {path}", {"ssh_key": other})
        keys = json.loads(said(core, f"GET {path}")["ssh_keys"])
        return next(int(it["id"]) for it in keys if it["public_key"] == other)

    number = attach_for(3600.0)
    assert "Permission denied" in rented.run("true", key="other").stderr
    said(core, f"DELETE {path}{number}/")
    number = attach_for(0.1)
    until(lambda: rented.run("true", key="other").returncode == 0, 10)
    said(core, f"DELETE {path}{number}/")
    until(lambda: "Permission denied" in rented.run("true", key="other").stderr, 10)
    assert rented.run("true").returncode == 0


def test_keys_of_a_start_script_rot(renter: VastRenter) -> None:
    """What `onstart` lets in is let in at first, and not after the file was written anew."""
    other = renter.made("other")
    rented = renter.ready(f"echo '{other}' >> /root/.ssh/authorized_keys")
    until(lambda: rented.run("true", key="other").returncode == 0, 10)
    rented.faults["keys-refreshed"] = Fault("keys-refreshed", seconds=0.2)
    until(lambda: "Permission denied" in rented.run("true", key="other").stderr, 10)
    assert rented.run("true").returncode == 0


def test_sshd_and_keys_may_be_late(renter: VastRenter) -> None:
    """sshd refuses, or denies the right key, until that is over."""
    for what, error in (("sshd-late", "Connection refused"), ("publickey-denied", "Permission denied (publickey)")):
        renter.cloud.fault(what, seconds=3600)
        rented = renter.rent()
        until(lambda one=rented, text=error: text in one.run("true", "proxy").stderr, 10)
        del rented.faults[what]
        until(lambda one=rented: one.run("true", "proxy").returncode == 0, 10)


def test_another_host_key_after_the_first_login(renter: VastRenter) -> None:
    """After a first login it has another host key, and whoever has pinned the first does not get in."""
    renter.cloud.fault("other-host-key")
    rented = renter.rent()
    first = rented.machine.sshd.host_key()
    until(lambda: rented.run("true", "proxy").returncode == 0, 10)
    until(lambda: rented.machine.sshd.host_key() != first, 10)
    until(lambda: "Host key verification failed" in rented.run("true", "proxy").stderr, 10)


def test_tmux_gets_in_the_way(renter: VastRenter) -> None:
    """Commands over SSH are not run until the file is there that keeps tmux away."""
    renter.cloud.fault("tmux")
    rented = renter.rent("while [ ! -e /root/now ]; do sleep 0.02; done; touch /root/.no_auto_tmux")
    until(lambda: "no sessions" in rented.run("echo hello", "proxy").stderr, 10)
    assert rented.run("echo hello", "proxy").returncode == 1
    (rented.machine.home / "now").touch()
    until(lambda: rented.run("echo hello", "proxy").stdout == "hello\n", 10)


def test_what_an_image_lacks(renter: VastRenter) -> None:
    """There is no systemd, no sudo, and with the fault no rsync until it is installed; this computer is left alone."""
    renter.cloud.fault("no-rsync")
    rented = renter.ready()
    for program in ("systemctl", "sudo", "shutdown"):
        assert rented.run(f"{program} now").returncode == 127
    assert rented.run("rsync --version").returncode == 127
    rented.said("apt-get update && apt-get install -y rsync")
    assert rented.said("rsync --version").startswith("rsync")
    assert "apt-get install -y rsync" in (rented.machine.folder / "asked").read_text()


def test_the_gpu_is_the_one_ordered_or_not(renter: VastRenter) -> None:
    """nvidia-smi shows what was ordered, an A100 with its memory and the host's driver, or what the fault has it."""
    query: dict[str, Any] = {"gpu_name": {"eq": "A100 SXM4"}, "gpu_ram": {"gte": 80000}, **SAFE}
    offer = offers(renter.cloud.core, **query)[0]
    rented = renter.ready(ask_id=offer["id"])
    assert rented.said(SMI) == f"NVIDIA A100-SXM4-80GB, 81920, {offer['driver_version']}\n"
    assert f"CUDA Version: {offer['cuda_max_good']}" in rented.said("nvidia-smi")
    assert rented.said(CUDA) == "0\n"
    renter.cloud.fault("delivers-gpu")
    renter.cloud.fault("cuda-error")
    other = renter.ready(ask_id=offers(renter.cloud.core, **query)[0]["id"])
    assert other.said(SMI).startswith("NVIDIA GeForce RTX 3060, 12288, ")
    assert other.said(CUDA) == "802\n"


def test_away_and_frozen(renter: VastRenter) -> None:
    """While its host is away nobody answers and its processes go on; while it is frozen they stand still."""
    for what in ("offline", "frozen"):
        renter.cloud.fault(what)
        rented = renter.rent("while :; do echo tick >> /root/ticks; sleep 0.02; done")
        until(lambda one=rented: {it.state for it in one.machine.sshd.connections()} == {"T"}, 10)
        assert status(rented) == what
        ticks = rented.machine.home / "ticks"
        if what == "frozen":
            assert {it.state for it in rented.machine.sshd.processes()} == {"T"}
        else:
            until(lambda at=ticks: at.exists() and at.stat().st_size > 20, 10)
        del rented.faults[what]
        until(lambda one=rented: one.run("true", "proxy").returncode == 0, 10)
        assert status(rented) == "running"


def test_a_stopped_disk_can_be_copied(renter: VastRenter, tmp_path: Path) -> None:
    """The way that a copy request opens leads, with the account's key, to the disk of a container that is stopped."""
    rented = renter.ready()
    content = base64.b64encode(bytes(range(256)) * 40).decode()
    rented.said(f"mkdir -p /root/.gpu/runs && echo {content} > /root/.gpu/runs/rows.jsonl && echo x > /workspace/y")
    rented.asked(**STOPPED)
    asked = {"client_id": "me", "src_id": f"C.{rented.instance_id}", "dst_id": None, "src_path": "/root/.gpu/"}
    found = said(renter.cloud.core, "PUT /commands/rsync/", asked | {"dst_path": str(tmp_path / "back")})
    for module, path in ((f"C.{rented.instance_id}", "/root/.gpu/"), (rented.instance_id, "workspace")):
        shell = f"ssh -p {found['src_port']} -i {renter.folder / 'key'} -o StrictHostKeyChecking=no -F none"
        shell += f" -o UserKnownHostsFile={tmp_path / 'gate'}"
        source = f"vastai_kaalia@{found['src_addr']}::{module}/{path}"
        subprocess.run(["rsync", "-arz", "-e", shell, source, str(tmp_path / "back")], check=True, timeout=30)
    assert (tmp_path / "back/runs/rows.jsonl").read_text().strip() == content
    assert (tmp_path / "back/workspace/y").read_text() == "x\n"
    url = said(renter.cloud.core, f"PUT /instances/command/{rented.instance_id}/", {"command": "ls /root/.gpu/runs"})
    answer = renter.cloud.core.handle("GET", url["result_url"].removeprefix(renter.cloud.url), {})
    assert answer.body == b"rows.jsonl\n"
    said(renter.cloud.core, f"PUT /instances/command/{rented.instance_id}/", {"command": "rm -r /root/../root/.gpu"})
    assert not (rented.machine.home / ".gpu").exists()
    other = renter.rent()
    pair = {"src_id": rented.instance_id, "dst_id": other.instance_id, "src_path": "/workspace/", "dst_path": "/new"}
    said(renter.cloud.core, "PUT /commands/copy_direct/", pair)
    assert (other.machine.disk / "new/y").read_text() == "x\n"


def test_nothing_of_a_bid_that_lost_is_started(renter: VastRenter) -> None:
    """A contract that was never granted its GPUs has no container, and can be destroyed."""
    core = renter.cloud.core
    core.faults.add(Fault("refused-yet-made"))
    answer = core.handle(
        "PUT",
        f"/api/v0/asks/{offers(core)[-1]['id']}/",
        {"Authorization": f"Bearer {core.key}"},
        b'{"image": "x", "disk": 10}',
    )
    name = str(json.loads(answer.body)["new_contract"])
    assert end(core, name) == 200
    assert renter.cloud.machines is not None
    assert name not in renter.cloud.machines.all
