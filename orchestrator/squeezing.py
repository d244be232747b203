"""A Python program in fewer signs that does the same: without its words for people, and with short names."""

from __future__ import annotations

import ast
import builtins
import io
import itertools
import keyword
import tokenize
from collections import Counter
from collections.abc import Iterator

_ONLY_FOR_TYPES = ("__future__", "collections.abc", "typing")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAMED = ("id", "arg", "name", "attr")
"""Where nodes of a syntax tree bear a name."""
_BLANK = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def squeezed(source: str) -> str:
    """The program without docstrings, comments, annotations and spaces, its own names short; the same for the same.

    A name is shortened one for one wherever it stands, unless it is also that of an import, a builtin, a keyword or an
    attribute of anything but `self`. ValueError for an f-string, whose spaces may mean something.
    """
    tree = _Bare().visit(ast.parse(source))
    if any(isinstance(node, ast.JoinedStr) for node in ast.walk(tree)):
        raise ValueError("an f-string cannot be squeezed")
    _rename(tree)
    return _dense(ast.unparse(ast.fix_missing_locations(tree)))


class _Bare(ast.NodeTransformer):
    """Takes away what is there for people and type checkers."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)] or [ast.Pass()]  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module in _ONLY_FOR_TYPES else node

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """All plain imports on one line."""
        self.generic_visit(node)
        names = [name for each in node.body if isinstance(each, ast.Import) for name in each.names]
        node.body = [each for each in node.body if not isinstance(each, ast.Import)]
        if names:
            node.body.insert(0, ast.Import(names))
        return node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _rename(tree: ast.AST) -> None:
    """Give the program's own names short ones, the most frequent the shortest."""
    own = _own_names(tree)
    found = Counter(name for node in ast.walk(tree) for _, name in _names(node) if name in own)
    ranked = sorted(found, key=lambda name: (-found[name], name))
    taken = {name for node in ast.walk(tree) for _, name in _names(node)} | set(keyword.kwlist)
    short = dict(zip(ranked, (name for name in _short_names() if name not in taken), strict=False))
    for node in ast.walk(tree):
        for place, name in list(_names(node)):
            setattr(node, place, short.get(name, name))


def _names(node: ast.AST) -> Iterator[tuple[str, str]]:
    if not isinstance(node, (ast.keyword, ast.alias)):
        for place in _NAMED:
            name = getattr(node, place, None)
            if isinstance(name, str):
                yield place, name


def _short_names() -> Iterator[str]:
    yield from _LETTERS
    yield from ("".join(pair) for pair in itertools.product(_LETTERS, repeat=2))


def _own_names(tree: ast.AST) -> set[str]:
    """Names of functions, classes, parameters and variables that mean nothing else anywhere in the program."""
    nodes = list(ast.walk(tree))
    bound = {name for node in nodes for place, name in _names(node) if _binds(node, place)}
    methods = {name for node in nodes if isinstance(node, ast.ClassDef) for item in node.body for name in _method(item)}
    others = set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.keyword):
            others.add(str(node.arg))
        elif isinstance(node, ast.alias):
            others.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Attribute) and not (node.attr in methods and _is_self(node.value)):
            others.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            others |= {
                name for item in node.body if not _is_def(item) for each in ast.walk(item) for _, name in _names(each)
            }
    return {name for name in bound - others if not name.startswith("__")}


def _binds(node: ast.AST, place: str) -> bool:
    """Whether the node is where a name comes into being."""
    if isinstance(node, ast.Name):
        return isinstance(node.ctx, ast.Store)
    return place != "attr"


def _is_def(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def _method(node: ast.AST) -> list[str]:
    return [node.name] if isinstance(node, ast.FunctionDef) else []


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _dense(text: str) -> str:
    """The same tokens with no space that they do not need."""
    lines, line, depth = [], "", 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type in _BLANK:
            lines += [line] if line else []
            line = ""
        else:
            gap = " " if line and _is_word(line[-1]) and _is_word(token.string[0]) else ""
            line = (line or " " * depth) + gap + token.string
    return "\n".join(lines)


def _is_word(sign: str) -> bool:
    return sign.isalnum() or sign == "_"
