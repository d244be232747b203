"""Which choice a model takes after worked examples, by how likely it finds each: three rules, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker.tasks import Example

RULES = ("acc", "acc_norm", "acc_bytes")
"""As in lm-evaluation-harness 0.4.13: the largest log-likelihood, the largest per character, the largest per byte."""

_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc": lambda _: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8", "surrogatepass")),
}


def context(example: Example, shots: Sequence[Example]) -> str:
    """Each shot with the text of its right choice, then the problem."""
    return "".join([f"{shot.problem} {shot.choices[int(shot.target)]}\n\n" for shot in shots] + [example.problem])


def answers(logliks: Sequence[float], choices: Sequence[str]) -> dict[str, int]:
    """By rule, the number of the choice it takes, from 0; the first of equals. The space before it has no length."""
    found = {}
    for rule, length in _LENGTHS.items():
        weights = [loglik / length(choice) for loglik, choice in zip(logliks, choices, strict=True)]
        found[rule] = max(range(len(weights)), key=weights.__getitem__)
    return found


def scores(taken: dict[str, int], target: int) -> dict[str, float]:
    """By rule, 1.0 when the choice it takes is the right one, else 0.0."""
    return {rule: float(answer == target) for rule, answer in taken.items()}
