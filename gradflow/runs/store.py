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
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

from gradflow.errors import RunFolderError, UsageError
from gradflow.runs.record_files import durable, read_records, write_records
from gradflow.runs.records import (
    SCHEMA_VERSION,
    LayerRecord,
    ParamRecord,
    Run,
    StepRecord,
    TimeRecord,
)
from gradflow.runs.staging import check_writable, not_stored, publish, remove_abandoned, staging
from gradflow.runs.summary import Summary
from gradflow.specs.fields import expect, expect_items, typed
from gradflow.specs.model_spec import spec_from_json
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import run_key


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


def _folder_name(run: Run) -> str:
    started = datetime.fromisoformat(run.environment["start_utc"])
    return f"{started:%Y%m%dT%H%M%SZ}-{run.spec.slug}-{run_key(run.spec, run.options)}"


def folder_key(folder: Path) -> str:
    """The key in a run folder's name; empty where there is none."""
    match = re.search(r"-([0-9a-f]{8})(-\d+)?$", folder.name)
    return match[1] if match else ""


def _write_files(run: Run, folder: Path) -> None:
    with durable(folder / "run.json") as file:
        json.dump(about(run), file, indent=2, allow_nan=False)
        file.write("\n")
    write_records(folder / "layers.csv", LayerRecord, run.layer_records)
    write_records(folder / "params.csv", ParamRecord, run.param_records)
    write_records(folder / "times.csv", TimeRecord, run.time_records)
    write_records(folder / "steps.csv", StepRecord, run.step_records)


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
