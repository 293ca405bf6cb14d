"""Theory in a run: columns, deviation, and what is said of it; and predicting without measuring."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from records import layer_rows, run_of, spec_of

from gradflow import measure, save
from gradflow.judging.outlook import DEEPEST, Reach, healthy_reach, outlook
from gradflow.judging.remarks import NOT_FINITE, agrees, theory_cell, theory_sentence
from gradflow.judging.verdicts import NO_THEORY
from gradflow.measuring.columns import with_theory
from gradflow.runs.records import LayerRecord, Run, Summary
from gradflow.runs.store import load
from gradflow.showing.sentences import run_sentence
from gradflow.showing.terminal.one_run import profile, verdict_lines
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.theory import predict, total_decades

SPEC = spec_of(width=64, activation="gelu", batch_size=32)
TOLD = predict(SPEC)
QUIET = RunOptions(timing=False, device="cpu", seeds=2)


def run_off_by(*offs: float, spec: StackSpec = SPEC, output: float = 0.0) -> Run:
    """Two seeds and more whose profiles are theory plus so much at the input."""
    assert TOLD.log10_grad_norm is not None
    rows: list[LayerRecord] = []
    for seed, off in enumerate(offs):
        first, *rest = (output + value for value in TOLD.log10_grad_norm)
        rows += layer_rows(spec, [first + off, *rest], seed)
    return with_theory(run_of(spec, rows, options=RunOptions(seeds=len(offs))))


def columns(row: LayerRecord) -> tuple[float | None, float | None, float | None]:
    ends = row.theory_log10_grad_norm_low, row.theory_log10_grad_norm_high
    return ends[0], row.theory_log10_grad_norm, ends[1]


def test_rows_hold_the_prediction_and_its_band() -> None:
    run = run_off_by(0.01, -0.02)
    assert len(run.layer_records) == 2 * (SPEC.depth + 1)
    for i, row in enumerate(run.layer_records):
        place = i % (SPEC.depth + 1)
        low, high = TOLD.band()[place]
        assert columns(row) == (low, TOLD.log10_grad_norm[place], high)  # type: ignore[index]


def test_a_loss_adds_the_measured_gradient_at_the_output() -> None:
    """Each seed its own; the cotangent has norm 1, whatever float32 makes of it."""
    spec = replace(SPEC, loss="ce")
    told = predict(spec)
    assert told.log10_grad_norm is not None
    rows = [r for s in (0, 1) for r in layer_rows(spec, [0.5, 0.4, 0.3, s - 2.0], s)]
    run = with_theory(run_of(spec, rows, options=RunOptions(seeds=2)))
    firsts = [row.theory_log10_grad_norm for row in run.layer_records if row.layer == 0]
    assert firsts == [told.log10_grad_norm[0] - 2, told.log10_grad_norm[0] - 1]
    rounded = run_off_by(0.0, output=3e-8).layer_records[-1]
    assert rounded.theory_log10_grad_norm == 0.0


def test_the_deviation_is_that_of_the_mean() -> None:
    run = run_off_by(0.3, 0.1)
    assert run.summary.theory_deviation == pytest.approx(0.2)
    low, high = TOLD.band(2)[0]
    assert run.summary.theory_band == pytest.approx((high - low) / 2)
    assert run.summary.theory_reason is None
    assert run_off_by(-0.3).summary.theory_deviation == pytest.approx(-0.3)


def test_without_theory_columns_are_empty_and_the_reason_is_given() -> None:
    spec = spec_of(width=8)
    run = with_theory(run_of(spec))
    assert {columns(row) for row in run.layer_records} == {(None, None, None)}
    assert run.summary.theory_deviation is None
    assert "width 8" in str(run.summary.theory_reason)


@pytest.mark.parametrize("lost", [-math.inf, math.inf, math.nan, None])
def test_what_is_not_finite_is_not_compared(lost: float | None) -> None:
    run = with_theory(run_of(SPEC, list(layer_rows(SPEC, [0.2, lost, 0.1, 0.0]))))
    assert run.summary.theory_deviation is None
    assert run.summary.theory_reason == NOT_FINITE
    assert columns(run.layer_records[0])[1] == TOLD.log10_grad_norm[0]  # type: ignore[index]


def test_a_lost_output_leaves_the_columns_empty() -> None:
    spec = replace(SPEC, loss="ce")
    run = with_theory(run_of(spec, list(layer_rows(spec, [0.2, 0.1, 0.1, -math.inf]))))
    assert {columns(row) for row in run.layer_records} == {(None, None, None)}


def test_a_measured_run_carries_its_theory_to_the_disk(tmp_path: Path) -> None:
    spec = StackSpec(block="ffn", depth=4, width=64, batch_size=4, seq_len=8)
    run = load(str(save(measure(spec, QUIET), tmp_path).path))
    told = predict(spec)
    assert told.log10_grad_norm is not None
    assert abs(run.summary.theory_deviation or 9) < (run.summary.theory_band or 0)
    mine = [row.theory_log10_grad_norm for row in run.layer_records if row.seed == 1]
    assert mine == pytest.approx(told.log10_grad_norm)
    assert mine[-1] == 0.0


# Words.

SAID: list[tuple[dict[str, Any], bool | None, str, str]] = [
    (
        {"theory_deviation": 0.03, "theory_band": 0.1},
        True,
        "As theory predicts, to 0.03 decades (band ±0.10).",
        "+0.03",
    ),
    (
        {"theory_deviation": 0.4, "theory_band": 0.1},
        False,
        "Not as theory predicts: 0.40 decades above it (band ±0.10).",
        "+0.40!",
    ),
    (
        {"theory_deviation": -2.0, "theory_band": 0.1},
        False,
        "Not as theory predicts: 2.00 decades below it (band ±0.10).",
        "-2.00!",
    ),
    ({"theory_reason": "x is unknown"}, None, "No theory to compare with: x is unknown.", ""),
    ({}, None, "", ""),
]


@pytest.mark.parametrize(("fields", "agreed", "sentence", "cell"), SAID)
def test_the_words_for_it(
    fields: dict[str, Any], agreed: bool | None, sentence: str, cell: str
) -> None:
    summary: Summary = replace(run_of().summary, **fields)
    assert agrees(summary) is agreed
    assert theory_sentence(summary) == sentence
    assert theory_cell(summary) == cell


def test_the_report_and_the_terminal_say_it() -> None:
    run = run_off_by(0.9)
    said = theory_sentence(run.summary)
    assert said.startswith("Not as theory predicts: 0.90 decades above it")
    assert run_sentence(run).endswith(said)  # type: ignore[arg-type]
    assert said in [str(line) for line in verdict_lines(run.summary)]


def test_the_profile_draws_theory_in_dots() -> None:
    """A measurement far from theory leaves the dots free."""
    drawn = str(profile(run_off_by(0.0).layer_records).renderable)  # type: ignore[attr-defined]
    assert "· theory" in drawn
    far = [replace(row, log10_grad_norm=9.0) for row in run_off_by(0.0).layer_records]
    free = str(profile(far).renderable)  # type: ignore[attr-defined]
    assert free.count("·") > 20 + 1
    bare = str(profile(run_of().layer_records).renderable)  # type: ignore[attr-defined]
    assert "·" not in bare


# Without measuring.


def test_an_outlook_is_the_prediction() -> None:
    spec = StackSpec(block="mlp", shortcut="plain", norm="none", activation="tanh", weight_var=0.7)
    found = outlook(replace(spec, depth=40), RunOptions())
    assert found.summary.verdict == "vanishing"
    assert "--shortcut residual" in found.summary.advice
    low, high = predict(replace(spec, depth=40)).band()[0]
    assert found.band == pytest.approx((high - low) / 2)
    assert found.summary.total_log10_gain == pytest.approx((high + low) / 2)


def test_an_outlook_without_theory_says_why() -> None:
    found = outlook(StackSpec(loss="mse"), RunOptions())
    assert found.summary.verdict == NO_THEORY.word
    assert (found.band, found.reach, found.summary.total_log10_gain) == (None, None, None)


def test_the_reach_is_the_last_healthy_depth() -> None:
    """1.6/2 a layer: 3 decades of |g| are 6 / log10(1.25) = 61.9 layers; 1 decade is 20.6."""
    spec = StackSpec(block="mlp", shortcut="plain", norm="none", weight_var=1.6)
    assert healthy_reach(spec, RunOptions()) == Reach(61, at_least=False)
    assert healthy_reach(spec, RunOptions(vanishing=1.0)) == Reach(20, at_least=False)
    depths = (total_decades(replace(spec, depth=depth)) for depth in (61, 62))
    assert [total < -3 for total in depths] == [False, True]


def test_a_reach_may_be_unbounded_or_end_with_the_theory() -> None:
    assert healthy_reach(StackSpec(), RunOptions()) == Reach(DEEPEST, at_least=True)
    grows = healthy_reach(StackSpec(norm="none", init="lecun", seq_len=8), RunOptions())
    assert grows.at_least
    assert 0 < grows.depth < DEEPEST
    steep = StackSpec(block="mlp", shortcut="plain", norm="none", activation="linear", gain=0.01)
    assert healthy_reach(steep, RunOptions(vanishing=1.0)) == Reach(0, at_least=False)


def test_run_shows_a_prediction_and_stores_nothing(cli: CommandLine) -> None:
    done = cli("run", "--theory-only", "--depth", "20", "--norm", "post", "--out", str(cli.out))
    assert done.code == 0
    for part in ("predicted, not measured", "· theory", "From output to input", "healthy"):
        assert part in done.out
    assert "… 25 more" in done.out
    assert not cli.out.exists()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capsys, tmp_path / "results")


def test_run_says_why_there_is_no_prediction(cli: CommandLine) -> None:
    done = cli("run", "--theory-only", "--width", "8", "--heads", "2")
    assert (done.code, done.err) == (0, "")
    assert "No theory: width 8 is too small" in done.out


def test_run_predicts_as_json(cli: CommandLine) -> None:
    done = cli("run", "--theory-only", "--depth", "3", "--json")
    found = json.loads(done.out)
    told = predict(StackSpec(depth=3)).log10_grad_norm
    assert told is not None
    rows = found["layers"]
    assert [row["theory_log10_grad_norm"] for row in rows] == list(told)
    assert [(row["layer"], row["unit"]) for row in rows[:3]] == [
        (0, "input"),
        (1, "attention"),
        (1, "ffn"),
    ]
    assert found["total_log10_gain"] == told[0]
    assert StackSpec.from_json(found["spec"]) == StackSpec(depth=3)


GRID = ("--depth", "12,40", "--norm", "none,pre", "--block", "mlp", "--plain")


def test_compare_predicts_a_map(cli: CommandLine) -> None:
    done = cli("compare", "--theory-only", *GRID, "--activation", "tanh", "--weight-var", "0.7")
    found = [line.rsplit(maxsplit=6)[:3] for line in done.out.splitlines()[1:5]]
    assert found == [
        ["plain, no norm", "12", "healthy"],
        ["plain, no norm", "40", "vanishing"],
        ["plain, pre-norm", "12", "healthy"],
        ["plain, pre-norm", "40", "healthy"],
    ]
    assert max(map(len, done.out.splitlines())) <= 80
    assert not cli.out.exists()


def test_compare_predicts_to_files(cli: CommandLine, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.csv", "a.json", "a.md")]
    named = ("--csv", files[0], "--json", files[1], "--markdown", files[2])
    done = cli("compare", "--theory-only", *GRID, "--loss", "cotangent,mse", *named, "--quiet")
    assert (done.code, done.out) == (0, "")
    rows = list(csv.DictReader(Path(files[0]).read_text().splitlines()))
    assert rows == [
        {k: "" if v is None else str(v) for k, v in row.items()}
        for row in json.loads(Path(files[1]).read_text())["rows"]
    ]
    assert len(rows) == 8
    assert {row["total_log10_gain"] == "" for row in rows if row["loss"] == "mse"} == {True}
    assert "No theory in 4 rows: the gradient of mse" in Path(files[2]).read_text()


def test_compare_predicts_no_stored_runs(cli: CommandLine) -> None:
    assert cli("compare", "results/*", "--theory-only").code == 2


def test_nothing_is_loaded_that_measures() -> None:
    """In a process of its own: neither torch, nor pandas, nor charts."""
    code = (
        "import sys; from gradflow.cli.app import run_app; "
        "assert run_app(['run', '--theory-only', '--depth', '100']) == 0; "
        "assert run_app(['compare', '--theory-only', '--block', 'mlp,ffn']) == 0; "
        "print(sorted({'torch', 'pandas', 'altair', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
