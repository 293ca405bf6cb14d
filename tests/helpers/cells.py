"""Two tables of records held against each other, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from gradflow.runs.records import Record

Cells = dict[tuple[int, str], Any]


def differences(
    mine: Sequence[Record], other: Sequence[Record], rel: float, leave_out: Collection[str] = ()
) -> Cells:
    """Both values of the cells that differ, by row and column; missing equals missing alone."""
    a, b = _cells(mine, leave_out), _cells(other, leave_out)
    assert a.keys() == b.keys()
    return {key: (a[key], b[key]) for key in a if not _same(a[key], b[key], rel)}


def _cells(records: Sequence[Record], leave_out: Collection[str]) -> Cells:
    rows = enumerate(map(asdict, records))
    return {(n, k): v for n, row in rows for k, v in row.items() if k not in leave_out}


def _same(a: Any, b: Any, rel: float) -> bool:
    if not (isinstance(a, float) and isinstance(b, float)):
        return a == b
    return math.isclose(a, b, rel_tol=rel, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
