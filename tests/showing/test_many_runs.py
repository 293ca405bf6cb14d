"""What `gradflow compare` shows: 80 columns, whatever the runs are; the same rows for machines."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from compared_runs import comparisons, seed_grid, timed_run
from hypothesis import given
from hypothesis import strategies as st
from records import layer_rows, run_of, spec_of
from rich.console import Console

from gradflow.judging.comparison import Comparison, Ratio, compare_runs
from gradflow.showing.formats import (
    comparison_csv,
    comparison_json,
    comparison_markdown,
    comparison_rows,
)
from gradflow.showing.terminal.many_runs import (
    comparison_view,
    cost_columns,
    design_table,
    gradient_columns,
    ratio_cell,
    sparkline,
)
from gradflow.specs.stack import StackSpec


def shown(result: Comparison) -> str:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(comparison_view(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


def lines_of(text: str) -> list[str]:
    return text.splitlines()


def test_one_line_for_each_run_and_80_columns() -> None:
    lines = lines_of(shown(seed_grid()))
    assert max(map(len, lines)) <= 80
    assert sum("healthy" in line or "vanishing" in line for line in lines) == 18
    assert len([line for line in lines if line.startswith("design")]) == 2


def test_the_name_of_a_design_is_folded_beside_its_rows() -> None:
    lines = lines_of(shown(seed_grid()))
    first = next(i for i, line in enumerate(lines) if line.startswith("residual, "))
    assert [line.split()[:2] for line in lines[first : first + 2]] == [
        ["residual,", "12"],
        ["pre-norm", "50"],
    ]
    assert lines[first + 2].startswith("  ")
    assert lines[first + 2].split()[0] == "200"


def test_theory_has_a_column_where_any_run_has_one() -> None:
    """`!` marks a deviation beyond the band."""
    runs = [timed_run(spec_of(depth=depth), 0.0) for depth in (2, 3, 4)]
    told = [{"theory_deviation": 0.05}, {"theory_deviation": -0.5}, {}]
    runs = [
        replace(run, summary=replace(run.summary, theory_band=0.1, **known))
        for run, known in zip(runs, told, strict=True)
    ]
    result = compare_runs(runs, runs[0])
    rows = [line for line in lines_of(shown(result)) if "healthy" in line]
    assert "+0.05 " in rows[0]
    assert "-0.50! " in rows[1]
    assert "theory: decades above what theory predicts" in " ".join(shown(result).split())
    assert "| theory |" in comparison_markdown(result)
    assert [row["theory_deviation"] for row in comparison_rows(result)] == [0.05, -0.5, None]
    bare = compare_runs(runs[2:], runs[2])
    assert "theory" not in shown(bare)


def test_the_answer_comes_last() -> None:
    last = " ".join(lines_of(shown(seed_grid()))[-4:])
    assert "In 14 of 18 runs the gradient reaches the first layer; in 4 it vanishes." in last
    assert "no norm (depths 50 and 200)" in last


def test_long_names_stand_above_their_rows() -> None:
    runs = [
        timed_run(StackSpec(block=block, norm_kind=kind, init=init, depth=2))
        for block in ("ffn", "transformer")
        for kind in ("layernorm", "rmsnorm")
        for init in ("he", "gpt2")
    ]
    lines = lines_of(shown(compare_runs(runs, runs[0])))
    assert max(map(len, lines)) <= 80
    assert "residual transformer, pre-norm, rmsnorm, gpt2 init" in lines


@given(result=comparisons())
def test_80_columns_whatever_the_numbers_are(result: Comparison) -> None:
    for columns in (gradient_columns(result)[0], cost_columns(0.01)):
        lines = design_table(result, columns).plain.split("\n")
        assert max(map(len, lines)) <= 80
    shown(result)
    comparison_csv(result)
    comparison_markdown(result)
    json.loads(comparison_json(result), parse_constant=pytest.fail)


def test_the_middle_of_200_rows_is_counted() -> None:
    runs = [timed_run(spec_of(depth=d), -0.1) for d in range(2, 202)]
    lines = lines_of(shown(compare_runs(runs, runs[0])))
    assert len(lines) < 100
    (elided, _) = (line for line in lines if line.startswith("…"))
    assert "170 more" in elided
    assert "vanishing" in elided
    assert "--csv -" in elided


# --- ratios -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Ratio(1.5, 1.4, 1.6, interleaved=True), "1.50 ±7% ▲"),
        (Ratio(0.5, 0.45, 0.55, interleaved=True), "0.50 ±10% ▼"),
        (Ratio(1.02, 0.9, 1.15, interleaved=True), "1.02 ±13%"),
        (Ratio(1.5, 1.4, 1.6), "1.50 ±7% ~"),
        (Ratio(1.5, 0.1, 20.0, interleaved=True), "1.50 ±99+%"),
        (Ratio(1.0, 1.0, 1.0, interleaved=True), "1"),
        (Ratio(2.0, interleaved=True), "2.00"),
        (Ratio(None, reason="not timed"), "-"),
    ],
)
def test_what_may_be_said_of_a_ratio_is_marked(ratio: Ratio, text: str) -> None:
    assert ratio_cell(ratio, 0.01).rstrip() == text


def test_the_reason_is_shown_where_there_is_no_ratio() -> None:
    runs = [timed_run(spec_of()), timed_run(spec_of(depth=4), threads=2)]
    text = " ".join(shown(compare_runs(runs, runs[0])).split())
    assert "no ratio in 1 of these rows: threads 2 against 1" in text


def test_the_reference_and_the_noise_are_named() -> None:
    text = " ".join(shown(compare_runs([], timed_run(spec_of()), 0.05)).split())
    assert "* the reference: residual, pre-norm, depth 3." in text
    assert "5.0% away" in text


def test_the_star_is_explained_without_times_too() -> None:
    result = compare_runs([run_of(spec_of(depth=2))], run_of())
    name = "the reference: residual, pre-norm, depth 3."
    for text, star in ((shown(result), "*"), (comparison_markdown(result), "\\*")):
        words = " ".join(text.split())
        assert f"3{star} " in words
        assert words.count(f"{star} {name}") == 1


def test_runs_without_times_have_no_table_of_costs() -> None:
    text = shown(compare_runs([], run_of()))
    assert "fwd ms" not in text


# --- profiles -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "bars"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "▁▂▃▄▅▆▇█"),
        ([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], "█▇▆▅▄▃▂▁"),
        ([0.0, 0.1], "▁▁"),  # less than a decade is not magnified
        ([0.0, math.nan, 8.0], "▁·█"),
        ([math.inf, -math.inf, math.nan], "···"),
        ([0.0] * 5 + [16.0] * 11, "▁▁▅█████"),
    ],
)
def test_profiles_are_drawn(profile: list[float], bars: str) -> None:
    assert sparkline(profile) == bars


@given(profile=st.lists(st.floats(), min_size=1, max_size=500))
def test_profiles_have_at_most_eight_cells(profile: list[float]) -> None:
    assert len(sparkline(profile)) == min(8, len(profile))


# --- files --------------------------------------------------------------------------------


def test_csv_has_a_row_for_each_run_and_misses_what_is_missing() -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(seed_grid()))))
    assert len(rows) == 18
    assert rows[0]["norm"] == "post" or rows[0]["norm"] == "pre"
    assert rows[0]["loss"] == "cotangent"
    assert rows[0]["loss_value"] == ""
    assert sum(row["reference"] == "True" for row in rows) == 1
    assert {row["time_call"] for row in rows} <= {"slower", "faster", "no difference"}


def test_json_is_json_and_has_the_same_rows() -> None:
    result = seed_grid()
    content = json.loads(comparison_json(result))
    assert [row["design"] for row in content["rows"]] == [row.design for row in result.rows]
    assert content["failures"] == []


def test_json_has_the_failures() -> None:
    result = compare_runs([], run_of(), failures=["a: out of memory"])
    assert json.loads(comparison_json(result))["failures"] == ["a: out of memory"]


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    spec = spec_of(depth=1)
    lost = run_of(spec, list(layer_rows(spec, [math.nan, 0.0], nonfinite=1)))
    lost = replace(lost, summary=replace(lost.summary, total_log10_gain=math.nan))
    text = comparison_json(compare_runs([lost], lost))
    assert json.loads(text)["rows"][0]["total_log10_gain"] is None
    assert "NaN" not in text


def test_markdown_has_the_answer_and_all_rows() -> None:
    runs = [timed_run(spec_of(depth=d), -0.1) for d in range(2, 52)]
    lines = comparison_markdown(compare_runs(runs, runs[0])).splitlines()
    assert lines[0].startswith("In ")
    assert sum(line.startswith("| residual, pre-norm") for line in lines) == 100
    bars = {line.count("|") for line in lines if line.startswith("|")}
    assert bars == {10, 8}
