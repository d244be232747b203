"""A squeezed program is the program: the same tree under other names, one for one."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from orchestrator import agents
from orchestrator.squeezing import squeezed

PROGRAM = '''
"""A program."""
from __future__ import annotations
import os
from typing import Any
import sys
LIMIT: int = 3
"""Of all."""

class Counter:
    """Counts."""
    step = 2  # written down under this name
    found: list[int]

    def __init__(self, start: int) -> None:
        self.count = start

    def count_on(self, times: int = LIMIT, *, key: str = "key") -> int:
        """Counts on."""
        for index in range(times):
            self.count += self.step if index >= 0 else -1
        return self.count

def shown(value: object, **more: Any) -> str:
    """In words."""
    "and no more"
    return "value: " + str(value) + "  two  spaces\\n" + str(sorted(more.items())) + str(lambda_of(7)(1))

def lambda_of(value):
    return lambda other: (other, value) if value else None

def nothing() -> None:
    """Does nothing."""

nothing()
counter = Counter(1)
RESULT = [shown(counter.count_on(key="x"), key=1), vars(counter), os.sep, sys.maxsize, counter.count_on.__name__ != ""]
'''


def ran(program: str) -> Any:
    """What the program leaves behind as its last list."""
    names: dict[str, Any] = {}
    exec(program, names)
    return next(value for name, value in reversed(names.items()) if isinstance(value, list))


def test_a_squeezed_program_does_the_same() -> None:
    """Names that others see, such as those of attributes and keywords, stay; what it does is the same."""
    short = squeezed(PROGRAM)
    assert ran(short) == ran(PROGRAM)
    assert len(short) < 0.6 * len(PROGRAM)
    for word in ("Counts", "and no more", "Any", "shown", "index", "  '"):
        assert word not in short.replace("two  spaces", "")
    assert squeezed(PROGRAM) == short


def test_what_it_cannot_squeeze_is_refused() -> None:
    """A program with formatted strings, whose spaces it would take, is an error and no other program."""
    with pytest.raises(ValueError, match="f-string"):
        squeezed('name = 1\nprint(f"{name} is {name}")')


def test_the_watchdog_is_the_same_tree_under_other_names() -> None:
    """Node for node and constant for constant the squeezed watchdog is its source, and names stand one for one."""
    source = ast.parse(agents.sources()["worker/watchdog.py"])
    short = ast.parse(squeezed(ast.unparse(source)))
    names: dict[str, str] = {}
    told, sent = bare(source), bare(short)
    assert len(told) == len(sent)
    for (kind, before, rest), (other_kind, after, other_rest) in zip(told, sent, strict=True):
        assert (kind, rest) == (other_kind, other_rest)
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            assert names.setdefault(old, new) == new
    assert len(set(names.values())) == len(names), "two names became one"


def bare(tree: ast.Module) -> list[tuple[str, list[str], list[object]]]:
    """Kind, names and constants of every node that does something, in order; imports aside."""
    found = []
    for node in ast.walk(strip(tree)):
        names = [getattr(node, place) for place in ("id", "arg", "name", "attr") if getattr(node, place, None)]
        constants = [node.value] if isinstance(node, ast.Constant) else []
        found.append((type(node).__name__, names, constants))
    return found


def strip(tree: ast.Module) -> ast.Module:
    """The tree without imports, texts for people and types."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            kept = [each for each in body if not is_for_people(each)]
            node.body = [plain(each) for each in kept] or [ast.Pass()]  # type: ignore[attr-defined]
        for place in ("returns", "annotation"):
            if hasattr(node, place):
                setattr(node, place, None)
    return tree


def is_for_people(node: ast.AST) -> bool:
    """Whether it does nothing by itself, or imports."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    return isinstance(node, (ast.Import, ast.ImportFrom)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def plain(node: Any) -> ast.AST:
    """An assignment without its type."""
    is_typed = isinstance(node, ast.AnnAssign) and node.value is not None
    return ast.Assign([node.target], node.value) if is_typed else node
