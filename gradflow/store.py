"""A run to a folder and back. A folder appears by one atomic rename, when it is complete.

A run is `<out>/<UTC time>-<slug>-<key>/` with run.json, layers.csv, params.csv, times.csv and
steps.csv. It is written into a hidden staging folder beside it first. Nothing is ever overwritten,
and what a killed process left half-written is never read: the next run in the same place removes
it.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import IO, Any, TypeVar, get_args, get_type_hints

from gradflow.errors import MeasurementError, RunFolderError, UsageError
from gradflow.model_spec import spec_from_json
from gradflow.records import (
    SCHEMA_VERSION,
    LayerRecord,
    ParamRecord,
    Record,
    Run,
    StepRecord,
    Summary,
    TimeRecord,
    columns,
)
from gradflow.run_options import RunOptions
from gradflow.spec import run_key
from gradflow.spool import Spool
from gradflow.typed import expect, expect_items, typed

STAGING = ".gradflow-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
RecordT = TypeVar("RecordT", LayerRecord, ParamRecord, TimeRecord, StepRecord)


def check_writable(out: Path) -> None:
    """Make sure, before anything is measured, that runs can be stored in `out`; leaves no trace.

    Raises:
        UsageError: it cannot be made, or nothing can be written into it.
        MeasurementError: the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(out)):
            pass
    except OSError as error:
        if error.errno in _FULL:
            raise not_stored(out, error) from None
        rule = "--out is a folder that can be written to"
        raise UsageError(rule, f"{out} ({error.strerror})", "choose another --out") from None


def nearest_folder(out: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(folder for folder in (out, *out.parents) if os.path.lexists(folder))


def save(run: Run, out: Path | str = "results") -> Run:
    """Store a run; returns it with its `path`.

    Raises:
        UsageError: `out` cannot be written to.
        MeasurementError: the disk is full, or failed; nothing half-written remains.
    """
    out = Path(out)
    return replace(run, path=save_as(run, out, _folder_name(run)))


def save_as(run: Run, out: Path, name: str) -> Path:
    """Store a run in a folder of that name, or of that name with a number; returns the folder.

    Raises:
        UsageError: `out` cannot be written to.
        MeasurementError: the disk is full, or failed; nothing half-written remains.
    """
    check_writable(out)
    remove_abandoned(out)
    try:
        with staging(out) as folder:
            _write_files(run, folder)
            return _publish(folder, out, name)
    except OSError as error:
        raise not_stored(out, error) from None


def not_stored(out: Path, error: OSError) -> MeasurementError:
    """The error that says why a run is not stored, and what to do."""
    what = "disk full" if error.errno in _FULL else (error.strerror or str(error))
    return MeasurementError(
        f"the run could not be stored in {out}: {what}; "
        "free some space or choose another --out; nothing half-written remains"
    )


def load(path: Path | str) -> Run:
    """Read a run folder.

    Raises:
        RunFolderError: no run folder, an incomplete or damaged one, or a newer schema.
    """
    path = Path(path)
    about = read_about(path)
    try:
        run = Run(
            spec=spec_from_json(about["spec"]),
            options=RunOptions.from_json(typed(RunOptions, about["options"])),
            summary=Summary(**typed(Summary, about["summary"])),
            environment=_environment(about["environment"]),
            overhead=_overhead(about["overhead"]),
            warnings=tuple(expect_items("warnings", about["warnings"], str)),
            layer_records=read_records(path / "layers.csv", LayerRecord),
            param_records=read_records(path / "params.csv", ParamRecord),
            time_records=read_records(path / "times.csv", TimeRecord),
            step_records=_step_records(path, expect("rows", about["rows"], dict)),
            path=path,
        )
        _check_complete(run, {"steps": 0} | about["rows"])
    except KeyError as error:
        raise RunFolderError(f"{path} is damaged: run.json lacks {error}") from None
    except (TypeError, ValueError, UsageError) as error:
        raise RunFolderError(f"{path} is damaged: run.json: {error}") from None
    return run


def _step_records(path: Path, rows: dict[str, int]) -> Sequence[StepRecord]:
    """The steps; runs that were stored before there was training have no such table."""
    return read_records(path / "steps.csv", StepRecord) if "steps" in rows else []


def _environment(values: object) -> dict[str, Any]:
    found: dict[str, Any] = expect("environment", values, dict)
    for name in ("start_utc", "dtype", "device_name"):  # folders and tables say these
        expect(name, found[name], str)
    return found


def _overhead(values: object) -> dict[str, Any] | None:
    found: dict[str, Any] | None = expect("overhead", values, dict, NoneType)
    return found and expect_items("overhead", found, float, int, NoneType)


def _check_complete(run: Run, rows: dict[str, int]) -> None:
    for name, found in _row_counts(run).items():
        if found != rows[name]:
            raise RunFolderError(
                f"{run.path} is damaged: {name}.csv has {found} rows, "
                f"run.json promises {rows[name]}"
            )


def _row_counts(run: Run) -> dict[str, int]:
    return {
        "layers": len(run.layer_records),
        "params": len(run.param_records),
        "times": len(run.time_records),
        "steps": len(run.step_records),
    }


def read_about(path: Path) -> dict[str, Any]:
    """The content of `run.json`, once its schema is known to be readable.

    Raises:
        RunFolderError: missing, no JSON object, or written by a newer gradflow.
    """
    file = path / "run.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"{path} is no run folder: run.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: run.json: {error}") from None
    version = about.get("schema_version") if isinstance(about, dict) else None
    if type(version) is not int:
        raise RunFolderError(f"{path} is no run folder: run.json has no schema_version")
    if version > SCHEMA_VERSION:
        raise RunFolderError(
            f"{path} has schema_version {version}, this gradflow reads up to {SCHEMA_VERSION}: "
            "upgrade gradflow"
        )
    return dict(about)


def run_folders(out: Path) -> list[Path]:
    """Folders in `out` that hold a `run.json`, oldest first; staging folders are not among them."""
    if not out.is_dir():
        return []
    found = (path for path in out.iterdir() if not path.name.startswith("."))
    return sorted(path for path in found if (path / "run.json").is_file())


def read_records(file: Path, record: type[RecordT]) -> Sequence[RecordT]:
    """The rows of a table; empty cells are None.

    Raises:
        RunFolderError: missing, without a header, a column missing, or a cell of another type.
    """
    parsers = [_parser(hint) for hint in _field_hints(record)]
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.reader(lines)
            _check_header(file, next(rows, []), record)
            made = (record(*(f(c) for f, c in zip(parsers, row, strict=True))) for row in rows)
            return Spool(record, rows=made)
    except OSError as error:
        raise RunFolderError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise RunFolderError(f"{file} is damaged: {error}") from None


def _check_header(file: Path, header: Sequence[str], record: type[Record]) -> None:
    missing = [name for name in columns(record) if name not in header]
    if missing:
        raise RunFolderError(f"{file} is damaged: no column {', '.join(missing)}")
    if tuple(header) != columns(record):
        raise RunFolderError(f"{file} is damaged: its columns are not those of this schema")


def _field_hints(record: type[Record]) -> list[Any]:
    hints = get_type_hints(record)
    return [hints[f.name] for f in fields(record)]


def _parser(hint: Any) -> Any:
    kind, *rest = get_args(hint) or (hint,)
    return (lambda cell: kind(cell) if cell else None) if rest else kind


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Make a hidden folder in `out`, removed at the end unless it has been renamed away.

    A lock on the folder tells others that its owner lives; the system drops it with the process.
    """
    folder, lock = locked_folder(out, STAGING)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def locked_folder(out: Path, prefix: str) -> tuple[Path, int]:
    """A new hidden folder in `out`, and the lock that says its owner lives: a file descriptor."""
    out.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # another process took it for abandoned before it was locked


def remove_abandoned(out: Path) -> None:
    """Remove the staging folders of processes that are gone."""
    for folder in abandoned(out, STAGING):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(out: Path, prefix: str) -> Iterator[Path]:
    """Hidden folders whose owners are gone, each locked until the next is asked for."""
    for folder in sorted(out.glob(prefix + "*")):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # just removed or renamed by its owner
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        except BlockingIOError:
            continue  # its owner is at work
        finally:
            os.close(lock)


def _folder_name(run: Run) -> str:
    started = datetime.fromisoformat(run.environment["start_utc"])
    return f"{started:%Y%m%dT%H%M%SZ}-{run.spec.slug}-{run_key(run.spec, run.options)}"


def folder_key(folder: Path) -> str:
    """The key in a run folder's name; empty where there is none."""
    match = re.search(r"-([0-9a-f]{8})(-\d+)?$", folder.name)
    return match[1] if match else ""


def _publish(folder: Path, out: Path, name: str) -> Path:
    """Rename the folder to a name that is not taken yet."""
    for count in range(1, 1000):
        target = out / (name if count == 1 else f"{name}-{count}")
        try:
            # rename(2) replaces an empty folder only, and no run folder is empty.
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return target
    raise FileExistsError(errno.EEXIST, "a thousand runs of this name", str(out / name))


def _write_files(run: Run, folder: Path) -> None:
    with _durable(folder / "run.json") as file:
        json.dump(about(run), file, indent=2, allow_nan=False)
        file.write("\n")
    write_records(folder / "layers.csv", LayerRecord, run.layer_records)
    write_records(folder / "params.csv", ParamRecord, run.param_records)
    write_records(folder / "times.csv", TimeRecord, run.time_records)
    write_records(folder / "steps.csv", StepRecord, run.step_records)


def write_records(file: Path, record: type[Record], rows: Sequence[Record]) -> None:
    """Write a table: full float precision, nan and inf as such, missing cells empty."""
    names = columns(record)
    with _durable(file) as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(names)
        cells = rows.cells() if isinstance(rows, Spool) else map(attrgetter(*names), rows)
        writer.writerows(cells)


@contextmanager
def _durable(file: Path) -> Iterator[IO[str]]:
    """A file that is on the disk, not in a buffer, when the block ends without an error."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def about(run: Run) -> dict[str, Any]:
    """The content of `run.json`; numbers that JSON has no word for become null."""
    return {
        "schema_version": SCHEMA_VERSION,
        "spec": run.spec.to_json(),
        "options": run.options.to_json(),
        "summary": plain(asdict(run.summary)),
        "environment": plain(run.environment),
        "overhead": plain(run.overhead),
        "warnings": list(run.warnings),
        "rows": _row_counts(run),
    }


def plain(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
