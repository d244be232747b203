"""How commands print: aligned columns for people, one JSON document for scripts."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import click

from orchestrator.plain import plain


def document(value: Any) -> None:
    """Print one JSON document and nothing else."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1))


def columns(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print lines in aligned columns under their titles."""
    table = [[plain(word) for word in line] for line in (titles, *lines)]  # names and counts may be a machine's
    widths = [max(len(line[index]) for line in table) for index in range(len(titles))]
    for line in table:
        click.echo("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def progress(quiet: bool) -> Callable[[str], None]:
    """Says what is going on, on standard error; nothing when quiet.

    Words that begin with a carriage return replace one another on a terminal; elsewhere those that say no more than
    the last ones, but for a number, are left out.
    """
    live = ""

    def say(words: str) -> None:
        nonlocal live
        before, live = live, re.sub("[0-9]", "", words) if words.startswith("\r") else ""
        on_terminal = sys.stderr.isatty()
        if quiet or (live and live == before and not on_terminal):
            return
        start = "\r\x1b[K" if before and on_terminal else ""
        click.echo(f"{start}{plain(words)}", err=True, nl=not (live and on_terminal))

    return say


@contextlib.contextmanager
def text(names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Prints what a machine said, made harmless and without secrets, wherever the pieces are cut."""
    from orchestrator import keys

    masker = keys.Masker(keys.secrets(names))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield lambda words: click.echo(plain(decoder.decode(masker.feed(words.encode("utf-8", "replace")))), nl=False)
    click.echo(plain(decoder.decode(masker.flush(), final=True)), nl=False)


@contextlib.contextmanager
def raw(stream: TextIO, names: Sequence[str]) -> Iterator[Callable[[bytes], None]]:
    """What a command on a machine writes, as it comes, without the secrets it was sent; harmless on a terminal."""
    from orchestrator import keys

    masker = keys.Masker(keys.secrets(names))
    shown = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(chunk: bytes) -> None:
        if stream.isatty():
            stream.write(plain(shown.decode(chunk)))
            stream.flush()
        else:
            stream.buffer.write(chunk)
            stream.buffer.flush()

    yield lambda chunk: write(masker.feed(chunk))
    write(masker.flush())
