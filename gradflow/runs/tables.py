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
from dataclasses import fields
from operator import attrgetter
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
    parsers = _parsers(record)
    for cells in lines:
        if len(cells) != len(parsers):
            raise ValueError(f"has too few or too many cells in line {lines.line_num}")
        try:
            if _ODD.search("".join(cells)):
                _check_numbers(cells, parsers)
            row = record(*(parse(cell) for parse, cell in zip(parsers, cells, strict=True)))
        except ValueError:
            raise ValueError(_cell_fault(cells, record, lines.line_num)) from None
        yield row


def _header_fault(header: Sequence[str], names: Sequence[str]) -> str | None:
    if not any(cell.strip() for cell in header):
        return "is empty"
    missing = [name for name in names if name not in header]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return f"has no column {', '.join(missing[:_SHOWN])}{more}"
    return None if tuple(header) == tuple(names) else "has columns that are not of this schema"


def _parsers(record: type[Record]) -> list[Callable[[str], Any]]:
    hints = get_type_hints(record)
    return [_parser(field.name, hints[field.name]) for field in fields(record)]


def _parser(name: str, hint: Any) -> Callable[[str], Any]:
    """How a cell becomes a value: a type, or a function that raises a ValueError as types do."""
    kind, *optional = get_args(hint) or (hint,)
    if kind is str:
        return _unit if name == "unit" else str
    if kind is int:
        kind = int if name == "seed" else _whole
    return (lambda cell: kind(cell) if cell else None) if optional else kind


def _unit(cell: str) -> str:
    if not cell:
        raise ValueError
    return cell


def _whole(cell: str) -> int:
    value = int(cell)
    if abs(value) > _LARGEST:
        raise ValueError
    return value


def _check_numbers(cells: Sequence[str], parsers: Sequence[Callable[[str], Any]]) -> None:
    """Refuse the odd characters of a line, but for those in its texts."""
    texts = (str, _unit)
    if any(_ODD.search(c) for p, c in zip(parsers, cells, strict=True) if p not in texts):
        raise ValueError


def _cell_fault(cells: Sequence[str], record: type[Record], line: int) -> str:
    """What is wrong with the first bad cell of a line."""
    hints = get_type_hints(record)
    for name, parse, cell in zip(columns(record), _parsers(record), cells, strict=True):
        try:
            _check_numbers([cell], [parse])
            parse(cell)
        except ValueError:
            kind = (get_args(hints[name]) or (hints[name],))[0]
            wanted = {int: "a whole number", float: "a number", str: "a name"}[kind]
            return f"has {cell!r} for {name} in line {line}, not {wanted}"
    raise AssertionError(line)  # one of the cells was refused


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
