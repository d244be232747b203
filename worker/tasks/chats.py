"""The chat that asks a problem after worked examples, each a turn of the user and one of the assistant."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker.tasks import Example


def chat(
    example: Example, shots: Sequence[Example], instruction: str, reply: Callable[[Example], str]
) -> list[dict[str, str]]:
    """Every shot with its reply, then the problem; the instruction, where there is one, on a new line after each."""
    suffix = f"\n{instruction}" if instruction else ""
    turns: list[dict[str, str]] = []
    for shot in shots:
        turns.append({"role": "user", "content": shot.problem + suffix})
        turns.append({"role": "assistant", "content": reply(shot)})
    return [*turns, {"role": "user", "content": example.problem + suffix}]
