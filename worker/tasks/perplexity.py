"""Perplexity: how well a model predicts texts of any kind, or WikiText with its detokeniser, in rolling windows."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from worker.tasks import READS, Example
from worker.tasks.records import Ids, Record, read

NAME = "perplexity"
VERSION = "1"
KIND = READS
DATASET = "EleutherAI/wikitext_document_level"
SHOTS_SPLIT = ""
COLUMNS: tuple[str, ...] = ()
OPTIONS = ("field",)
RULES: tuple[str, ...] = ()
HEADLINE = ""

_PAGE = "page"
"""The field of WikiText by documents: a text in tokens, which is read detokenised."""
_HOLDS = "Name the field that holds the text: --set field=NAME"

# lm_eval/tasks/wikitext/preprocess_wikitext.py of 0.4.13, in its order. The slashes of the second are its own.
_DETOKENISING: tuple[tuple[re.Pattern[str] | str, str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), r"/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" " + chr(176) + " ", chr(176)),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def examples(records: Sequence[Mapping[str, Any]], *, field: str = "auto") -> list[Example]:
    """Every record's text as an Example, in order; `auto` is the field `text`, and else `page`, as WikiText has it.

    A `page` is read detokenised, and its words and bytes are counted as they stood. Raises BadRecord.
    """
    return read(records, _HOLDS, functools.partial(_example, field=field))


def detokenised(page: str) -> str:
    """A page of WikiText as people write."""
    for pattern, plain in _DETOKENISING:
        page = page.replace(pattern, plain) if isinstance(pattern, str) else pattern.sub(plain, page)
    return page


def words(text: str) -> int:
    """How many words lm-evaluation-harness counts: pieces between white space, an empty one at an end too."""
    return len(re.split(r"\s+", text))


def _example(record: Record, ids: Ids, field: str) -> Example:
    is_page = _PAGE in record.fields and "text" not in record.fields
    name = field if field != "auto" else _PAGE if is_page else "text"
    text = record.text(name)
    return Example(
        id=ids.take(record, text),
        problem=detokenised(text) if name == _PAGE else text,
        target="",
        subject=record.label("subject"),
        solution=text,
    )
