"""A run to a folder and back. A folder appears by one atomic rename, when it is complete.

A run is `<out>/<UTC time>-<slug>-<key>/` with run.json, layers.csv, params.csv, times.csv and
steps.csv. It is written into a hidden staging folder beside it first. Nothing is ever overwritten,
and what a killed process left half-written is never read: the next run in the same place removes
it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

from gradflow.errors import RunFolderError, UsageError
from gradflow.runs.records import SCHEMA_VERSION, TABLES, Run, Summary, records_of
from gradflow.runs.staging import check_writable, not_stored, publish, remove_abandoned, staging
from gradflow.runs.tables import check_is_file, damaged_table, durable, read_records, write_records
from gradflow.specs.fields import expect, expect_items, typed
from gradflow.specs.model_spec import Spec, spec_from_json
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import run_key

# Sizes, counts and operations are smaller; larger ones fit no table.
_LARGEST_WHOLE = 2**63 - 1


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
            return publish(folder, out, name)
    except OSError as error:
        raise not_stored(out, error) from None


@dataclass(frozen=True)
class RunDescription:
    """`run.json` of one run folder, checked.

    Attributes:
        spec, options, summary, environment, overhead, warnings: as those of a `Run`.
        rows: how many rows each table of `TABLES` must have.
    """

    spec: Spec
    options: RunOptions
    summary: Summary
    environment: dict[str, Any]
    overhead: dict[str, Any] | None
    warnings: tuple[str, ...]
    rows: dict[str, int]


def load(path: Path | str) -> Run:
    """Read a run folder.

    Raises:
        RunFolderError: no run folder, an incomplete or damaged one, or a newer schema.
    """
    folder = Path(path)
    head = described(folder, read_run_json(folder))
    values: dict[str, Any] = {name: value for name, value in vars(head).items() if name != "rows"}
    values[records_of("steps")] = []  # runs from before there was training have no such table
    for name, rows in head.rows.items():
        values[records_of(name)] = read_records(folder / f"{name}.csv", TABLES[name], rows)
    return Run(**values, path=folder)


def read_run_json(path: Path) -> dict[str, Any]:
    """The content of `run.json`, once its schema is known to be readable.

    Raises:
        RunFolderError: missing, no plain file, no JSON object, or written by a newer gradflow.
    """
    file = path / "run.json"
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for without end
            raise RunFolderError(f"{path} is no run folder: run.json is no plain file")
        content = plain(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunFolderError(f"{path} is no run folder: run.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: run.json: {error}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise RunFolderError(f"{path} is no run folder: run.json has no schema_version")
    if version > SCHEMA_VERSION:
        raise RunFolderError(
            f"{path} has schema_version {version}, this gradflow reads up to {SCHEMA_VERSION}: "
            "upgrade gradflow"
        )
    return dict(content)


def described(path: Path, content: dict[str, Any]) -> RunDescription:
    """The content of `run.json`, held against the types and rules of its parts.

    Args:
        path: the run folder, and where the files that it promises must be.
        content: of run.json.

    Raises:
        RunFolderError: a part is missing or breaks a rule, or a table is missing.
    """
    try:
        _check_numbers(content)
        found = RunDescription(
            spec=spec_from_json(content["spec"]),
            options=RunOptions.from_json(typed(RunOptions, content["options"])),
            summary=Summary(**_whole_summary(typed(Summary, content["summary"]))),
            environment=_environment(content["environment"]),
            overhead=_overhead(content["overhead"]),
            warnings=tuple(expect_items("warnings", content["warnings"], str)),
            rows=_rows(content["rows"]),
        )
    except KeyError as error:
        raise RunFolderError(f"{path} is damaged: run.json lacks {error}") from None
    except (TypeError, ValueError, RecursionError, UsageError) as error:
        raise RunFolderError(f"{path} is damaged: run.json: {error}") from None
    for name in found.rows:
        check_is_file(path / f"{name}.csv")
    if not found.rows["layers"]:
        raise damaged_table(path / "layers.csv", "has no rows")
    return found


def _check_numbers(content: Any) -> None:
    """Refuse whole numbers that no float is near to and no table can hold; seeds may be so large.

    Raises:
        ValueError: there is one.
    """
    if isinstance(content, int) and abs(content) > _LARGEST_WHOLE:
        raise ValueError("holds a number that is too large")
    if isinstance(content, dict):
        content = [value for key, value in content.items() if key != "seed"]
    for value in content if isinstance(content, list) else ():
        _check_numbers(value)


def _rows(values: object) -> dict[str, int]:
    rows: dict[str, int] = expect_items("rows", expect("rows", values, dict), int)
    wanted = [name for name in TABLES if name != "steps" or name in rows]
    return {name: rows[name] for name in wanted}


# Fields of a summary that every run has, though their value may be null.
_IN_EVERY_SUMMARY = (
    *("total_log10_gain", "log10_gain_per_layer", "log10_gain_per_layer_low"),
    *("log10_gain_per_layer_high", "efolding_layers", "trend", "healthy_depth"),
    *("param_grad_spread", "skip_share"),
)


def _whole_summary(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stored summary; a KeyError names a field that it lacks."""
    for name in _IN_EVERY_SUMMARY:
        _ = values[name]
    return values


def _environment(values: object) -> dict[str, Any]:
    found: dict[str, Any] = expect("environment", values, dict)
    for name in ("start_utc", "dtype", "device_name"):  # folders and tables say these
        expect(name, found[name], str)
    return found


def _overhead(values: object) -> dict[str, Any] | None:
    found: dict[str, Any] | None = expect("overhead", values, dict, NoneType)
    return found and expect_items("overhead", found, float, int, NoneType)


def run_folders(out: Path) -> list[Path]:
    """Folders in `out` that hold a `run.json`, oldest first; staging folders are not among them."""
    if not out.is_dir():
        return []
    found = (path for path in out.iterdir() if not path.name.startswith("."))
    return sorted(path for path in found if (path / "run.json").is_file())


def _folder_name(run: Run) -> str:
    started = datetime.fromisoformat(run.environment["start_utc"])
    return f"{started:%Y%m%dT%H%M%SZ}-{run.spec.slug}-{run_key(run.spec, run.options)}"


def folder_key(folder: Path) -> str:
    """The key in a run folder's name; empty where there is none."""
    match = re.search(r"-([0-9a-f]{8})(-\d+)?$", folder.name)
    return match[1] if match else ""


def _write_files(run: Run, folder: Path) -> None:
    with durable(folder / "run.json") as file:
        json.dump(run_json(run), file, indent=2, allow_nan=False)
        file.write("\n")
    for name, rows in run.records.items():
        write_records(folder / f"{name}.csv", TABLES[name], rows)


def run_json(run: Run) -> dict[str, Any]:
    """The content of `run.json`; numbers that JSON has no word for become null."""
    return {
        "schema_version": SCHEMA_VERSION,
        "spec": run.spec.to_json(),
        "options": run.options.to_json(),
        "summary": plain(asdict(run.summary)),
        "environment": plain(run.environment),
        "overhead": plain(run.overhead),
        "warnings": list(run.warnings),
        "rows": {name: len(rows) for name, rows in run.records.items()},
    }


def plain(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
