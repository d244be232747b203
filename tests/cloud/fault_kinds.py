"""Everything that can go wrong at the stand-ins, by name: at both clouds, at Lambda alone, at Vast alone."""

from __future__ import annotations

from typing import Literal

Stage = Literal["call", "launch", "terminate", "answer"]
"""A fault befalls a whole call, an instance as it is made, the end of an instance, or what answers look like."""
_LAUNCH, _TERMINATE, _OFFERS = "^launch$", "^terminate$", "^offers$"
_Kinds = dict[str, tuple[Stage, str, str]]
LAMBDA: _Kinds = {
    # word: stage, the calls it befalls unless `when` says otherwise, what it does (`seconds` and `detail` are its own)
    "rate-limited-json": ("call", "", "429 with the provider's JSON; detail: Retry-After"),
    "rate-limited-text": ("call", "", "429 in plain text; detail: Retry-After"),
    "not-sent": ("call", "", "the provider cannot be reached, nothing is done; detail: silent, for a time-out"),
    "closed": ("call", "", "the connection is closed without an answer, nothing is done"),
    "hang": ("call", "", "no answer for `seconds`, nothing is done"),
    "failed": ("call", "", "nothing is done; detail: the HTTP status of a page of HTML (502)"),
    "error": ("call", "", "nothing is done; detail: an error code of the provider's table (its internal error)"),
    "lost-502": ("call", _LAUNCH, "done, then a 502 page of HTML; detail: another status"),
    "lost-closed": ("call", _LAUNCH, "done, then the connection is closed without an answer"),
    "lost-hang": ("call", _LAUNCH, "done, then no answer for `seconds`"),
    "lost-half": ("call", _LAUNCH, "done, then the answer ends in the middle of its body"),
    "lost-empty": ("call", _LAUNCH, "done, then 200 with an empty body"),
    "redirect": ("call", "", "301 to another host (detail: which), nothing is done"),
    "proxy-page": ("call", "", "200 with a page of HTML, nothing is done"),
    "empty": ("call", "", "200 with an empty body, nothing is done"),
    "null-data": ("call", "", "done, then 200 with null where the data should be"),
    "bad-key": ("call", "", "401 whatever the key; Vast: 404, or detail: 401, 403, page"),
    "inactive": ("call", "", "403: the account is inactive; Vast: it has no way to pay"),
    "no-capacity": ("call", _LAUNCH, "400: no capacity, although it is listed; Vast: 404, or detail: 410, 400"),
    "quota": ("call", _LAUNCH, "400: the account's quota is used up; Vast: what it may spend in an hour"),
    "clock-skew": ("answer", "", "the Date header is detail seconds ahead (3600)"),
    "unknown-fields": ("answer", "", "objects have fields that nobody knows"),
    "null-fields": ("answer", "", "what an instance need not have is null"),
    "bare-instances": ("answer", "", "instances lack whatever they need not have"),
    "nothing-terminated": ("answer", _TERMINATE, "done, but the answer does not tell what was terminated"),
    "terminate-late": ("terminate", _TERMINATE, "200, but active for another `seconds`"),
    "terminate-ignored": ("terminate", _TERMINATE, "200, and nothing happens"),
    "terminate-slow": ("terminate", _TERMINATE, "terminating for `seconds` longer"),
    "doubled": (
        "launch",
        _LAUNCH,
        "two are made; Lambda's detail: both, for an answer that names both",
    ),
    "invisible": ("launch", _LAUNCH, "404 and not in the list for `seconds`; detail: wholly, for terminate, too"),
    "boot-unhealthy": ("launch", _LAUNCH, "unhealthy instead of active; Vast: its container ends at once"),
    "boot-stuck": ("launch", _LAUNCH, "booting for `seconds` longer"),
    "goes-unhealthy": ("launch", _LAUNCH, "unhealthy (Vast: offline) `seconds` after it is active; detail: how long"),
    "vanishes": ("launch", _LAUNCH, "gone without a word `seconds` after it is active"),
    "preempted": ("launch", _LAUNCH, "preempted `seconds` after it is active"),
    "no-ip": ("launch", _LAUNCH, "no address for `seconds` after it is active"),
    "odd-status": ("launch", _LAUNCH, "detail instead of `active`"),
    "sshd-late": ("launch", _LAUNCH, "sshd refuses for `seconds` longer"),
    "publickey-denied": ("launch", _LAUNCH, "sshd denies every key for `seconds`"),
    "other-host-key": ("launch", _LAUNCH, "another host key after the first login"),
    "ignores-host-key": ("launch", _LAUNCH, "the host key of user_data is not used"),
    "ignores-user-data": ("launch", _LAUNCH, "nothing of user_data (Vast: onstart) is done"),
    "smi-missing": ("launch", _LAUNCH, "no nvidia-smi"),
    "smi-fails": ("launch", _LAUNCH, "nvidia-smi cannot speak to the driver"),
    "smi-hangs": ("launch", _LAUNCH, "nvidia-smi says nothing for `seconds`"),
    "smi-wrong-gpu": ("launch", _LAUNCH, "another GPU; detail: its name (Tesla T4)"),
    "smi-wrong-count": ("launch", _LAUNCH, "another number of GPUs; detail: how many (one less)"),
    "smi-wrong-memory": ("launch", _LAUNCH, "another memory; detail: MiB (half of it)"),
    "cuda-error": ("launch", _LAUNCH, "CUDA cannot be initialised; detail: its error (802)"),
}
_LAMBDA_ALONE = ("preempted", "ignores-host-key")
_VAST_ALONE: _Kinds = {
    "rate-limited-detail": ("call", "", '429 with {"detail": ...}; detail: Retry-After'),
    "search-quota": (
        "call",
        _OFFERS,
        "429: no more searches today; detail: in how many seconds there are (3600)",
    ),
    "success-false": ("call", "", "200 with success: false, nothing is done; detail: its msg"),
    "msg-only": ("call", "", "only a msg, nothing is done; detail: the HTTP status (400)"),
    "plain-text": ("call", "", "words in plain text, nothing is done; detail: the HTTP status (500)"),
    "no-credit": ("call", _LAUNCH, "400: the credit does not suffice"),
    "no-copy": ("call", "^copy$", "400: nothing can be copied from there"),
    "filter-ignored": ("answer", _OFFERS, "a numeric filter is not honoured; detail: which (all of them)"),
    "refused-yet-made": ("launch", _LAUNCH, "400 with new_contract: it is made, stopped; detail: the error code"),
    "no-instance-key": ("launch", _LAUNCH, "the answer has no instance_api_key"),
    "gpu-taken": ("launch", _LAUNCH, "410 with cancel_unavail; without, a contract that waits for its GPU `seconds`"),
    "boot-fails": ("launch", _LAUNCH, "loading for ever; detail: its status_msg (manifest unknown)"),
    "boot-created": ("launch", _LAUNCH, "created for ever, with an error of OCI; detail: its status_msg"),
    "offline": ("launch", _LAUNCH, "offline `seconds` after it runs; detail: how long"),
    "unknown": ("launch", _LAUNCH, "unknown `seconds` after it runs, though it works; detail: how long"),
    "exited": ("launch", _LAUNCH, "its container ends `seconds` after it runs; detail: how long"),
    "frozen": ("launch", _LAUNCH, "frozen `seconds` after it runs; detail: how long"),
    "outbid": ("launch", _LAUNCH, "a higher bid takes an interruptible `seconds` after it runs; detail: how long"),
    "start-queued": ("launch", _LAUNCH, "once it is stopped its GPU is in other hands for `seconds`"),
    "wrong-type": ("launch", _LAUNCH, "interruptible though on-demand was asked for, or the other way round"),
    "wrong-price": ("launch", _LAUNCH, "dearer than offered; detail: so many times (2)"),
    "delivers-gpu": ("launch", _LAUNCH, "another GPU than offered, and it says so; detail: its name (RTX 3060)"),
    "no-direct": ("launch", _LAUNCH, "no direct port: only the proxy leads there"),
    "direct-dead": ("launch", _LAUNCH, "a direct port at which nobody answers"),
    "proxy-dead": ("launch", _LAUNCH, "a proxy at which nobody answers"),
    "odd-ports": ("launch", _LAUNCH, "ports are null, or detail: list, empty, value-null"),
    "keys-late": ("launch", _LAUNCH, "attached keys take `seconds` longer to be let in"),
    "keys-refreshed": (
        "launch",
        _LAUNCH,
        "`seconds` after it runs, and so on, keys the API does not know are gone",
    ),
    "tmux": ("launch", _LAUNCH, "commands over SSH end in `no sessions` until ~/.no_auto_tmux is there"),
    "no-rsync": ("launch", _LAUNCH, "the image has no rsync"),
    "result-late": ("answer", "^(logs|execute)$", "detail fetches more of the result are refused (20)"),
}
VAST: _Kinds = {name: kind for name, kind in LAMBDA.items() if name not in _LAMBDA_ALONE} | _VAST_ALONE
KINDS: _Kinds = LAMBDA | VAST
OF: dict[str, _Kinds] = {"lambda": LAMBDA, "vast": VAST}
"""What each cloud plays."""
DONE = {"lost-502", "lost-closed", "lost-hang", "lost-half", "lost-empty", "null-data"}
"""What befalls the answer of a call that was done."""
AT_ONCE = {"goes-unhealthy", "vanishes", "preempted", "offline", "unknown", "exited", "frozen", "outbid"}
"""What happens some time after an instance is active."""
