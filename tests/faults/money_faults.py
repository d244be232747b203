"""Everything that can go wrong with money at a provider, by name: what a launch and an end have to live through."""

from __future__ import annotations

from collections.abc import Callable

from tests.cloud import Fault

GET_ONE = r"GET /instances/\w"
ALL = r"."
_ABSENT = "global/object-does-not-exist"
_HIDDEN_S = 30.0

Faults = Callable[[], list[Fault]]
AT_LAUNCH: dict[str, Faults] = {
    "nothing": list,
    # asked too often
    "every call limited twice": lambda: [Fault("rate-limited-json", ALL, 2, detail=3)],
    "limited without an end": lambda: [Fault("rate-limited-text", ALL, 40)],
    "launch limited": lambda: [Fault("rate-limited-json", "launch", 1)],
    "launch limited, in plain text": lambda: [Fault("rate-limited-text", "launch", 2, detail=20)],
    "launch limited, yet made": lambda: [Fault("lost-502", detail=429)],
    "launch limited, yet made, and listed late": lambda: [
        Fault("lost-502", detail=429),
        Fault("invisible", seconds=_HIDDEN_S),
    ],
    # answers of a launch that was done are lost
    "launch made, then 502": lambda: [Fault("lost-502")],
    "launch made, then closed": lambda: [Fault("lost-closed")],
    "launch made, then silence": lambda: [Fault("lost-hang", seconds=900.0)],
    "launch made, then half an answer": lambda: [Fault("lost-half")],
    "launch made, then nothing": lambda: [Fault("lost-empty")],
    "launch made, then null": lambda: [Fault("null-data", "launch")],
    "launch made, answer lost, and listed late": lambda: [Fault("lost-502"), Fault("invisible", seconds=_HIDDEN_S)],
    "launch made, answer lost, lists limited": lambda: [
        Fault("lost-closed"),
        Fault("rate-limited-json", "GET /instances$", 14),
    ],
    "launch made, answer lost, lists bare": lambda: [
        Fault("lost-closed"),
        Fault("bare-instances", "GET /instances$", 3),
    ],
    "two made of one request": lambda: [Fault("doubled", detail="both")],
    "two made of one request, answer lost": lambda: [Fault("doubled"), Fault("lost-502")],
    "two made of one request, the end of one ignored": lambda: [
        Fault("doubled", detail="both"),
        Fault("terminate-ignored", times=2),
    ],
    # a launch that was not done
    "launch not made, 502": lambda: [Fault("failed", "launch")],
    "launch not made, 500": lambda: [Fault("error", "launch")],
    "launch not made, closed": lambda: [Fault("closed", "launch")],
    "launch not made, silence": lambda: [Fault("hang", "launch", seconds=900.0)],
    "launch not made, nothing": lambda: [Fault("empty", "launch")],
    "launch not made, a page": lambda: [Fault("proxy-page", "launch")],
    "launch not made, redirect": lambda: [Fault("redirect", "launch")],
    "launch not sent": lambda: [Fault("not-sent", "launch")],
    "launch not sent, silence": lambda: [Fault("not-sent", "launch", detail="silent")],
    # refused
    "no capacity in one place": lambda: [Fault("no-capacity")],
    "no capacity anywhere": lambda: [Fault("no-capacity", times=None)],
    "quota": lambda: [Fault("quota")],
    "key refused at launch": lambda: [Fault("bad-key", "launch")],
    "key refused while it boots": lambda: [Fault("bad-key", GET_ONE, 1, 1)],
    "account inactive": lambda: [Fault("inactive", "launch")],
    # a machine that comes up late, or not at all
    "listed late": lambda: [Fault("invisible", seconds=_HIDDEN_S)],
    "listed very late, no word of it before": lambda: [Fault("invisible", seconds=150.0, detail="wholly")],
    "unhealthy": lambda: [Fault("boot-unhealthy")],
    "all unhealthy": lambda: [Fault("boot-unhealthy", times=None)],
    "never boots": lambda: [Fault("boot-stuck")],
    "unhealthy for a while": lambda: [Fault("goes-unhealthy", seconds=0.0, detail=60.0)],
    "vanishes": lambda: [Fault("vanishes", seconds=5.0)],
    "preempted": lambda: [Fault("preempted", seconds=5.0)],
    "no address": lambda: [Fault("no-ip")],
    "odd status": lambda: [Fault("odd-status", detail="rebalancing")],
    "sshd late": lambda: [Fault("sshd-late", seconds=120.0)],
    "sshd never": lambda: [Fault("sshd-late")],
    "key denied for a while": lambda: [Fault("publickey-denied", seconds=60.0)],
    "other host key": lambda: [Fault("other-host-key")],
    "host key ignored": lambda: [Fault("ignores-host-key")],
    "no nvidia-smi": lambda: [Fault("smi-missing")],
    "nvidia-smi hangs": lambda: [Fault("smi-hangs")],
    "wrong GPU": lambda: [Fault("smi-wrong-gpu")],
    "no GPU of one": lambda: [Fault("smi-wrong-count")],
    "half the memory": lambda: [Fault("smi-wrong-memory")],
    "CUDA fails": lambda: [Fault("cuda-error")],
    "bad machine whose end is ignored": lambda: [Fault("smi-wrong-gpu"), Fault("terminate-ignored")],
    # what answers look like
    "unknown fields": lambda: [Fault("unknown-fields", ALL, None)],
    "null fields": lambda: [Fault("null-fields", ALL, None)],
    "key of the account lost": lambda: [Fault("null-data", "POST /ssh-keys")],
    "no catalogue": lambda: [Fault("failed", "instance-types", 7)],
    "API down while it boots": lambda: [Fault("failed", "GET /instances", 12, 1)],
}
"""What goes wrong from the start. Each makes its faults anew: they count down."""
AT_END: dict[str, Faults] = {
    "key refused": lambda: [Fault("bad-key", "terminate")],
    "key refused after the end was asked for": lambda: [Fault("bad-key", GET_ONE)],
    "end ignored": lambda: [Fault("terminate-ignored")],
    "end ignored thrice": lambda: [Fault("terminate-ignored", times=3)],
    "end late": lambda: [Fault("terminate-late", seconds=200.0)],
    "end slow": lambda: [Fault("terminate-slow", seconds=400.0)],
    "end too slow": lambda: [Fault("terminate-slow", seconds=1500.0)],
    "end names nothing": lambda: [Fault("nothing-terminated")],
    "end limited": lambda: [Fault("rate-limited-json", "terminate", 9)],
    "end failed": lambda: [Fault("failed", "terminate", 9, detail=500)],
    "end not sent": lambda: [Fault("not-sent", "terminate", 9)],
    "end unanswered": lambda: [Fault("hang", "terminate", 2, seconds=900.0)],
    "end already asked, it says": lambda: [Fault("error", "terminate", detail="global/unknown")],
    "end denied with a lie": lambda: [Fault("error", "terminate", detail=_ABSENT)],
    "one lie of absence, end ignored": lambda: [
        Fault("terminate-ignored"),
        Fault("error", GET_ONE, 1, detail=_ABSENT),
    ],
    "pages of 404, end ignored": lambda: [
        Fault("terminate-ignored", times=None),
        Fault("failed", GET_ONE, None, detail=404),
    ],
}
"""What goes wrong once there is a machine, and its end is asked for."""
