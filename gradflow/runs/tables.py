"""The tables of a run as CSV files, and back: full float precision, missing cells empty.

What a table may look like is decided here, once. It is UTF-8 text, with or without a byte order
mark, its lines end in LF or CRLF, and its first line names the columns of its record. Every line
has a cell for each column and ends in a newline: a number that was cut short looks like another
number. Numbers are ASCII without spaces and underscores; whole numbers fit 64 bits, seeds alone
are of any size. Only columns that may be missing have empty cells.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import IO, Any, get_args, get_type_hints

from gradflow.errors import RunFolderError
from gradflow.runs.disk_rows import RecordT, Spool
from gradflow.runs.records import Record, columns

_SHOWN = 3
# What numbers that Python reads may hold, and those of other readers may not.
_ODD = re.compile(r"[^!-^`-~]")
_LARGEST = 2**63 - 1


def read_records(file: Path, record: type[RecordT], rows: int | None = None) -> Sequence[RecordT]:
    """The rows of a table; empty cells are None.

    Args:
        file: the table.
        record: the class of its rows.
        rows: how many there must be; any number if None.

    Raises:
        RunFolderError: it is missing, cannot be read, or breaks a rule of this module.
    """
    check_is_file(file)
    try:
        if not _ends_in_a_newline(file):
            raise ValueError("ends in the middle of a line")
        with file.open(newline="", encoding="utf-8-sig") as lines:
            found = Spool(record, rows=_parsed(csv.reader(lines), record))
    except OSError as error:
        reason = f"{file.name}: {error.strerror}"
        raise RunFolderError(f"{file.parent} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise damaged_table(file, "is no UTF-8 text") from None
    except (ValueError, csv.Error) as error:
        raise damaged_table(file, str(error)) from None
    if rows is not None and len(found) != rows:
        raise damaged_table(file, f"has {len(found)} rows, run.json promises {rows}")
    return found


def check_is_file(file: Path) -> None:
    """Refuse what is no plain file, such as a pipe, from which reading would wait for ever.

    Raises:
        RunFolderError: it is something else, or is not there.
    """
    try:
        plain = file.is_file()
    except OSError as error:
        reason = f"{file.name}: {error.strerror}"
        raise RunFolderError(f"{file.parent} cannot be read: {reason}") from None
    if not plain:
        raise RunFolderError(f"{file.parent} has no {file.name}")


def damaged_table(file: Path, fault: str) -> RunFolderError:
    """The error that names a table and what is wrong with it."""
    return RunFolderError(f"{file.parent} is damaged: {file.name} {fault}")


def _ends_in_a_newline(file: Path) -> bool:
    """Whether the last line is whole; so it is where there is none."""
    with file.open("rb") as data:
        if not data.seek(0, os.SEEK_END):
            return True
        data.seek(-1, os.SEEK_END)
        return data.read() == b"\n"


def _parsed(lines: Any, record: type[RecordT]) -> Iterator[RecordT]:
    """The records of a `csv.reader`.

    Raises:
        ValueError: the header or a line breaks a rule.
    """
    if fault := _header_fault(next(lines, []), columns(record)):
        raise ValueError(fault)
    cell_types = _cell_types(record)
    parsers = [each.parse for each in cell_types]
    numbers = itemgetter(*(i for i, each in enumerate(cell_types) if each.wanted != "a name"))
    for cells in lines:
        if len(cells) != len(parsers):
            raise ValueError(f"has too few or too many cells in line {lines.line_num}")
        try:
            if _ODD.search("".join(numbers(cells))):
                raise ValueError
            row = record(*(parse(cell) for parse, cell in zip(parsers, cells, strict=True)))
        except ValueError:
            place = next(i for i, each in enumerate(cell_types) if each.refuses(cells[i]))
            what = f"{cells[place]!r} for {columns(record)[place]} in line {lines.line_num}"
            raise ValueError(f"has {what}, not {cell_types[place].wanted}") from None
        yield row


def _header_fault(header: Sequence[str], names: Sequence[str]) -> str | None:
    if not any(cell.strip() for cell in header):
        return "is empty"
    missing = [name for name in names if name not in header]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return f"has no column {', '.join(missing[:_SHOWN])}{more}"
    return None if tuple(header) == tuple(names) else "has columns that are not of this schema"


@dataclass(frozen=True)
class _CellType:
    """How the cells of a column become values, and what they must be, in words."""

    parse: Callable[[str], Any]
    wanted: str

    def refuses(self, cell: str) -> bool:
        """Whether a cell breaks a rule."""
        try:
            self.parse(cell)
        except ValueError:
            return True
        return self.wanted != "a name" and _ODD.search(cell) is not None


def _cell_types(record: type[Record]) -> list[_CellType]:
    hints = get_type_hints(record)
    return [_cell_type(name, hints[name]) for name in columns(record)]


def _cell_type(name: str, hint: Any) -> _CellType:
    kind, *optional = get_args(hint) or (hint,)
    if kind is str:
        return _CellType(_unit if name == "unit" else str, "a name")
    parse = _whole if kind is int and name != "seed" else kind
    wanted = "a whole number" if kind is int else "a number"
    return _CellType((lambda cell: parse(cell) if cell else None) if optional else parse, wanted)


def _unit(cell: str) -> str:
    if not cell:
        raise ValueError
    return cell


def _whole(cell: str) -> int:
    value = int(cell)
    if abs(value) > _LARGEST:
        raise ValueError
    return value


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
