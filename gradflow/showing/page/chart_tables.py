"""The tables that charts draw, made from results: units, depths, times, losses, heats (polars)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import median

import polars as pl

from gradflow.runs.naming import RunName
from gradflow.runs.results import Results, StoredRun

# A line bears about so many symbols.
_MARKS = 8
_DIGITS = 5
# Runs that reach this many times farther than half of the runs are left out of a picture.
FAR = 4
NamedRuns = Sequence[tuple[StoredRun, RunName]]


def chart_tables(results: Results, runs: NamedRuns) -> dict[str, pl.DataFrame]:
    """The tables from which the charts of these runs are drawn, by name."""
    return {
        "units": _units(results, runs),
        "depths": _depths(runs),
        "times": _times(results, runs),
        "losses": _losses(results, runs),
        "heats": _heats(results, runs),
    }


def _units(results: Results, runs: NamedRuns) -> pl.DataFrame:
    """One row per run and unit, in the order of `runs`.

    `mark` is where a line bears a symbol, `log10_act_rms` the logarithm of `act_rms`.
    """
    log_rms = pl.col("act_rms").log10()
    place = pl.int_range(pl.len())
    every = (pl.len() - 1) // _MARKS + 1
    return (
        _named(runs)
        .join(results.units.rename({"run": "number"}), on="number", maintain_order="left")
        .with_columns(
            log10_act_rms=pl.when(log_rms.is_finite()).then(log_rms),
            mark=((place % every == 0) | (place == pl.len() - 1)).over("number"),
        )
        .drop("act_rms", "forward_s", "backward_s")
        .with_columns(pl.selectors.float().round_sig_figs(_DIGITS))
    )


def _depths(runs: NamedRuns) -> pl.DataFrame:
    """One row per run: depth, total gain, and the thresholds of the verdict."""
    found = [
        {
            "depth": run.spec.depth,
            "verdict": run.summary.verdict,
            "total_log10_gain": run.summary.total_log10_gain,
            "vanishing": -run.options.vanishing,
            "exploding": run.options.exploding,
        }
        for run, _ in runs
    ]
    kinds = {"depth": pl.Int64, "verdict": pl.String}
    floats = ("total_log10_gain", "vanishing", "exploding")
    table = pl.DataFrame(found, schema=kinds | dict.fromkeys(floats, pl.Float64))
    return pl.concat([_named(runs), table], how="horizontal").with_columns(
        pl.col(floats).round_sig_figs(_DIGITS)
    )


def _times(results: Results, runs: NamedRuns) -> pl.DataFrame:
    """One row per run, kind of unit and direction: milliseconds, the median over the layers."""
    seconds = {"forward": "forward_s", "backward": "backward_s"}
    median = (
        results.units.rename({"run": "number"})
        .group_by("number", "unit", maintain_order=True)
        .agg((pl.col(column).median() * 1e3).alias(name) for name, column in seconds.items())
        .unpivot(list(seconds), index=["number", "unit"], variable_name="pass", value_name="ms")
        .drop_nulls("ms")
        .with_columns(pl.col("ms").round_sig_figs(_DIGITS))
    )
    several = pl.col("unit").n_unique().over("number") > 1
    bar = pl.when(several).then(pl.format("{}: {}", "run", "unit")).otherwise("run")
    joined = _named(runs).join(median, on="number", maintain_order="left_right")
    return joined.with_columns(bar=bar)


def _losses(results: Results, runs: NamedRuns) -> pl.DataFrame:
    """One row per trained run and step."""
    found = results.losses.rename({"run": "number"})
    joined = _named(runs).join(found, on="number", maintain_order="left_right")
    return joined.with_columns(pl.selectors.float().round_sig_figs(_DIGITS))


def _heats(results: Results, runs: NamedRuns) -> pl.DataFrame:
    """One row per trained run, layer and measured step; `bar` names run and layer."""
    at_input = pl.when(pl.col("layer") == 0).then(pl.lit("input"))
    layer = at_input.otherwise(pl.format("layer {}", "layer"))
    found = results.heat.rename({"run": "number"})
    joined = _named(runs).join(found, on="number", maintain_order="left_right")
    with_bars = joined.with_columns(bar=pl.format("{}: {}", "run", layer))
    return with_bars.with_columns(pl.selectors.float().round_sig_figs(_DIGITS))


def _named(runs: NamedRuns) -> pl.DataFrame:
    rows = [(run.number, name.run, name.design) for run, name in runs]
    schema = {"number": pl.Int64, "run": pl.String, "design": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def axis_ends(
    table: pl.DataFrame, columns: Sequence[str], near: float | None, seen: tuple[float, float]
) -> tuple[float, float]:
    """The ends of a vertical axis that leaves far-out runs outside.

    A run is far out if its largest |value| is above both `near` and `FAR` times the median over
    the runs. If all runs are far out, or `near` is None, every run is inside.

    Args:
        table: with a column `number`, which tells the runs.
        columns: the drawn columns; where the first one is empty, all of them are.
        near: a value that is never far out.
        seen: values that are always in the picture.
    """
    low, high = pl.min_horizontal(columns).min(), pl.max_horizontal(columns).max()
    rows = table.drop_nulls(columns[0]).group_by("number").agg(low=low, high=high)
    spans = [(low, high, max(abs(low), abs(high))) for _, low, high in rows.iter_rows()]
    reaches = [reach for _, _, reach in spans]
    limit = inf if near is None or not spans else max(near, FAR * median(reaches))
    inside = [span for span in spans if span[2] <= limit] or spans
    return (
        min([seen[0], *(low for low, _, _ in inside)]),
        max([seen[1], *(high for _, high, _ in inside)]),
    )
