"""Of every task: a few records in the form it is published in, and which fields none of them can be without."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fields = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """Records as published, the fields that each must have, and a reply to the first one that is right."""

    records: tuple[Fields, ...]
    needed: tuple[str, ...]
    reply: str = ""

    def save(self, path: Path, records: list[Fields] | None = None) -> Path:
        """A file of these records, else of all of its own."""
        lines = [json.dumps(record) for record in (self.records if records is None else records)]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path


def _sum(number: int) -> str:
    return f"What is {number} + {number}?"


def _function(name: str, body: str, result: int) -> Fields:
    return {
        "task_id": f"Made/{name}",
        "prompt": f'def {name}():\n    """Return {result}."""\n',
        "entry_point": name,
        "canonical_solution": body,
        "test": f"def check(candidate):\n    assert candidate() == {result}\n",
    }


BENCHMARKS = {
    "gsm8k": Benchmark(
        tuple({"question": _sum(n), "answer": f"<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"} for n in (1, 2, 3)),
        ("question", "answer"),
        "1 + 1 = 2\n#### 2",
    ),
    "math": Benchmark(
        tuple(
            {
                "problem": _sum(n),
                "solution": f"It is $\\boxed{{{2 * n}}}$.",
                "answer": str(2 * n),
                "subject": "Algebra",
                "level": n,
                "unique_id": f"test/algebra/{n}.json",
            }
            for n in (1, 2, 3)
        ),
        ("problem",),
        r"So $\boxed{2}$.",
    ),
    "humaneval": Benchmark(
        (_function("one", "    return 1\n", 1), _function("two", "    return 2\n", 2)),
        ("prompt", "entry_point", "test"),
        "    return 1\n",
    ),
    "generation": Benchmark(
        ({"prompt": "Say hello.", "language": "en"}, {"prompt": "Sag hallo.", "language": "de"}, {"prompt": "Go on."}),
        ("prompt",),
        "Hello. It is good to see that you are here and that the day is a fine one for all of us.",
    ),
    "prompts": Benchmark(
        (
            {"category": "exact", "prompt": "Say yes.", "expect": {"exact": "yes"}},
            {"prompt": "Say a word.", "expect": {"regex": "^(\\w+ ?)+$", "keywords": {"none": ["no"]}}},
            {
                "messages": [{"role": "user", "content": "Call f."}],
                "expect": {"tool_call": {"name": "f", "arguments": {"type": "object"}}},
            },
        ),
        ("expect",),
        "yes",
    ),
    "arc": Benchmark(
        tuple(
            {
                "id": f"Made_{n}",
                "question": _sum(n),
                "choices": {"text": [str(2 * n), "seven"], "label": ["A", "B"]},
                "answerKey": "A",
            }
            for n in (1, 2, 3)
        ),
        ("question", "choices", "answerKey"),
    ),
    "hellaswag": Benchmark(
        tuple(
            {
                "activity_label": "Counting",
                "ctx_a": f"A man counts to {n}.",
                "ctx_b": "then he",
                "endings": ["stops.", "[title] flies away."],
                "label": "0",
            }
            for n in (1, 2, 3)
        ),
        ("activity_label", "endings", "label"),
    ),
    "mmlu": Benchmark(
        tuple(
            {"question": _sum(n), "subject": "algebra", "choices": [str(n), str(2 * n), "5", "9"], "answer": 1}
            for n in (1, 2, 3)
        ),
        ("question", "subject", "choices", "answer"),
    ),
    "perplexity": Benchmark(
        ({"text": "One cat."}, {"text": "Two cats sat.", "subject": "cats"}, {"text": "Three."}), ("text",)
    ),
}
"""A dataset of each task."""

HOSTILE = {
    "empty": "",
    "blank": " \n\t" * 100,
    "digits": "7" * 1_000_000,
    "numbers": "1,234.5/" * 50_000,
    "NUL": "\0" * 1000 + "#### 1\0\n\\boxed{\0}",
    "lone surrogates": "\ud800 #### \udfff \\boxed{\ud83d}",
    "open brackets": "[{(<" * 20_000,
    "nested objects": '{"name":' * 20_000 + "1" + "}" * 20_000,
    "nested boxes": r"\boxed{" * 5_000 + "1" + "}" * 5_000,
    "nested fractions": r"$\frac{" * 300 + "1" + "}{2}" * 300 + "$",
    "fences": "```python\n" * 2_000,
    "marks": "#### " * 50_000,
    "dollars": "$" * 100_001,
    "right to left": "\u202e\u2066#### \u0663\u200f\n" * 50,
}
"""Replies that a model could give, and a rule could fall over."""
