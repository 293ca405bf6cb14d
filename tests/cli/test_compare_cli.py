"""`gradflow compare` as a person meets it: what it says, what it writes, how it exits."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from commandline import CommandLine, Outcome, finish, start
from damaged_runs import FILES, corrupt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import ENVIRONMENT, layer_rows, run_of, spec_of

from gradflow.runs import store
from gradflow.runs.records import Run, TimeRecord
from gradflow.sweeps import cells

GRID = (
    *("--block", "mlp", "--width", "4", "--batch-size", "2", "--device", "cpu"),
    *("--depth", "1,2", "--norm", "none,pre", "--executor", "serial", "--time-budget", "1e-9"),
)


@pytest.fixture
def gradflow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capsys, tmp_path)


def grid(gradflow: CommandLine, *words: str) -> Outcome:
    return gradflow("compare", *GRID, "--out", str(gradflow.out), *words)


def stored(out: Path, *runs: Run) -> list[str]:
    return [str(store.save(run, out).path) for run in runs]


def times(seconds: float, repeats: int = 2) -> list[TimeRecord]:
    return [TimeRecord(r, 1, "mlp", seconds, seconds) for r in range(repeats)]


# --- grids ------------------------------------------------------------------------------------


def test_a_grid_is_measured_and_shown(gradflow: CommandLine) -> None:
    found = grid(gradflow)
    assert (found.code, found.err) == (0, "")
    assert "residual, pre-norm" in found.out
    assert "In all 4 runs the gradient reaches the first layer." in found.out
    assert max(map(len, found.out.splitlines())) <= 80
    assert len(store.run_folders(gradflow.out)) == 4


def test_what_is_stored_is_reused_and_said(gradflow: CommandLine) -> None:
    grid(gradflow)
    again = grid(gradflow)
    assert again.complaint == "4 of 4 cells stored already (--fresh measures anew)"
    assert len(store.run_folders(gradflow.out)) == 4
    fresh = grid(gradflow, "--fresh")
    assert fresh.err == ""
    assert len(store.run_folders(gradflow.out)) == 8


def test_statistics_that_are_stored_are_reused_and_said(gradflow: CommandLine) -> None:
    assert "fwd ms" not in grid(gradflow, "--no-timing").out
    assert grid(gradflow).complaint == "4 of 4 cells stored already but for their times"


def test_a_run_of_gradflow_run_stands_for_its_cell(gradflow: CommandLine) -> None:
    spec = ("--block", "mlp", "--width", "4", "--batch-size", "2", "--device", "cpu")
    gradflow("run", *spec, "--depth", "1", "--time-budget", "1e-9", "--out", str(gradflow.out))
    assert grid(gradflow).complaint.startswith("1 of 4 cells stored already")


def test_what_is_skipped_and_left_out_is_named(gradflow: CommandLine) -> None:
    found = grid(gradflow, "--block", "mlp,ffn", "--norm-kind", "groupnorm", "--width", "8")
    lines = found.err.splitlines()
    assert "note: --norm-kind does not apply to --norm none" in lines
    rule = "--norm-kind groupnorm is not defined on tokens"
    assert f"skipped: --depth 1 --block ffn --norm pre: {rule}" in lines


@pytest.mark.parametrize(
    ("words", "designs"),
    [
        (("--residual",), {"residual"}),
        (("--plain",), {"plain"}),
        (("--residual", "--plain"), {"residual", "plain"}),
    ],
)
def test_short_words_for_the_shortcut(
    gradflow: CommandLine, words: tuple[str, ...], designs: set[str]
) -> None:
    rows = json.loads(grid(gradflow, "--no-timing", *words, "--json").out)["rows"]
    assert {row["shortcut"] for row in rows} == designs


def test_a_cell_that_fails_is_named_and_the_others_are_shown(
    gradflow: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = cells.measure_any

    def fail(spec: object, options: object) -> Run:
        if spec == spec_of(depth=2, width=4, batch_size=2, norm="none"):
            raise RuntimeError("it broke\nin many lines")
        return measure(spec, options)  # type: ignore[arg-type]

    monkeypatch.setattr(cells, "measure_any", fail)
    found = grid(gradflow, "--json", "rows.json")
    title = "residual mlp, no norm, depth 2"
    assert found.err.splitlines() == [
        f"failed: {title}: RuntimeError: it broke",
        "gradflow: 1 cell could not be measured; see above",
    ]
    assert found.code == 3
    assert "In all 3 runs" in found.out
    content = json.loads(Path("rows.json").read_text())
    assert content["failures"] == [f"{title}: RuntimeError: it broke"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Files that are named without a folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def test_where_no_cell_can_be_measured_there_is_no_table(
    gradflow: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(cells, "measure_any", fail)
    found = grid(gradflow)
    assert (found.code, found.out) == (3, "")
    assert found.err.splitlines()[-1].startswith("gradflow: no cell could be measured")


# --- formats ----------------------------------------------------------------------------------


def test_json_to_stdout_is_json_alone(gradflow: CommandLine) -> None:
    for words in (("--json",), ("--json", "-"), ("--json", "--no-timing")):
        rows = json.loads(grid(gradflow, *words).out)["rows"]
        assert len(rows) == 4


def test_csv_to_stdout_is_csv_alone(gradflow: CommandLine) -> None:
    rows = list(csv.DictReader(io.StringIO(grid(gradflow, "--csv", "-").out)))
    assert {row["depth"] for row in rows} == {"1", "2"}


def test_formats_go_to_files_beside_the_table(gradflow: CommandLine) -> None:
    found = grid(gradflow, "--csv", "a.csv", "--json", "a.json", "--markdown", "a.md")
    assert "residual, pre-norm" in found.out
    assert len(Path("a.csv").read_text().splitlines()) == 5
    assert len(json.loads(Path("a.json").read_text())["rows"]) == 4
    assert "| residual, pre-norm |" in Path("a.md").read_text()


def test_quiet_has_no_table(gradflow: CommandLine) -> None:
    assert grid(gradflow, "--quiet").out == ""


def test_no_colours_and_no_progress_without_a_terminal(gradflow: CommandLine) -> None:
    found = grid(gradflow)
    assert "\x1b" not in found.out + found.err


# --- bad values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--noise", "-1"), "--noise is a relative difference"),
        (("--noise", "nan"), "--noise is a relative difference"),
        (("--reference", "5"), "1 to 4"),
        (("--reference", "0"), "1 to 4"),
        (("--executor", "threads"), "auto, serial, processes, ray"),
        (("--workers", "2"), "--workers counts worker processes"),
        (("--address", "auto"), "--address is that of a Ray cluster"),
        (("--csv", "-", "--json", "-"), "one format can go to stdout"),
        (("--csv", "no/such/folder.csv"), "--csv names a file that can be written"),
        (("--norm", "pre,psot"), "psot"),
        (("--depth", "1,,2"), "--depth takes a whole number"),
        (("--depth", "0"), "--depth is a whole number of at least 1"),
        (("--repeats", "0"), "--repeats is a whole number of at least 1"),
        (("--out", "/proc/nowhere"), "--out is a folder that can be written to"),
        (("a-folder",), "give"),
    ],
)
def test_bad_values_are_one_line_and_nothing_is_measured(
    gradflow: CommandLine, words: tuple[str, ...], says: str
) -> None:
    found = grid(gradflow, *words)
    assert (found.code, found.out) == (2, "")
    assert says in found.complaint.replace("leave out", "give")
    assert store.run_folders(gradflow.out) == []


def test_ray_without_the_extra_is_one_line(
    gradflow: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    found = gradflow("compare", "--executor", "ray", "--out", str(gradflow.out))
    assert found.code == 2
    assert "pip install 'gradflow-bench[ray]'" in found.complaint


# --- stored runs ------------------------------------------------------------------------------


def test_runs_are_compared_and_nothing_is_measured(gradflow: CommandLine) -> None:
    folders = stored(gradflow.out, run_of(spec_of(depth=2)), run_of(spec_of(depth=3)))
    before = sorted(gradflow.out.rglob("*"))
    for words in (folders, [f"{gradflow.out}/*"], [f"{folders[0]}/", folders[1]]):
        found = gradflow("compare", *words)
        assert (found.code, found.err) == (0, "")
        assert "In all 2 runs" in found.out
    assert sorted(gradflow.out.rglob("*")) == before


def test_a_run_that_is_named_twice_is_one(gradflow: CommandLine) -> None:
    (folder,) = stored(gradflow.out, run_of())
    rows = json.loads(gradflow("compare", folder, folder, "--json=-").out)["rows"]
    assert len(rows) == 1


def test_the_reference_is_the_first_or_as_chosen(gradflow: CommandLine) -> None:
    runs = [run_of(spec_of(depth=d), times=times(d)) for d in (2, 3)]
    other = run_of(spec_of(depth=4), times=times(4.0))
    folders = stored(gradflow.out, *runs)
    (elsewhere,) = stored(gradflow.out / "other", other)
    for words, name, rows in (
        ((), folders[0], 2),
        (("--reference", "2"), folders[1], 2),
        (("--reference", folders[1] + "/"), folders[1], 2),
        (("--reference", elsewhere), elsewhere, 3),
    ):
        content = json.loads(gradflow("compare", *folders, *words, "--json=-").out)
        assert content["reference"] == Path(name).name
        assert len(content["rows"]) == rows
        assert sum(row["reference"] for row in content["rows"]) == 1


@pytest.mark.parametrize("wanted", ["3", "0", "no-such-run", "²", "-1", ""])
def test_a_reference_that_is_not_there_is_one_line(gradflow: CommandLine, wanted: str) -> None:
    folders = stored(gradflow.out, run_of(), run_of(spec_of(depth=2)))
    found = gradflow("compare", *folders, f"--reference={wanted}")
    assert found.code == 2
    assert "1 to 2" in found.complaint


def test_runs_that_were_not_measured_alike_are_not_ratioed(gradflow: CommandLine) -> None:
    here = run_of(times=times(1.0))
    there = run_of(spec_of(depth=2), times=times(1.0), environment=ENVIRONMENT | {"threads": 9})
    text = " ".join(gradflow("compare", *stored(gradflow.out, here, there)).out.split())
    assert "no ratio in 1 of these rows: threads 9 against 1." in text


def test_what_cannot_be_read_is_named_and_skipped(gradflow: CommandLine) -> None:
    good, newer, half, foreign = stored(
        gradflow.out, *(run_of(spec_of(depth=d)) for d in range(1, 5))
    )
    about = json.loads((Path(newer) / "run.json").read_text())
    (Path(newer) / "run.json").write_text(json.dumps(about | {"schema_version": 999}))
    (Path(half) / "layers.csv").write_text("seed,st")
    (Path(foreign) / "run.json").unlink()
    (gradflow.out / "report.html").write_text("")
    (gradflow.out / "empty").mkdir()
    found = gradflow("compare", f"{gradflow.out}/*")
    assert found.code == 0
    lines = found.err.splitlines()
    assert len(lines) == 4  # a glob passes over plain files
    assert all(line.startswith("skipped: ") for line in lines)
    for name, reason in (
        (newer, "upgrade gradflow"),
        (half, "damaged"),
        (foreign, "no run folder"),
    ):
        assert any(name in line and reason in line for line in lines)
    assert f"{good}" not in found.err


def test_a_plain_file_in_a_list_is_named_and_skipped(gradflow: CommandLine) -> None:
    (folder,) = stored(gradflow.out, run_of())
    page = gradflow.out / "report.html"
    page.write_text("a page")
    found = gradflow("compare", str(page), folder)
    assert found.code == 0
    assert found.complaint.startswith(f"skipped: {page} is no run folder")


@pytest.mark.parametrize(
    "word", ["no-such-run", "results/*", "", "[", "x" * 5000, "a\nb", "*" * 200]
)
def test_what_matches_nothing_is_one_line(gradflow: CommandLine, word: str) -> None:
    found = gradflow("compare", word)
    assert found.code == 2
    assert len(found.err.splitlines()) <= 2


def test_an_empty_results_folder_is_one_line(gradflow: CommandLine) -> None:
    found = gradflow("compare", str(gradflow.out))
    assert found.code == 2
    assert "at least one run" in found.err.splitlines()[-1]


def test_two_runs_of_one_key_are_both_shown(gradflow: CommandLine) -> None:
    first, second = stored(gradflow.out, run_of(), run_of())
    found = gradflow("compare", first, second)
    assert "(#2)" in found.out
    names = f"{Path(first).name} and {Path(second).name}"
    key = store.folder_key(Path(first))
    assert found.complaint == f"note: {names} measured the same network (key {key})"


def test_a_run_whose_rows_contradict_its_verdict_is_named(gradflow: CommandLine) -> None:
    rows = list(layer_rows(spec_of(), [0.0, 0.0, math.inf, 0.0]))
    lying = run_of(layers=rows, summary=run_of().summary)
    good, bad = stored(gradflow.out, run_of(spec_of(depth=2)), lying)
    found = gradflow("compare", good, bad)
    assert found.code == 0
    start = f"note: {Path(bad).name} is stored as healthy, but its layers.csv is not finite"
    assert found.complaint == f"{start} at layer 2 (mlp)"


def test_comparing_runs_imports_no_torch(gradflow: CommandLine) -> None:
    runs = [run_of(spec_of(depth=d), times=times(d)) for d in (1, 2)]
    folders = stored(gradflow.out, *runs)
    found = finish(start("compare", *folders, PYTHONPROFILEIMPORTTIME="1"))
    assert found.code == 0
    imported = {line.rpartition("|")[2].strip() for line in found.err.splitlines()}
    assert "scipy" in imported
    assert not imported & {"torch", "pandas", "polars", "ray"}


FORMATS = ((), ("--json=-",), ("--csv", "-"), ("--markdown", "-"))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupted_folder_is_shown_or_skipped_in_one_line(
    gradflow: CommandLine, data: st.DataObject
) -> None:
    compare_corrupted(gradflow, data)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corrupted_folders_never_end_in_a_traceback(
    gradflow: CommandLine, data: st.DataObject
) -> None:
    compare_corrupted(gradflow, data)


def compare_corrupted(gradflow: CommandLine, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        runs = run_of(times=times(1.0)), run_of(spec_of(depth=2), times=times(2.0))
        good, bad = stored(Path(folder), *runs)
        corrupt(Path(bad) / data.draw(st.sampled_from(FILES)), data)
        found = gradflow("compare", bad, good, *data.draw(st.sampled_from(FORMATS)))
        assert (found.code, bool(found.out)) == (0, True)
        assert len(found.err.splitlines()) <= 1
