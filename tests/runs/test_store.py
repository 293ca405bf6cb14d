"""Runs to folders and back: complete or invisible, never overwritten, never a traceback."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import ENVIRONMENT, RUNS, layer_rows, records_of, run_of, spec_of

from gradflow.engine.environment import without_path
from gradflow.errors import MeasurementError, RunFolderError, UsageError
from gradflow.runs import store
from gradflow.runs.records import (
    TABLES,
    LayerRecord,
    ParamRecord,
    Run,
    StepRecord,
    TimeRecord,
    columns,
)
from gradflow.runs.staging import STAGING, check_writable, staging
from gradflow.runs.tables import write_records
from gradflow.specs.run_options import RunOptions

PARAM = ParamRecord(0, 0, 1, "mlp", "branch.linear.weight", "8x8", 64, 1.0, 0.5, -0.3, 0)
TIME = TimeRecord(0, 1, "mlp", 1e-5, 2e-5)
STEP = StepRecord(0, 0, 2.0, 0.5, 2.5, 1.0, 0.1, 0.01)
# A folder of its own for each example would cost more than the example.
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def full_run() -> Run:
    """A run with rows in every table."""
    return run_of(params=[PARAM, replace(PARAM, layer=2)], times=[TIME], steps=[STEP])


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = store.save(full_run(), tmp_path).path
    assert path is not None
    return path


def content(run: Run) -> tuple[Any, ...]:
    """All of a run but its place; NaN equals NaN here."""
    tables = (run.layer_records, run.param_records, run.time_records, run.step_records)
    head = (run.spec, run.options, run.summary, run.environment, run.overhead, run.warnings)
    return *head, repr([list(table) for table in tables])


# Back and forth


@settings(in_one_folder, max_examples=25)
@given(run=RUNS)
def test_a_run_comes_back_as_it_was(tmp_path: Path, run: Run) -> None:
    saved = store.save(run, tmp_path)
    assert content(store.load(saved.path)) == content(run)
    shutil.rmtree(saved.path)


@settings(in_one_folder, max_examples=25)
@given(rows=st.lists(records_of(LayerRecord), min_size=1, max_size=5))
def test_pandas_reads_a_table_without_options(tmp_path: Path, rows: list[LayerRecord]) -> None:
    file = tmp_path / "layers.csv"
    write_records(file, LayerRecord, rows)
    table = pd.read_csv(file)
    assert tuple(table.columns) == columns(LayerRecord)
    for name in ("grad_norm", "log10_grad_norm", "gain", "backward_s"):
        values = [getattr(row, name) for row in rows]
        expected = [math.nan if value is None else value for value in values]
        assert table[name].tolist() == pytest.approx(expected, rel=1e-15, nan_ok=True)
    assert table["layer"].tolist() == [row.layer for row in rows]


def test_plain_read_csv_has_the_right_types(stored: Path) -> None:
    table = pd.read_csv(stored / "layers.csv")
    assert table["layer"].dtype == "int64"
    assert table["log10_grad_norm"].dtype == "float64"
    assert table["unit"].tolist() == ["input", "mlp", "mlp", "mlp"]


def test_cells_as_they_are_written(tmp_path: Path) -> None:
    row = replace(PARAM, norm=0.1 + 0.2, grad_norm=math.nan, log10_grad_norm=-math.inf)
    missing = replace(row, grad_norm=None, log10_grad_norm=math.inf, nonfinite=None)
    write_records(tmp_path / "params.csv", ParamRecord, [row, missing])
    _, first, second = (tmp_path / "params.csv").read_text().splitlines()
    assert first.endswith(",0.30000000000000004,nan,-inf,0")
    assert second.endswith(",0.30000000000000004,,inf,")


def test_frames_hold_the_records() -> None:
    run = full_run()
    assert tuple(run.layers.columns) == columns(LayerRecord)
    assert run.params["param"].tolist() == ["branch.linear.weight"] * 2
    assert run.times["backward_s"].tolist() == [2e-5]


# Folders


def test_the_name_tells_time_stack_and_key(stored: Path) -> None:
    assert stored.name.startswith("20260102T030405Z-mlp-residual-pre-d3-")
    assert sorted(file.name for file in stored.iterdir()) == sorted(
        ["run.json", *(f"{name}.csv" for name in TABLES)]
    )


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    runs = [store.save(replace(full_run(), warnings=(str(i),)), tmp_path) for i in range(3)]
    assert len({run.path for run in runs}) == 3
    assert [store.load(run.path).warnings for run in runs] == [("0",), ("1",), ("2",)]
    assert len(store.run_folders(tmp_path)) == 3


def test_a_file_of_that_name_is_not_overwritten(tmp_path: Path, stored: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / stored.name).write_text("mine")
    assert store.save(full_run(), other).path == other / f"{stored.name}-2"
    assert (other / stored.name).read_text() == "mine"


def test_a_staging_folder_is_no_run(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        (folder / "run.json").write_text("{}")
        assert store.run_folders(tmp_path) == []
    assert not folder.exists()


def test_a_folder_that_is_not_there_has_no_runs(tmp_path: Path) -> None:
    assert store.run_folders(tmp_path / "none") == []


def test_debris_goes_and_the_living_stay(tmp_path: Path) -> None:
    debris = tmp_path / f"{STAGING}abandoned"
    debris.mkdir()
    (debris / "layers.csv").write_text("half")
    with staging(tmp_path) as alive:
        path = store.save(full_run(), tmp_path).path
        assert alive.is_dir()
        assert not debris.exists()
    assert list(tmp_path.iterdir()) == [path]


def test_other_hidden_files_stay(tmp_path: Path) -> None:
    (tmp_path / ".notes").mkdir()
    (tmp_path / f"{STAGING}file").write_text("no folder of ours")
    store.save(full_run(), tmp_path)
    assert (tmp_path / ".notes").is_dir()
    assert (tmp_path / f"{STAGING}file").is_file()


# Damage: one line that names the folder, never a traceback


def assert_refused(path: Path, *says: str) -> None:
    with pytest.raises(RunFolderError) as caught:
        store.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    for word in says:
        assert word in message


@pytest.mark.parametrize("name", ["run.json", "layers.csv", "params.csv", "times.csv"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "folder", "binary"])
def test_a_damaged_file_is_named(stored: Path, name: str, damage: str) -> None:
    file = stored / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        left = {"empty": b"", "half": whole[: len(whole) // 2], "binary": b"\xff\x00\r" * 99}
        file.write_bytes(left[damage])
    assert_refused(stored, name)


def test_a_missing_column_is_named(stored: Path) -> None:
    table = pd.read_csv(stored / "layers.csv").drop(columns=["gain", "act_rms"])
    table.to_csv(stored / "layers.csv", index=False)
    assert_refused(stored, "layers.csv", "act_rms, gain")


def test_a_foreign_column_is_refused(stored: Path) -> None:
    pd.read_csv(stored / "times.csv").assign(more=1).to_csv(stored / "times.csv", index=False)
    assert_refused(stored, "times.csv", "columns")


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_counted(stored: Path, table: str) -> None:
    file = stored / f"{table}.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert_refused(stored, f"{table}.csv has {len(lines) - 2} rows", f"promises {len(lines) - 1}")


@pytest.mark.parametrize("column", ["seed", "layer"])
def test_a_cell_that_must_be_there_is_missed(stored: Path, column: str) -> None:
    table = pd.read_csv(stored / "layers.csv", dtype=str)
    table.loc[1, column] = None
    table.to_csv(stored / "layers.csv", index=False)
    assert_refused(stored, "layers.csv")


def change(stored: Path, change_it: Callable[[dict[str, Any]], object]) -> None:
    """Change run.json as Python has it."""
    about = json.loads((stored / "run.json").read_text())
    change_it(about)
    (stored / "run.json").write_text(json.dumps(about))


# A change of run.json, and what the error says of it.
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer schema": (lambda a: a.update(schema_version=99), "upgrade gradflow"),
    "schema of another type": (lambda a: a.update(schema_version=True), "no schema_version"),
    "no schema": (lambda a: a.pop("schema_version"), "no schema_version"),
    "no spec": (lambda a: a.pop("spec"), "lacks 'spec'"),
    "no rows": (lambda a: a.pop("rows"), "lacks 'rows'"),
    "spec is a list": (lambda a: a.update(spec=[1]), "StackSpec is list, not dict"),
    "unknown field": (lambda a: a["spec"].update(colour=1), "colour"),
    "unknown block": (lambda a: a["spec"].update(block="cube"), "transformer"),
    "depth is text": (lambda a: a["spec"].update(depth="3"), "depth is str, not int"),
    "depth is true": (lambda a: a["spec"].update(depth=True), "depth is bool, not int"),
    "width breaks a rule": (lambda a: a["spec"].update(width=-1), "--width"),
    "timing is a number": (lambda a: a["options"].update(timing=1), "timing is int, not bool"),
    "verdict is null": (lambda a: a["summary"].update(verdict=None), "not str"),
    "summary lacks a field": (lambda a: a["summary"].pop("verdict"), "verdict"),
    "summary lacks a number": (
        lambda a: a["summary"].pop("total_log10_gain"),
        "lacks 'total_log10_gain'",
    ),
    "summary has one more": (lambda a: a["summary"].update(mood="good"), "mood"),
    "a number is text": (lambda a: a["summary"].update(skip_share="1"), "not float or null or int"),
    "environment is text": (lambda a: a.update(environment="here"), "environment is str"),
    "no device": (lambda a: a["environment"].pop("device_name"), "lacks 'device_name'"),
    "overhead is text": (lambda a: a.update(overhead=""), "overhead is str"),
    "overhead holds text": (lambda a: a.update(overhead={"a": "b"}), "a value in overhead is str"),
    "warnings are text": (lambda a: a.update(warnings="abc"), "warnings is str"),
    "warnings hold numbers": (lambda a: a.update(warnings=[1]), "a value in warnings is int"),
    "rows are a list": (lambda a: a.update(rows=[4, 2, 1]), "rows is list"),
    "rows are text": (lambda a: a["rows"].update(layers="4"), "a value in rows is str"),
}


@pytest.mark.parametrize(("change_it", "says"), CHANGES.values(), ids=CHANGES)
def test_run_json_of_wrong_types_is_refused(
    stored: Path, change_it: Callable[[dict[str, Any]], object], says: str
) -> None:
    change(stored, change_it)
    assert_refused(stored, says)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", "{", "[" * 100_000, '{"schema_version": 1e999}', "\N{BOM}{}"]
)
def test_run_json_that_is_no_object_is_refused(stored: Path, text: str) -> None:
    (stored / "run.json").write_text(text, encoding="utf-8")
    assert_refused(stored, "run.json")


def test_whole_numbers_are_floats_too(stored: Path) -> None:
    change(stored, lambda a: a["summary"].update(total_log10_gain=3))
    assert store.load(stored).summary.total_log10_gain == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def corrupt(data: st.DataObject, path: Path, original: dict[str, bytes]) -> None:
    """One change to one file of a stored run: bytes, or a value somewhere in run.json."""
    name = data.draw(st.sampled_from(sorted(original)))
    text = original[name]
    if name == "run.json" and data.draw(st.booleans()):
        about = json.loads(text)
        holder, key = about, data.draw(st.sampled_from(sorted(about)))
        while isinstance(holder[key], dict) and holder[key] and data.draw(st.booleans()):
            holder = holder[key]
            key = data.draw(st.sampled_from(sorted(holder)))
        holder[key] = data.draw(JSON)
        (path / name).write_text(json.dumps(about))
        return
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    (path / name).write_bytes(text[:start] + data.draw(st.binary(max_size=8)) + text[end:])


@settings(in_one_folder, max_examples=120)
@given(data=st.data())
def test_a_corrupted_run_is_read_or_refused_in_one_line(stored: Path, data: st.DataObject) -> None:
    original = {file.name: file.read_bytes() for file in stored.iterdir()}
    try:
        corrupt(data, stored, original)
        try:
            run = store.load(stored)
            seen = f"{len(run.layers)} rows"
        except RunFolderError as error:
            seen = str(error)
        assert len(seen.splitlines()) == 1
    finally:
        for name, text in original.items():
            (stored / name).write_bytes(text)


# No room, no permission


def assert_no_trace(out: Path) -> None:
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
def test_disk_full_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(MeasurementError, match=r"disk full; free some space .* choose another"):
        store.save(full_run(), tmp_path)
    monkeypatch.undo()
    assert_no_trace(tmp_path)


def test_a_disk_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MeasurementError, match="Input/output error"):
        store.save(full_run(), tmp_path)
    assert_no_trace(tmp_path)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    with small_files(600), pytest.raises(MeasurementError, match="could not be stored"):
        store.save(full_run(), tmp_path)
    assert_no_trace(tmp_path)


@contextmanager
def tiny_disk(at: Path) -> Iterator[Path]:
    """A file system of 16 KiB; skips the test where mounting is not allowed."""
    at.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(at)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_of(depth=400)
    big = run_of(spec, list(layer_rows(spec, [0.0] * 401)))
    with tiny_disk(tmp_path / "disk") as disk:
        with pytest.raises(MeasurementError, match="disk full"):
            store.save(big, disk)
        assert_no_trace(disk)
        (disk / "rest").write_bytes(b"0" * 4096)
        with pytest.raises(MeasurementError, match="disk full"):
            store.save(full_run(), disk)
        assert [file.name for file in disk.iterdir()] == ["rest"]


@pytest.mark.parametrize("where", ["file", "file/below", "link"])
def test_what_is_no_folder_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"--out is a folder .*{where} .*choose another --out"):
        check_writable(tmp_path / where)


def test_proc_is_refused() -> None:
    with pytest.raises(UsageError, match="--out is a folder that can be written to; got /proc/x"):
        store.save(full_run(), "/proc/x")


def test_looking_whether_a_folder_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert_no_trace(tmp_path)
    assert store.save(full_run(), tmp_path / "a" / "b").path is not None


# Killed while it saves


def save_and_die(run: Run, out: Path, moment: int) -> bool:
    """Save in a child that is killed at its `moment`-th event; whether that came in time."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(die)
        try:
            store.save(run, out)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def assert_all_complete(out: Path, *expected: Run) -> None:
    """What can be seen is whole."""
    visible = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert visible == store.run_folders(out)
    for path in visible:
        assert content(store.load(path)) in [content(run) for run in expected]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_any_moment_of_a_save_nothing_half_written_is_seen(tmp_path: Path) -> None:
    """Moments are calls and returns of functions, also of those written in C."""
    run = full_run()
    moment, debris, deaths = 1, 0, 0
    while save_and_die(run, tmp_path, moment):
        assert_all_complete(tmp_path, run)
        debris += any(tmp_path.glob(f"{STAGING}*"))
        deaths += 1
        moment += 1 + moment // 6
    assert debris > 3
    assert deaths > 15
    store.save(run, tmp_path)
    assert not any(tmp_path.glob(f"{STAGING}*"))


# Privacy


def test_no_host_name_and_no_absolute_path_is_stored(stored: Path) -> None:
    text = "".join(file.read_text() for file in stored.iterdir())
    assert socket.gethostname() not in text
    assert str(stored.parent) not in text


@pytest.mark.parametrize(
    ("word", "stored_as"),
    [
        ("/usr/bin/gradflow", "gradflow"),
        ("--out=/home/me/runs", "--out=runs"),
        ("--out=/home/me=you/runs", "--out=runs"),
        ("/home/a=b/runs", "runs"),
        ("/home/me/one,two,/home/me/three", "one,two,three"),
        ("--weights=mine,/home/me/theirs", "--weights=mine,theirs"),
        ("--depth=3", "--depth=3"),
        ("results/mine", "results/mine"),
        ("-", "-"),
        ("", ""),
    ],
)
def test_words_of_the_command_line_lose_their_paths(word: str, stored_as: str) -> None:
    assert without_path(word) == stored_as


def test_the_key_leaves_out_what_changes_no_number() -> None:
    names = {store._folder_name(run_of(options=RunOptions(repeats=n))) for n in (1, 2)}
    others = {store._folder_name(run_of(options=RunOptions(seed=n))) for n in (1, 2)}
    assert len(names) == 1
    assert len(others) == 2
    assert ENVIRONMENT["start_utc"].startswith("2026-01-02")
