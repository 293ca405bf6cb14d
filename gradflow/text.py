"""Values as text: human units, Markdown, CSV, JSON, foreign text made harmless, ASCII drawings.

Everything inside the package is SI and full precision; this module is the edge where it is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Characters of the widest number in a table: ten columns of them fit into 80.
WIDEST = 7
LONGEST_TEXT = 400
_BYTES_LOG2 = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#"
_BRAILLE = 0x2800
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
# All but ± keep their width, so that what stands in columns stays there.
_ASCII = str.maketrans(
    {
        **dict(zip(BARS, ASCII_BARS, strict=True)),
        **dict.fromkeys(map(chr, range(_BRAILLE + 1, _BRAILLE + 256)), "*"),
        chr(_BRAILLE): " ",
        **dict.fromkeys("┌┐└┘├┤┬┴┼", "+"),
        "─": "-",
        "│": "|",
        "·": "'",
        "…": ":",
        "▲": "^",
        "▼": "v",
        "±": "+/-",
        **dict(zip(_SUPERSCRIPTS, "0123456789-", strict=True)),
    }
)


def gib(amount: int) -> str:
    """Bytes in GiB or MiB; in KiB or bytes, where they would be 0 MiB."""
    if amount >= 2**30:
        return f"{amount / 2**30:,.1f} GiB"
    unit = next((unit for unit in ("MiB", "KiB") if amount >= 2 ** _BYTES_LOG2[unit]), "B")
    return f"{amount / 2 ** _BYTES_LOG2[unit]:.0f} {unit}"


def size_in_bytes(text: str) -> int:
    """Bytes of `4GiB`, `500 MiB`, or `4`, which is in GiB.

    Raises:
        ValueError: no positive number with one of these units.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = (match[2] or "GiB") if match else ""
    size = int(float(match[1]) * 2 ** _BYTES_LOG2[unit]) if match and unit in _BYTES_LOG2 else 0
    if size <= 0:
        raise ValueError(text)
    return size


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, to three digits or a microsecond; empty if missing."""
    if seconds is None:
        return ""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else number(value, ".3f" if value < 1 else "#.3g")


def giga(value: float) -> str:
    """A rate in billions, to three digits."""
    billions = value / 1e9
    return f"{billions:,.0f}" if billions >= 100 else number(billions, "#.3g")


def number(value: float | None, digits: str) -> str:
    """A number by its format; empty if missing.

    Where the format would be too wide, or hide a positive quantity, the number is scientific;
    a number with its sign is a logarithm and loses decimals instead.
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    text = format(value, digits).removesuffix(".")
    if "+" in digits:
        text = text if len(text) <= WIDEST else f"{value:+.1f}"
        return text if text.strip("-0.") else text.replace("-", "+")
    hidden = value > 0 and not text.strip("0.")
    return f"{value:.1e}" if hidden or len(text) > WIDEST else text


def two_digits(value: float) -> str:
    """A number rounded to two significant digits, with thousands separated."""
    return f"{float(f'{value:.2g}'):,.0f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign; empty if missing."""
    return "" if value is None else f"{value:+.{digits}f}"


def count(amount: int, noun: str) -> str:
    """An amount with its noun: `1 seed`, `2,000 seeds`."""
    return f"{amount} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def printable(value: object) -> str:
    """A value as one line: unprintable characters are shown as escapes, long texts are cut."""
    text = str(value)
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return " " if character in "\n\t" else character.encode("unicode_escape").decode()


def escape_markdown(text: str) -> str:
    """The text as one line in which nothing is Markdown or HTML."""
    import html  # a millisecond, as `csv` below: the command line waits for neither

    for mark in "\\|`*_[]~":
        text = text.replace(mark, "\\" + mark)
    return html.escape(" ".join(text.split()), quote=False)


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1
) -> Iterator[str]:
    """The lines of a Markdown table; its first `left` columns are aligned left."""
    yield _markdown_row(headings)
    yield _markdown_row(["---" if i < left else "--:" for i in range(len(headings))])
    for row in rows:
        yield _markdown_row(row)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Dictionaries as CSV, all their keys on the first line; a missing value is an empty cell."""
    import csv
    import io

    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_text(content: Any, *, ascii_only: bool = True) -> str:
    """Content as indented JSON that ends with a line break.

    Args:
        content: what `json.dumps` takes.
        ascii_only: with escapes in place of all other characters.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=ascii_only) + "\n"


def can_draw(encoding: str | None) -> bool:
    """Whether an encoding has the characters that profiles and bars are drawn with."""
    try:
        (BARS + "⣿±│┤").encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def in_ascii(text: str) -> str:
    """The text with ASCII in place of every character that gradflow draws with.

    A character that an encoding lacks would become a question mark. Bars are ` .:-=+*#` from low
    to high, ± is `+/-`, 10⁷ is `10^7`; all other characters stay as they are.
    """
    return re.sub(f"[{_SUPERSCRIPTS}]+", r"^\g<0>", text).translate(_ASCII)


def in_superscript(amount: int) -> str:
    """A whole number in superscript digits: `⁻¹²`."""
    return str(amount).translate(str.maketrans("0123456789-", _SUPERSCRIPTS))
