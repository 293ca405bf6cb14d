"""Tables as Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Iterator[str]:
    """The lines of a table; its first `left` columns are aligned left, the others right."""
    yield _line(headings)
    yield _line(["---" if i < left else "--:" for i in range(len(headings))])
    for row in rows:
        yield _line(row)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def escaped(text: str) -> str:
    """Text in which nothing is markup."""
    for mark in "\\|`*_[]~":
        text = text.replace(mark, "\\" + mark)
    return html.escape(" ".join(text.split()), quote=False)
