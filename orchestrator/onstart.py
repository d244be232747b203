"""What a rented container does at each of its starts: it says which host key it has, and arms its watchdog."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any
from urllib.parse import urlsplit

from orchestrator import agents
from orchestrator.errors import ConfigError
from orchestrator.providers.base import GuardOrder
from orchestrator.squeezing import squeezed

MAX_CHARS = 4_030
"""Of the whole text: Vast.ai's field takes 4,048 by one of its documents, and as little as 4,000 by none."""
HOST_KEY_PREFIX = "gpu-host-key: "
"""How the line of the container's log begins that names its host key: type and key follow."""
TROUBLE_PREFIX = "gpu-guard: "
"""How the line begins that says why no watchdog runs."""
_API = "/api/v0"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_END_OF_SETTINGS = b"#"
# In the order of its lines: sessions over SSH are plain shells; for a quarter of an hour, beside all else, the host key
# is printed once sshd has made it, and what sshd reads of root's is root's and nobody else's to write: else it lets no
# key in (users' reports); of the Pythons one that runs the agent too is taken, else one that runs the watchdog; a
# watchdog that is killed is started again, until it ends by itself, since another one guards.
_TEXT = """\
#!/bin/sh
umask 77
export HOME="${{HOME:-/root}}"
touch ~/.no_auto_tmux
n=/dev/null k=/etc/ssh/ssh_host_ed25519_key.pub
(trap '' 1;cd;e=
for i in $(seq 900);do [ $e ]||{{ read -r t b c<$k&&echo "{host_key}$t $b"&&e=1;}}
chown -R 0:0 .ssh;chmod go-w .;chmod -R go-w .ssh;sleep 1;done) 2>$n &
w(){{ IFS=:
for v in 10 8;do for d in $q;do for p in $d/python3 $d/python $d/python3.*;do
[ -x $p ]&&$p -Ic "import sys,fcntl,ssl,zlib;sys.exit(sys.version_info<(3,$v))" >$n 2>&1&&return
done;done;done
echo "{trouble}no Python 3.8 here"
exit
}}
q=$PATH:/opt/conda/bin:/venv/main/bin:/usr/local/bin:/usr/bin
w
c='import base64,sys,zlib
sys.argv[1],p=zlib.decompress(base64.b64decode(sys.argv[1])).split(b"{end}",1)
exec(p)'
(trap '' 1
exec $(command -v setsid) sh -c 'until "$0" -Ic "$@";do sleep 15;done' $p "$c" {program}) <$n >$n 2>&1 &
"""


def onstart(guard: GuardOrder) -> str:
    """The shell text for the request that rents a container. No secret is in it: its watchdog has a key there.

    ConfigError when the API's address is none, or the text is too long.
    """
    return script(settings(guard))


def settings(guard: GuardOrder) -> dict[str, Any]:
    """What the watchdog is told, by the names of its attributes; neither marker nor key."""
    where = urlsplit(guard.api_url)
    is_safe = where.scheme == "https" or (where.scheme == "http" and where.hostname in _LOOPBACK)
    if not is_safe or "@" in where.netloc:
        raise ConfigError(f"A guard cannot ask {guard.api_url!r}: it must begin with https://. Nothing was rented.")
    deadlines = [each for each in (guard.deadline, guard.deadline_max) if each is not None]
    told = {
        "tls": where.scheme == "https",
        "host": where.netloc,
        "path": f"{where.path.rstrip('/').removesuffix(_API)}{_API}/instances/",
        "epoch": round(guard.written_at, 3),
        "deadline": None if guard.deadline is None else round(min(deadlines), 3),
        "deadline_max": guard.deadline_max,
        "idle_limit_s": guard.idle_s,
        "grace_s": guard.grace_s,
    }
    return {name: value for name, value in told.items() if value is not None}


def script(told: dict[str, Any]) -> str:
    """The shell text that arms a watchdog told this; ConfigError when it is too long."""
    words = json.dumps(told, separators=(",", ":")).replace("#", "\\u0023").encode()
    packed = zlib.compress(words + _END_OF_SETTINGS + program().encode(), 9)
    text = _TEXT.format(
        host_key=HOST_KEY_PREFIX,
        trouble=TROUBLE_PREFIX,
        end=_END_OF_SETTINGS.decode(),
        program=base64.b64encode(packed).decode(),
    )
    if len(text) > MAX_CHARS:
        raise ConfigError(
            f"What the machine is to do at its start has {len(text)} characters; {MAX_CHARS} can be sent.",
            "Nothing was rented. Is the API's address (GPU_VAST_URL) that long?",
        )
    return text


def program() -> str:
    """The watchdog in as few signs as it needs."""
    return squeezed(agents.sources()["worker/watchdog.py"].decode())
