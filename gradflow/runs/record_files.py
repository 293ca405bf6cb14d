"""The tables of a run as CSV files, and back: full float precision, missing cells empty."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, TypeVar, get_args, get_type_hints

from gradflow.errors import RunFolderError
from gradflow.runs.disk_rows import Spool
from gradflow.runs.headers import header_fault
from gradflow.runs.records import LayerRecord, ParamRecord, Record, StepRecord, TimeRecord, columns

RecordT = TypeVar("RecordT", LayerRecord, ParamRecord, TimeRecord, StepRecord)


def read_records(file: Path, record: type[RecordT]) -> Sequence[RecordT]:
    """The rows of a table; empty cells are None.

    Raises:
        RunFolderError: missing, without a header, a column missing, or a cell of another type.
    """
    parsers = [_parser(hint) for hint in _field_hints(record)]
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.reader(lines)
            if fault := header_fault(next(rows, []), columns(record)):
                raise RunFolderError(f"{file.parent} is damaged: {file.name} {fault}")
            made = (record(*(f(c) for f, c in zip(parsers, row, strict=True))) for row in rows)
            return Spool(record, rows=made)
    except OSError as error:
        reason = f"{file.name}: {error.strerror}"
        raise RunFolderError(f"{file.parent} cannot be read: {reason}") from None
    except (ValueError, csv.Error) as error:
        raise RunFolderError(f"{file.parent} is damaged: {file.name}: {error}") from None


def _field_hints(record: type[Record]) -> list[Any]:
    hints = get_type_hints(record)
    return [hints[f.name] for f in fields(record)]


def _parser(hint: Any) -> Any:
    kind, *rest = get_args(hint) or (hint,)
    return (lambda cell: kind(cell) if cell else None) if rest else kind


def write_records(file: Path, record: type[Record], rows: Sequence[Record]) -> None:
    """Write a table: full float precision, nan and inf as such, missing cells empty."""
    names = columns(record)
    with durable(file) as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(names)
        cells = rows.cells() if isinstance(rows, Spool) else map(attrgetter(*names), rows)
        writer.writerows(cells)


@contextmanager
def durable(file: Path) -> Iterator[IO[str]]:
    """A file that is on the disk, not in a buffer, when the block ends without an error."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
