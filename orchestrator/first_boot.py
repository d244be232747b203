"""What a rented machine is told to do at its first boot."""

from __future__ import annotations

import json


def text(private: str, public: str) -> str:
    """cloud-config that gives the machine its host key. JSON is YAML, so that nothing is spliced."""
    keys = {"ed25519_private": private, "ed25519_public": public}
    return "#cloud-config\n" + json.dumps({"ssh_keys": keys}, indent=1) + "\n"
