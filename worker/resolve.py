"""What `auto` became and the fingerprint of everything that changes results: settled once, kept to by every attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs import durable, rundir, spec
from worker import engines
from worker.failures import FingerprintChanged
from worker.plan import Prepared

_GENERATING = ("temperature", "top_p", "max_new_tokens", "stop", "seed", "shots", "instruction", "split")
_WEIGHING = ("shots", "split")
"""Parameters that change what a row says, of tasks that generate and of those that compare likelihoods."""


def settle(run: rundir.Run, parts: Sequence[Prepared]) -> dict[str, Any]:
    """Settle what an evaluation measures; see `keep`."""
    return keep(run, resolved(parts))


def keep(run: rundir.Run, found: dict[str, Any]) -> dict[str, Any]:
    """Write resolved.json in the first attempt; later ones must come to the same, else FingerprintChanged explains."""
    found = {**found, "weights": [folder.name for folder in run.folders()]}
    known = durable.load_json(run.resolved)
    if known is None:
        durable.save_json(run.resolved, found)
        return found
    if known["fingerprint"] != found["fingerprint"]:
        raise FingerprintChanged(
            f"This is not what the run began with: {differences(_flat(known['identity']), _flat(found['identity']))}. "
            "Results of both would not be comparable, so nothing was done; what there is so far is untouched.",
            "Put things back as they were and resume, or start a new run.",
        )
    return dict(known)


def list_examples(run: rundir.Run, parts: Sequence[Prepared]) -> None:
    """Write examples.json in the first attempt: which examples there are, for whoever divides what is missing."""
    if not run.examples.exists():
        durable.save_json(run.examples, {"ids": [name for part in parts for name in part.example_ids]})


def resolved(parts: Sequence[Prepared]) -> dict[str, Any]:
    """The document of resolved.json; `identity` is what the fingerprint is taken of: of several parts, that of each."""
    first = parts[0]
    identity = _identity(first)
    if first.title:
        identity = {"parts": {part.task.NAME: _identity(part) for part in parts}}
    findings = [(part.title, finding) for part in parts for finding in part.asked.findings]
    return {
        "fingerprint": spec.digest(identity),
        "identity": identity,
        "device": engines.device(first.engine, first.request),
        "model": first.params["model"],
        "first_prompt": "\n\n".join(f"{part.title}{part.asked.first_prompt}" for part in parts),
        "warnings": [title + finding.message for title, finding in findings if finding.level == "warning"],
        "rules": list(dict.fromkeys(rule for part in parts for rule in part.task.RULES)),
        "headline": first.task.HEADLINE,
        **({"headlines": {part.task.NAME: part.task.HEADLINE for part in parts}} if first.title else {}),
    }


def _identity(prepared: Prepared) -> dict[str, Any]:
    """Everything that changes what a key's row says. Batch size, paths, device and the number of samples do not."""
    return {
        "task": prepared.task.NAME,
        "task_version": prepared.task.VERSION,
        **engines.identity(prepared.engine, prepared.request),
        "template_digest": prepared.renderer.template_digest,
        "dataset_digest": prepared.dataset_digest,
        "shots_digest": prepared.shots_digest,
        **_settings(prepared),
    }


def _settings(prepared: Prepared) -> dict[str, Any]:
    """The parameters among it; of a length left to us, what it became."""
    params, length = prepared.params, prepared.asked.max_length
    names = [*(_GENERATING if length is None else _WEIGHING), *prepared.task.OPTIONS]
    found = {name: params[name] for name in names if name in params}
    return found if length is None else {**found, "max_length": length}


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with everything by one name: what belongs to a part by the part's and its own."""
    if "parts" not in identity:
        return identity
    return {f"{task}.{name}": value for task, part in identity["parts"].items() for name, value in part.items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Every entry that is not the same, in words."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} was {_short(before.get(name))}, is {_short(after.get(name))}" for name in names)


def _short(value: Any) -> str:
    words = "unset" if value is None else str(value)
    return words if len(words) <= 24 else words[:16] + "…"
