"""The first line of a table, checked alike where one run is read and where thousands are."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3


def header_fault(header: Sequence[str], names: Sequence[str]) -> str | None:
    """What is wrong with the columns of a table; None if nothing is.

    Args:
        header: the cells of its first line; none where there is no line.
        names: the columns that it must have.
    """
    if not any(cell.strip() for cell in header):
        return "is empty"
    missing = [name for name in names if name not in header]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        return f"has no column {', '.join(missing[:SHOWN])}{more}"
    return None if tuple(header) == tuple(names) else "has columns that are not of this schema"
