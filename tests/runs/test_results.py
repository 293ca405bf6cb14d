"""Many runs at once: what is read is what was stored; damage is named and left alone."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args, get_type_hints

import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from records import ENVIRONMENT, layer_rows, run_of, spec_of
from torch import nn

import gradflow
from gradflow.errors import RunFolderError, UsageError
from gradflow.judging.remarks import contradiction, oddities, same_network
from gradflow.runs import frames, store
from gradflow.runs.records import (
    FINITE_COLUMNS,
    NORM_COLUMNS,
    LayerRecord,
    Run,
    broken_rows,
    columns,
)
from gradflow.runs.results import read_results
from gradflow.showing.formats import results_markdown
from gradflow.showing.page.chart_tables import axis_ends, chart_tables
from gradflow.showing.sentences import design_by_design
from gradflow.showing.terminal.many_runs import results_view
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.text import LONGEST_TEXT, printable

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAN, INF = math.nan, math.inf


def saved(out: Path, run: Run | None = None) -> Path:
    path = store.save(run or run_of(), out).path
    assert path is not None
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def transformer_rows(depth: int, seeds: int) -> tuple[StackSpec, list[LayerRecord]]:
    spec = spec_of(depth=depth, block="transformer", width=8)
    rows = []
    for seed in range(seeds):
        profile = [0.125 * seed - 0.25 * i for i in range(2 * depth + 1)]
        rows += list(layer_rows(spec, profile, seed, act_cos=0.5))
    return spec, rows


# What is read is what was stored


def test_means_and_span_over_the_seeds(tmp_path: Path) -> None:
    spec, rows = transformer_rows(depth=2, seeds=3)
    saved(tmp_path, run_of(spec, rows, options=RunOptions(seeds=3)))
    units = read_results(tmp_path).units
    assert units.columns == list(frames.UNIT_COLUMNS)
    assert units["x"].to_list() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert units["unit"].to_list() == ["input", "attention", "ffn", "attention", "ffn"]
    for i, unit in enumerate(units.iter_rows(named=True)):
        logs = [row.log10_grad_norm or 0.0 for row in rows[i::5]]
        assert unit["log10_grad_norm"] == pytest.approx(fmean(logs), abs=1e-15)
        assert (unit["low"], unit["high"]) == (min(logs), max(logs))
        assert unit["act_cos"] == 0.5
        assert unit["forward_s"] is None


def test_only_the_first_step_is_read(tmp_path: Path) -> None:
    rows = list(layer_rows(spec_of(), [0.0] * 4))
    later = [replace(row, step=7, log10_grad_norm=-5.0) for row in rows]
    saved(tmp_path, run_of(layers=[*later, *rows]))
    assert read_results(tmp_path).units["log10_grad_norm"].to_list() == [0.0] * 4


def test_not_finite_cells_are_gaps(tmp_path: Path) -> None:
    rows = layer_rows(spec_of(), [NAN, -INF, INF, 1.0], act_rms={3: INF})
    saved(tmp_path, run_of(layers=list(rows)))
    results = read_results(tmp_path)
    assert results.skipped == ()
    assert results.units["log10_grad_norm"].to_list() == [None, None, None, 1.0]
    assert results.units["act_rms"].to_list()[-1] is None


def test_runs_keep_their_rows_across_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_BATCH", 2)
    for i in range(5):
        saved(tmp_path, run_of(spec_of(width=8 + i), list(layer_rows(spec_of(), [float(i)] * 4))))
    results = read_results(tmp_path)
    assert [run.number for run in results.runs] == [0, 1, 2, 3, 4]
    found = results.units["run", "log10_grad_norm"].rows()
    assert found == [(run.number, run.spec.width - 8) for run in results.runs for _ in range(4)]


@pytest.mark.parametrize("name", ["a b", "100%", "[x]*?", "ünï-∂", 'q"', "a#b?c", "{x}", "~", "-x"])
def test_folders_with_odd_names_are_read(tmp_path: Path, name: str) -> None:
    saved(tmp_path).rename(tmp_path / name)
    results = read_results(tmp_path)
    assert [run.name for run in results.runs] == [name]
    assert len(results.units) == 4


def test_folder_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    saved(tmp_path).rename(tmp_path / os.fsdecode(b"a\xffb"))
    results = read_results(tmp_path)
    assert [run.name for run in results.runs] == [r"a\udcffb"]
    assert len(results.units) == 4


# Thinning


def frame(columns: dict[str, list[float | None]]) -> pl.DataFrame:
    length = len(next(iter(columns.values())))
    start = pl.DataFrame({"run": [0] * length, "layer": range(length), "unit": ["mlp"] * length})
    blank = dict.fromkeys((*frames.VALUES, "low", "high"), pl.lit(None, pl.Float64))
    given = {name: pl.Series(values, dtype=pl.Float64) for name, values in columns.items()}
    return start.with_columns(**blank).with_columns(**given)


@given(st.lists(st.floats() | st.none(), min_size=2, max_size=300), st.integers(1, 40))
def test_thinning_keeps_ends_and_extremes(values: list[float | None], layers: int) -> None:
    units = frame({"log10_grad_norm": values})
    thinned = frames.thinned(units, layers)
    kept = thinned["layer"].to_list()
    assert kept == sorted(set(kept))
    assert {0, 1, len(values) - 1} <= set(kept)
    assert len(kept) <= layers + 3 + 2 * len(frames.EXTREMES)
    finite = [v for v in values if v is not None and math.isfinite(v)]
    strange = [v for v in values if v in (INF, -INF)]
    if finite and not strange:
        shown = thinned["log10_grad_norm"].drop_nulls().to_list()
        assert (min(shown), max(shown)) == (min(finite), max(finite))


def test_nothing_is_thinned_that_need_not_be() -> None:
    units = frame({"act_rms": [1.0] * 49})
    assert len(frames.thinned(units, 48)) == 49
    assert len(frames.thinned(units, 24)) == 26  # every second one, and the first layer


# Damage: each kind is named in one line, the other runs are kept, nothing is touched


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str, share: float) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def in_table(old: str, new: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        text = (folder / "layers.csv").read_text()
        assert old in text
        (folder / "layers.csv").write_text(text.replace(old, new, 1))

    return damage


def in_json(**values: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        about = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(about | values))

    return damage


def replace_by_folder(folder: Path) -> None:
    (folder / "layers.csv").unlink()
    (folder / "layers.csv").mkdir()


NAMES = columns(LayerRecord)
TWO_LINES = ",".join(NAMES) + "\n0,0,0,input" + "," * (len(NAMES) - 4) + "\n"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no run.json": (drop("run.json"), "has no run.json"),
    "no layers.csv": (drop("layers.csv"), "has no layers.csv"),
    "layers.csv is a folder": (replace_by_folder, "has no layers.csv"),
    "empty run.json": (write("run.json", ""), "is damaged: run.json"),
    "empty layers.csv": (write("layers.csv", ""), "layers.csv is empty"),
    "cut run.json": (cut("run.json", 0.5), "is damaged: run.json"),
    "cut layers.csv": (cut("layers.csv", 0.7), "ends in the middle of a line"),
    "rows lost": (write("layers.csv", TWO_LINES), "has 1 rows, run.json promises 4"),
    "header only": (write("layers.csv", ",".join(NAMES) + "\n"), "has 0 rows"),
    "column missing": (in_table(",gain,", ","), "has no column gain"),
    "columns swapped": (in_table("seed,step", "step,seed"), "not of this schema"),
    "no number": (in_table(",0.75,", ",many,"), "many"),
    "nan as a layer": (in_table("0,0,1,mlp", "0,0,nan,mlp"), "nan"),
    "no layer": (
        in_table("0,0,1,mlp", "0,0,,mlp"),
        "has '' for layer in line 3, not a whole number",
    ),
    "too many cells": (in_table("0,0,1,mlp", "0,0,1,mlp,1,1,1"), "too few or too many cells"),
    "too few cells": (in_table(",1.25,", ","), "too few or too many cells"),
    "foreign json": (write("run.json", "[1, 2]"), "no schema_version"),
    "newer": (in_json(schema_version=99), "schema_version 99"),
    "deep json": (write("run.json", "[" * 100_000), "is damaged: run.json"),
    "no spec": (write("run.json", '{"schema_version": 1}'), "lacks 'spec'"),
    "unknown field": (in_json(spec={"spin": 1}), "spin"),
    "bad spec": (in_json(spec={"depth": -1}), "--depth"),
    "bad summary": (in_json(summary={"verdict": "fine"}), "is damaged: run.json"),
    "rows are no numbers": (in_json(rows={"layers": "many"}), "a value in rows is str"),
    "huge number": (in_json(rows={"layers": 10**400}), "too large"),
    "environment is no dictionary": (in_json(environment=7), "environment is int"),
    "warnings are no texts": (in_json(warnings=[7]), "warnings"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_named_and_left_alone(
    tmp_path: Path, damage: Callable[[Path], Any], reason: str
) -> None:
    good, bad = saved(tmp_path, run_of(spec_of(width=8))), saved(tmp_path)
    damage(bad)
    before = contents(tmp_path)
    results = read_results(tmp_path)
    assert [run.name for run in results.runs] == [good.name]
    assert set(results.units["run"]) == {results.runs[0].number}
    assert len(results.skipped) == 1
    assert results.skipped[0].startswith(f"skipped {bad.name}, which ")
    assert reason in results.skipped[0]
    assert "\n" not in results.skipped[0]
    assert str(tmp_path) not in results.skipped[0]
    assert contents(tmp_path) == before


def test_a_wrong_number_of_rows_is_named(tmp_path: Path) -> None:
    saved(tmp_path, run_of(spec_of(width=8)))
    in_json(rows={"layers": 5, "params": 0, "times": 0})(saved(tmp_path))
    assert "has 4 rows, run.json promises 5" in read_results(tmp_path).skipped[0]


def in_cell(column: str, row: int, value: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        header, *lines = (folder / "layers.csv").read_text().splitlines()
        cells = lines[row].split(",")
        cells[header.split(",").index(column)] = value
        lines[row] = ",".join(cells)
        (folder / "layers.csv").write_text("\n".join([header, *lines, ""]))

    return damage


WHOLE = [n for n, kind in get_type_hints(LayerRecord).items() if int in (kind, *get_args(kind))]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "layers.csv is empty"),
        ("\n", "layers.csv is empty"),
        (
            "seed,st\n",
            f"layers.csv has no column step, layer, unit and {len(NAMES) - 4} more",
        ),
        (",".join(NAMES[2:]) + "\n", "layers.csv has no column seed, step"),
        (",".join(NAMES[3:]) + "\n", "layers.csv has no column seed, step, layer"),
    ],
)
def test_a_table_without_its_columns_is_named_alike_by_both_readers(
    tmp_path: Path, text: str, fault: str
) -> None:
    saved(tmp_path, run_of(spec_of(width=8)))
    bad = saved(tmp_path)
    write("layers.csv", text)(bad)
    with pytest.raises(RunFolderError) as caught:
        store.load(bad)
    assert str(caught.value) == f"{bad} is damaged: {fault}"
    assert read_results(tmp_path).skipped == (f"skipped {bad.name}, which is damaged: {fault}",)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one good run and one to damage."""
    out = tmp_path_factory.mktemp("template")
    saved(out, run_of(spec_of(width=8))).rename(out / "good")
    saved(out).rename(out / "bad")
    return out


def both_readers(out: Path, bad: Path) -> str:
    """What both readers of one run say of it; empty if they read it, and then read it alike."""
    results = read_results(out)
    try:
        run = store.load(bad)
    except RunFolderError as error:
        said = str(error).removeprefix(str(bad)).strip()
        assert results.skipped == (printable(f"skipped {bad.name}, which {said}"),)
        return said
    assert results.skipped == ()
    (number,) = (run.number for run in results.runs if run.name == bad.name)
    units = results.units.filter(pl.col("run") == number)
    logs = [row.log10_grad_norm for row in run.first_records if row.seed == run.options.seed]
    finite = [log if log is not None and math.isfinite(log) else None for log in logs]
    assert units["log10_grad_norm"].to_list() == finite
    return ""


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_both_readers_refuse_a_run_in_the_same_words(
    tmp_path: Path, damage: Callable[[Path], Any], reason: str
) -> None:
    saved(tmp_path, run_of(spec_of(width=8)))
    bad = saved(tmp_path)
    damage(bad)
    if (bad / "run.json").exists():
        assert reason in both_readers(tmp_path, bad)


def resaved(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """layers.csv as another program writes it."""

    def damage(folder: Path) -> None:
        file = folder / "layers.csv"
        file.write_bytes(change(file.read_bytes()))

    return damage


def other_seed(seed: int) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        about = json.loads((folder / "run.json").read_text())
        in_json(options=about["options"] | {"seed": seed})(folder)
        for row in range(4):
            in_cell("seed", row, str(seed))(folder)

    return damage


def a_pipe(name: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


CELLS = "layers.csv has too few or too many cells in line"
# What may be otherwise in a run folder, and what both readers say of it: nothing if they read it.
VARIANTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "byte order mark": (resaved(lambda data: b"\xef\xbb\xbf" + data), ""),
    "CRLF": (resaved(lambda data: data.replace(b"\n", b"\r\n")), ""),
    "quoted cells": (in_cell("unit", 2, '"mlp"'), ""),
    "a name with blanks": (in_cell("unit", 2, " m l p"), ""),
    "leading zeros and a sign": (in_cell("layer", 2, "+02"), ""),
    "infinity in words": (in_cell("act_max_abs", 2, "Infinity"), ""),
    "a seed beyond all formats": (other_seed(10**20), ""),
    "a seed beyond exact floats": (other_seed(2**53 + 1), ""),
    "no newline at the end": (resaved(lambda data: data[:-1]), "in the middle of a line"),
    "a blank line": (resaved(lambda data: data + b"\n"), f"{CELLS} 6"),
    "a line of blanks": (resaved(lambda data: data + b" \n"), f"{CELLS} 6"),
    "one cell less, one more": (
        resaved(lambda data: data.replace(b"0,0,1,", b"0,1,", 1).replace(b"0,0,2,", b"0,0,2,2,")),
        f"{CELLS} 3",
    ),
    "other characters": (resaved(lambda data: data + b"\xff\n"), "layers.csv is no UTF-8 text"),
    "underscores": (in_cell("param_norm", 2, "1_000"), "'1_000' for param_norm in line 4"),
    "other digits": (in_cell("gain", 2, "\u0661"), "'\u0661' for gain in line 4, not a number"),
    "blanks before a number": (in_cell("gain", 2, " 1"), "' 1' for gain in line 4"),
    "blanks for a number": (in_cell("gain", 2, "  "), "' ' for gain in line 4"),
    "a tab after a number": (in_cell("act_cos", 2, "1\t"), "for act_cos in line 4"),
    "text in a column that no report shows": (in_cell("forward_s_iqr", 1, "x"), "forward_s_iqr"),
    "a layer beyond 64 bits": (in_cell("layer", 3, str(2**63)), "for layer in line 5"),
    "no seed": (in_cell("seed", 3, ""), "'' for seed in line 5"),
    "no unit": (in_cell("unit", 3, ""), "'' for unit in line 5, not a name"),
    "no params.csv": (drop("params.csv"), "has no params.csv"),
    "a pipe for layers.csv": (a_pipe("layers.csv"), "has no layers.csv"),
    "a number beyond 64 bits": (in_json(warnings=[], overhead={"a": 2**63}), "too large"),
    "no device": (in_json(environment={"start_utc": "", "dtype": ""}), "lacks 'device_name'"),
    "overhead of texts": (in_json(overhead={"a": "b"}), "a value in overhead is str"),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("change", "reason"), VARIANTS.values(), ids=list(VARIANTS))
def test_both_readers_decide_alike(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], Any],
    reason: str,
    batched: bool,
) -> None:
    if not batched:
        monkeypatch.setattr(frames, "_BATCH", 1)
    saved(tmp_path, run_of(spec_of(width=8)))
    bad = saved(tmp_path)
    change(bad)
    said = both_readers(tmp_path, bad)
    assert reason in said if reason else not said


FLOATS = st.floats().map(str)


@pytest.mark.parametrize("depth", [*range(200, 1000, 20)])
def test_deep_json_is_no_traceback(tmp_path: Path, depth: int) -> None:
    saved(tmp_path, run_of(spec_of(width=8)))
    bad = saved(tmp_path)
    text = (bad / "run.json").read_text()
    deep = text.replace('"environment": {', f'"environment": {{"deep": {"[" * depth}{"]" * depth},')
    (bad / "run.json").write_text(deep)
    with suppress(RunFolderError):
        store.load(bad)
    assert len(read_results(tmp_path).runs) in (1, 2)


def test_a_pipe_for_run_json_is_not_waited_for(tmp_path: Path) -> None:
    saved(tmp_path)
    bad = saved(tmp_path)
    a_pipe("run.json")(bad)
    with pytest.raises(RunFolderError, match="no plain file"):
        store.load(bad)
    assert read_results(tmp_path).skipped == (f"skipped {bad.name}, which has no run.json",)


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])) | FLOATS)
@settings(max_examples=150)
def test_a_cell_of_any_text_is_read_alike_by_both_readers(template: Path, text: str) -> None:
    folder = template.parent / "cell"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    for column in ("log10_grad_norm", "nonfinite"):
        in_cell(column, 2, text)(folder / "bad")
        both_readers(folder, folder / "bad")


@pytest.mark.parametrize("value", ["nan", "inf", "1.5", "many"])
def test_what_is_no_whole_number_is_refused(tmp_path: Path, value: str) -> None:
    assert len(WHOLE) == 5
    for column in WHOLE:
        in_cell(column, 2, value)(saved(tmp_path))
    saved(tmp_path)
    results = read_results(tmp_path)
    assert (len(results.runs), len(results.skipped)) == (1, len(WHOLE))


def broken_both_ways(folder: Path) -> tuple[str, ...]:
    """The notes of a report, which the line of a single run must be."""
    notes = tuple(oddities(read_results(folder)))
    (path,) = store.run_folders(folder)
    run = store.load(path)
    verdict = run.summary.verdict
    assert notes == tuple(contradiction(path.name, verdict, broken_rows(run.first_records)))
    return notes


@pytest.mark.parametrize("column", [*FINITE_COLUMNS, *NORM_COLUMNS, "nonfinite"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_that_are_not_finite_in_a_healthy_run_are_named(
    tmp_path: Path, column: str, value: float
) -> None:
    bad = saved(tmp_path)
    assert broken_both_ways(tmp_path) == ()
    for row in (2, 3):
        in_cell(column, row, "7" if column == "nonfinite" else str(value))(bad)
    if column in NORM_COLUMNS and not math.isnan(value):
        assert broken_both_ways(tmp_path) == ()  # beyond float64, as its logarithm may tell
    else:
        (line,) = broken_both_ways(tmp_path)
        what = "stored as healthy, but its layers.csv is not finite"
        assert line == f"{bad.name} is {what} at layer 2 (mlp) and in 1 more row"


@pytest.mark.parametrize("profile", [[NAN, 0.0, 0.0, 0.0], [-INF, 0.0, 0.0, 0.0]])
def test_rows_that_are_as_the_verdict_says_are_not_named(
    tmp_path: Path, profile: list[float]
) -> None:
    run = run_of(layers=list(layer_rows(spec_of(), profile)))
    assert run.summary.verdict in ("nonfinite", "dead")
    saved(tmp_path, run)
    assert broken_both_ways(tmp_path) == ()


def test_later_steps_may_be_not_finite(tmp_path: Path) -> None:
    """The verdict is that of the first step."""
    rows = list(layer_rows(spec_of(), [0.0] * 4))
    later = [replace(row, step=7, log10_grad_norm=NAN) for row in rows]
    run = run_of(layers=[*rows, *later], options=RunOptions(steps=8), summary=run_of().summary)
    saved(tmp_path, run)
    assert broken_both_ways(tmp_path) == ()


def test_foreign_folders_are_named_in_one_line(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("benchmarks", "a\nb", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "report.html").write_text("a page")
    assert read_results(tmp_path).skipped == ("skipped what holds no run.json: a b, benchmarks",)
    for i in range(20):
        (tmp_path / f"c{i}").mkdir()
    assert read_results(tmp_path).skipped[0].endswith("c15 and 12 more")


@pytest.mark.parametrize("damage", [None, "cut run.json", "cut layers.csv"])
def test_nothing_to_read_is_a_usage_error(tmp_path: Path, damage: str | None) -> None:
    if damage:
        DAMAGES[damage][0](saved(tmp_path))
    with pytest.raises(UsageError, match="at least one run that can be read") as caught:
        read_results(tmp_path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_results(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        read_results(tmp_path / "file")


def test_a_run_folder_itself_is_told_from_a_folder_of_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the folder that it lies in"):
        read_results(saved(tmp_path))


def test_two_runs_of_one_key_are_both_read(tmp_path: Path) -> None:
    for width in (8, 128, 128):
        saved(tmp_path, run_of(spec_of(width=width)))
    results = read_results(tmp_path)
    assert [name.copy for _, name in design_by_design(results)] == [1, 2, 1]
    _, first, second = sorted(results.runs, key=lambda run: run.spec.width)
    key = store.folder_key(first.path)
    assert oddities(results) == [
        f"{first.name} and {second.name} measured the same network (key {key})"
    ]


def test_runs_of_one_key_on_another_device_are_of_another_network(tmp_path: Path) -> None:
    for device in ("cpu", "cuda", "cuda"):
        saved(tmp_path, run_of(environment=ENVIRONMENT | {"device": device}))
    (note,) = oddities(read_results(tmp_path))
    on_gpu = [run.name for run in read_results(tmp_path).runs if run.environment["device"] != "cpu"]
    assert note.startswith(f"{on_gpu[0]} and {on_gpu[1]} measured")


def test_many_runs_of_one_key_are_counted() -> None:
    runs = [(f"run{i}", run_of(spec_of(width=8 + i % 12))) for i in range(60)]
    lines = list(same_network(runs))
    assert lines[0].startswith("run0, run12, run24 and 2 more measured the same network (key ")
    assert len(lines) == 11
    assert lines[-1] == "2 more networks were measured more than once"
    assert list(same_network(runs[:12])) == []


def test_unknown_verdicts_are_read(tmp_path: Path) -> None:
    run = run_of()
    saved(tmp_path, replace(run, summary=replace(run.summary, verdict="chaotic")))
    assert "chaotic" in results_markdown(read_results(tmp_path))


def touch_everything(folder: Path) -> None:
    """Whatever a report does with runs, but for Altair."""
    results = read_results(folder)
    results_markdown(results)
    results_view(results)
    found = chart_tables(results, design_by_design(results))
    axis_ends(found["units"], ["log10_grad_norm", "low", "high"], 12, (-0.5, 0.5))
    json.dumps([table.to_dict(as_series=False) for table in found.values()], allow_nan=False)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(("run.json", "layers.csv")),
        st.sampled_from(("cut", "flip", "put", "drop")),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=6) | st.sampled_from((b"nan", b"inf", b"null", b"1e999")),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=80)
@given(EDITS)
@example([("layers.csv", "put", 0.5, b"\x00")])
@example([("run.json", "put", 0.3, b"\xff\xfe")])
def test_no_corruption_is_a_traceback(
    template: Path, edits: list[tuple[str, str, float, bytes]]
) -> None:
    folder = template.parent / "corrupted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    for name, kind, where, data in edits:
        file = folder / "bad" / name
        old = file.read_bytes()
        at = int(where * len(old))
        after = {"cut": b"", "put": data + old[at:], "drop": old[at + len(data) :]}
        file.write_bytes(old[:at] + after.get(kind, data + old[at + len(data) :]))
    before = contents(folder)
    touch_everything(folder)
    assert contents(folder) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
PLACES = st.sampled_from(
    [
        (part, name)
        for part, record in (("spec", StackSpec), ("options", RunOptions))
        for name in record.__dataclass_fields__
    ]
    + [("summary", name) for name in run_of().summary.__dataclass_fields__]
    + [("environment", name) for name in ("device", "start_utc", "git", "argv", "threads")]
    + [(name, "") for name in ("spec", "options", "summary", "environment", "warnings", "rows")]
)


@settings(max_examples=100)
@given(PLACES, JSON)
def test_no_value_in_run_json_is_a_traceback(
    template: Path, place: tuple[str, str], value: Any
) -> None:
    folder = template.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    part, name = place
    about = json.loads((folder / "bad" / "run.json").read_text())
    if name:
        about[part][name] = value
    else:
        about[part] = value
    (folder / "bad" / "run.json").write_text(json.dumps(about))
    touch_everything(folder)


# Texts


@given(st.text() | st.text(st.characters(categories=["Cs", "Cc"])))
def test_clean_text_can_be_printed(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert len(shown) <= 10 * (LONGEST_TEXT + 1)
    if text.isprintable() and len(text) <= LONGEST_TEXT:
        assert shown == text


def test_a_model_of_a_hundred_layers_is_read(tmp_path: Path) -> None:
    """The names of its layers are longer than any text that is shown."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    with gradflow.watch(model) as flow:
        model(torch.randn(2, 2)).sum().backward()
    flow.save(tmp_path)
    (run,) = read_results(tmp_path).runs
    assert run.spec.depth == 100
