"""What training came to: named from losses alone, by definitions that are written out here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import vl_convert
from records import layer_rows, run_of, spec_of
from rich.console import Console

from gradflow.judging.assembly import summarise_run
from gradflow.judging.comparison import compare_runs
from gradflow.judging.training_outcome import common_outcome, outcome_of, running_mean, summary_of
from gradflow.runs import store
from gradflow.runs.records import LayerRecord, Run, StepRecord
from gradflow.runs.results import read_results
from gradflow.showing.formats import comparison_markdown, results_markdown
from gradflow.showing.page.chart_parts import picture_of
from gradflow.showing.page.chart_tables import chart_tables
from gradflow.showing.page.charts import CHARTS, TRAINING_CHARTS
from gradflow.showing.page.html_page import charts_of
from gradflow.showing.page.report import page
from gradflow.showing.sentences import design_by_design
from gradflow.showing.terminal.many_runs import comparison_view
from gradflow.showing.terminal.one_run import run_view
from gradflow.specs.run_options import RunOptions

# Floor 1 and chance 3: the gap is 2, so 1.2 closes nine tenths of it and 2.8 one tenth.
FLOOR, CHANCE = 1.0, 3.0


def steps_of(losses: Sequence[float], seed: int = 0) -> list[StepRecord]:
    last = len(losses) - 1
    return [
        StepRecord(seed, i, loss, FLOOR, CHANCE, 0.5, None if i == last else 0.1)
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "name", "step"),
    [
        ([3.0, 2.0, 1.21, 1.19, 1.1], "converged", 3),
        ([3.0, 1.1, 2.0, 1.1, 1.1], "converged", 1),
        ([3.0, 2.5, 1.21], "learning", 2),
        ([3.0, 2.9, 2.79], "learning", 2),
        ([3.5, 2.9, 2.81], "stuck", 2),
        ([9.0, 3.9, 3.99], "stuck", 2),
        ([3.0, 2.0, 4.1, 5.0, 6.0], "diverged", 2),
        ([9.0, 4.01], "stuck", 1),
        ([9.0, 4.0, 10.0], "diverged", 2),
        ([3.0, 9.0, 3.0, 9.0, 9.0], "diverged", 3),
        ([3.0, 1.0, math.inf], "diverged", 2),
        ([math.nan], "diverged", 0),
    ],
)
def test_an_outcome_has_a_name_and_a_step(losses: list[float], name: str, step: int) -> None:
    found = outcome_of(steps_of(losses))
    assert (found.kind.word, found.step) == (name, step)
    assert found.advice


def test_losses_are_averaged_over_a_tenth_of_the_steps() -> None:
    assert list(running_mean([1.0, 2.0])) == [1.0, 2.0]
    found = list(running_mean([float(i) for i in range(20)]))
    assert found[:3] == [0.0, 0.5, 1.5]
    assert found[-1] == 18.5
    # One lucky batch at the end is no success.
    assert outcome_of(steps_of([3.0] * 39 + [1.0])).kind.word == "learning"


def test_gap_closed_is_zero_at_chance_and_one_at_the_floor() -> None:
    for loss, closed in ((CHANCE, 0.0), (FLOOR, 1.0), (2.0, 0.5), (4.0, -0.5)):
        assert outcome_of(steps_of([loss])).gap_closed == pytest.approx(closed)


def test_seeds_that_disagree_are_unstable() -> None:
    good, late, bad = (outcome_of(steps_of(x)) for x in ([1.1, 1.1], [3.0, 1.1], [3.0, math.nan]))
    alike = common_outcome([good, late])
    assert (alike.kind.word, alike.step) == ("converged", 1)
    both = common_outcome([good, bad, late])
    assert both.kind.word == "unstable"
    assert "Of 3: 2 converged, 1 diverged." in both.advice
    assert math.isnan(both.loss)


# Shown and stored


def trained_run(losses: Sequence[float] = (3.0, 2.0, 1.1), seeds: int = 1) -> Run:
    spec, options = spec_of(), RunOptions(steps=len(losses) - 1, every=1, seeds=seeds)
    rows: list[LayerRecord] = []
    for seed in range(seeds):
        for step in range(len(losses)):
            for row in layer_rows(spec, [-3.0 - step, -2.0, -1.0, 0.0], seed):
                values = {name: getattr(row, name) for name in LayerRecord.__slots__}
                rows.append(LayerRecord(**values | {"step": step}))
    steps = [record for seed in range(seeds) for record in steps_of(losses, seed)]
    summary = summarise_run([row for row in rows if row.step == 0], spec, options)
    values = {name: getattr(summary, name) for name in summary.__dataclass_fields__}
    return run_of(
        spec,
        rows,
        options=options,
        steps=steps,
        summary=type(summary)(**values | summary_of(steps)),
    )


def text_of(shown: object) -> str:
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_the_terminal_shows_outcome_loss_and_heat_map_in_80_columns() -> None:
    text = text_of(run_view(trained_run()))
    assert "converged at step 2" in text
    assert "loss ends at 1.100 (floor 1.000, chance 3.000; 95% of the gap closed)" in " ".join(
        text.split()
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-5].rstrip() == "  input ▄▄▄▄▄▄▂▂▂▂▂▂▁▁▁▁▁▁"  # -3, -4, -5 of -5 to 0
    assert lines[-2].rstrip() == "      3 ██████████████████"
    # The table above is of the first step.
    assert "0 input -3.000" in " ".join(text.split())


def test_a_long_training_fits_as_well() -> None:
    text = text_of(run_view(trained_run([3.0] * 500)))
    assert max(map(len, text.splitlines())) <= 80
    assert "stuck after 499 steps" in text


def test_without_training_nothing_is_said_of_it() -> None:
    assert "step" not in text_of(run_view(run_of()))
    assert summary_of([]) == {}


def test_a_trained_run_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    for losses in ([3.0, 2.0], [3.0, math.inf]):
        run = store.save(trained_run(losses, seeds=2), tmp_path)
        assert run.path is not None
        back = store.load(run.path)
        assert back.step_records == run.step_records
        assert back.layer_records == run.layer_records
        assert list(back.steps.columns) == list(StepRecord.__slots__)
    lines = (run.path / "steps.csv").read_text().splitlines(keepends=True)
    (run.path / "steps.csv").write_text("".join(lines[:-1]))
    with pytest.raises(store.RunFolderError, match=r"steps.csv has 3 rows, run.json promises 4"):
        store.load(run.path)


def test_a_run_from_before_there_was_training_can_be_read(tmp_path: Path) -> None:
    path = store.save(run_of(), tmp_path).path
    assert path is not None
    (path / "steps.csv").unlink()
    about = (path / "run.json").read_text()
    (path / "run.json").write_text(about.replace(',\n    "steps": 0\n', "\n"))
    assert "steps.csv" not in (path / "run.json").read_text()
    assert store.load(path).step_records == []
    assert len(read_results(tmp_path).runs) == 1


@pytest.mark.slow
def test_the_report_tells_and_draws_training_where_there_was_some(tmp_path: Path) -> None:
    store.save(run_of(), tmp_path / "a")
    plain = read_results(tmp_path / "a")
    assert charts_of(plain) == CHARTS
    store.save(trained_run(seeds=2), tmp_path / "a")
    both = read_results(tmp_path / "a")
    assert set(charts_of(both)) == {*CHARTS, *TRAINING_CHARTS}
    text = page(both)
    assert 'id="training"' in text
    assert "Training converged at step 2: the loss ends at 1.100" in text
    assert "Training converged at step 2" in results_markdown(both)
    losses = both.losses.filter(pl.col("loss").is_not_null())
    assert losses["loss"].to_list() == [3.0, 2.0, 1.1]
    assert set(losses["loss_floor"]) == {FLOOR}
    heat = both.heat.filter(pl.col("layer") == 0)
    assert heat.select("step", "until").rows() == [(0, 1), (1, 2), (2, 3)]
    assert heat["log10_grad_norm"].to_list() == [-3.0, -4.0, -5.0]
    # What is shown of all else is the first step.
    units = both.units.filter(pl.col("run") == 1)
    assert units["log10_grad_norm"].to_list() == [-3.0, -2.0, -1.0, 0.0]


def test_damaged_steps_are_named(tmp_path: Path) -> None:
    store.save(run_of(), tmp_path)
    path = store.save(trained_run(), tmp_path).path
    assert path is not None
    (path / "steps.csv").write_text("seed,step\n")
    found = read_results(tmp_path)
    assert len(found.runs) == 1
    assert "steps.csv" in found.skipped[0] or "no column" in found.skipped[0]


@pytest.mark.slow
def test_both_charts_can_be_drawn(tmp_path: Path) -> None:
    store.save(trained_run(seeds=2), tmp_path)
    results = read_results(tmp_path)
    found = chart_tables(results, design_by_design(results))
    for name, drawing in TRAINING_CHARTS.items():
        spec = picture_of(drawing, found[drawing.table]).to_dict()
        drawn = vl_convert.vegalite_to_svg(spec)
        assert drawing.title in drawn
        assert ("stroke-dasharray" in drawn) == (name == "loss")
    assert found["heats"]["bar"].unique(maintain_order=True).to_list()[:2] == [
        "residual, pre-norm, depth 3: input",
        "residual, pre-norm, depth 3: layer 1",
    ]


def test_a_comparison_has_outcome_and_final_loss() -> None:
    good, bad = trained_run(), trained_run([3.0, 3.0, math.nan])
    found = compare_runs([good, bad], good)
    text = text_of(comparison_view(found))
    assert "converged at step 2" in text
    assert "diverged at step 2" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "| converged at step 2 |" in comparison_markdown(found)
    assert "outcome" not in text_of(comparison_view(compare_runs([run_of()], run_of())))
