"""The limits of the house: sizes, names, docstrings, and the README's map."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jobs", "orchestrator", "worker")
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
COMMAND_LINES_MAX = 25
PARAMETERS_MAX = 5
BROAD_EXCEPTS = {
    "orchestrator/cli/__init__.py": "the outermost frame of the command line",
    "orchestrator/preflight/rendering.py": "a model's chat template",
    "worker/confinement.py": "forked children, which may not go back into the code that called",
    "worker/hub_store.py": "the Hub's client, which raises a dozen kinds",
    "worker/replica.py": "vLLM, whose many parts raise anything",
    "worker/reranker.py": "the user's re-ranker",
    "worker/prompts.py": "a model's chat template",
    "worker/scoring.py": "another thread: what ends it must be raised where the story is told",
    "worker/watchdog.py": "a provider's answers and a failing machine: nothing of them may end the last guard there is",
    "worker/sources.py": "the Hub's clients, which raise a dozen kinds",
}
"""Files that may catch everything, each once, with the border they stand at."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def lines_of(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def is_command(node: Function) -> bool:
    return any("command" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests", "scripts"), ids=str)
def test_no_file_is_longer_than_one_can_hold_in_mind(path: Path) -> None:
    """No file has more than 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES_MAX


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=str)
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    """No function has over 60 lines (a Click command: 25) or over 5 parameters (a command's options aside)."""
    for node in functions(path):
        limit = COMMAND_LINES_MAX if is_command(node) else FUNCTION_LINES_MAX
        assert lines_of(node) <= limit, f"{node.name} has {lines_of(node)} lines"
        count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        count -= node.args.args[:1] != [] and node.args.args[0].arg in ("self", "cls")
        assert is_command(node) or count <= PARAMETERS_MAX, f"{node.name} takes {count}"


def test_functions_are_mostly_very_short() -> None:
    """Half of all functions have at most 10 lines."""
    sizes = sorted(lines_of(node) for path in sources(*PACKAGES) for node in functions(path))
    assert sizes[len(sizes) // 2] <= 10


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=str)
def test_no_module_bears_a_standard_library_name(path: Path) -> None:
    """No module of ours can be taken for one of the standard library, wherever it is run from."""
    assert path.stem not in sys.stdlib_module_names - {"__main__", "__init__"}


@pytest.mark.parametrize("path", sources("tests"), ids=str)
def test_every_test_states_its_claim(path: Path) -> None:
    """Every test has a docstring: one sentence, its claim."""
    for node in functions(path):
        if node.name.startswith("test_"):
            assert ast.get_docstring(node), f"{node.name} does not say what it claims"


@pytest.mark.parametrize("path", sources("tests"), ids=str)
def test_tests_wait_for_conditions(path: Path) -> None:
    """No test sleeps for longer than a poll of a condition."""
    for found in re.finditer(r"\bsleep\(([0-9.]+)\)", path.read_text(encoding="utf-8")):
        assert float(found[1]) <= 0.1, found[0]


def test_everything_is_caught_only_at_borders() -> None:
    """`except Exception` stands only at borders to code that is not ours, once each."""
    found = {}
    for path in sources(*PACKAGES):
        handlers = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ExceptHandler)
            and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
            and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
        ]
        if handlers:
            found[path.relative_to(ROOT).as_posix()] = len(handlers)
    assert found == dict.fromkeys(BROAD_EXCEPTS, 1)


def test_the_map_in_the_readme_is_true() -> None:
    """The README's map names every module with the sentence its docstring begins with, and nothing else."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = dict(re.findall(r"^\| `((?:jobs|orchestrator|worker)/[\w/.]+\.py)` \| (.+) \|$", readme, re.MULTILINE))
    actual = {}
    for path in sources(*PACKAGES):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        actual[path.relative_to(ROOT).as_posix()] = docstring.splitlines()[0]
    assert mapped == actual


def test_every_command_is_in_the_readme_with_an_example_in_its_help() -> None:
    """Every command's help has an example, and the README shows the command."""
    from orchestrator import cli

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in cli.gpu.list_commands(None):  # type: ignore[arg-type]
        command = cli.gpu.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert command.help
        assert "Example:" in command.help, name
        assert f"gpu {name}" in readme, name


def test_links_in_the_documents_lead_somewhere() -> None:
    """Every relative link of a Markdown file names a file of the project."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_nothing_of_this_machine_is_in_the_project() -> None:
    """No tracked file names the folder it lies in, nor a package registry's host."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    unwanted = [b"pypi." + b"org", b"registry.npmjs." + b"org", b"files.python" + b"hosted"]
    if len(ROOT.parts) > 2:  # a clone in / or /tmp has a path that may well be somebody's word
        unwanted.append(f"{ROOT}/".encode())
    for name in filter(None, tracked):
        path = ROOT / name.decode()
        if path.is_file() and path.suffix not in (".png", ".safetensors"):
            content = path.read_bytes()
            assert not [word for word in unwanted if word in content], name
