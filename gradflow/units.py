"""Human units at the edge: everything inside is SI and full precision."""

from __future__ import annotations

import math
import re

# Characters of the widest number in a table: ten columns of them fit into 80.
WIDEST = 7


UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def gib(count: int) -> str:
    """Bytes in GiB or MiB; in KiB or bytes, where they would be 0 MiB."""
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    unit = next((unit for unit in ("MiB", "KiB") if count >= 2 ** UNITS[unit]), "B")
    return f"{count / 2 ** UNITS[unit]:.0f} {unit}"


def size_in_bytes(text: str) -> int:
    """Bytes of `4GiB`, `500 MiB`, or `4`, which is in GiB.

    Raises:
        ValueError: no positive number with one of these units.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = (match[2] or "GiB") if match else ""
    found = int(float(match[1]) * 2 ** UNITS[unit]) if match and unit in UNITS else 0
    if found <= 0:
        raise ValueError(text)
    return found


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


def rounded(value: float) -> str:
    """Two significant digits, with thousands separated."""
    return f"{float(f'{value:.2g}'):,.0f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign; empty if missing."""
    return "" if value is None else f"{value:+.{digits}f}"


def count(amount: int, noun: str) -> str:
    """`1 seed`, `2,000 seeds`."""
    return f"{amount} {noun}" if amount == 1 else f"{amount:,} {noun}s"
