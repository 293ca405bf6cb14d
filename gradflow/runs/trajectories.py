"""Training in many runs at once: losses by step, and gradient norms by step and layer (polars)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from gradflow.errors import RunFolderError
from gradflow.runs.profiles import SCHEMA
from gradflow.runs.record_files import read_records
from gradflow.runs.records import StepRecord

# Points of a line, and layers and steps of a heat map, at most.
POINTS, LAYERS, STEPS = 150, 8, 40
LOSSES = {
    "run": pl.Int64,
    "step": pl.Int64,
    "loss": pl.Float64,
    "loss_floor": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}
HEAT = {
    "run": pl.Int64,
    "layer": pl.Int64,
    "step": pl.Int64,
    "until": pl.Int64,
    "log10_grad_norm": pl.Float64,
}
Table = tuple[int, Path, int]


def read_losses(tables: Iterable[Table]) -> tuple[pl.DataFrame, dict[int, str]]:
    """The losses of trained runs.

    Args:
        tables: number of the run, its steps.csv, and the rows that this must have.

    Returns:
        One row per run and step with the columns `LOSSES`: means over the seeds, thinned; and for
        each run whose table cannot be read the reason.
    """
    parts, faults = [pl.DataFrame(schema=LOSSES)], {}
    for number, file, rows in tables:
        try:
            records = read_records(file, StepRecord)
        except RunFolderError as error:
            faults[number] = str(error).removeprefix(str(file.parent)).strip()
            continue
        if len(records) == rows:
            parts.append(_losses(number, records))
        else:
            faults[number] = f"is damaged: {file.name} has {len(records)} rows, not {rows}"
    return pl.concat(parts), faults


def _losses(number: int, records: Sequence[StepRecord]) -> pl.DataFrame:
    loss = pl.when(pl.col("loss").is_finite()).then("loss")
    columns = {name: [getattr(r, name) for r in records] for name in ("step", "loss", "loss_floor")}
    means = (
        pl.DataFrame(columns, schema_overrides={"loss": pl.Float64, "loss_floor": pl.Float64})
        .with_columns(loss=loss)
        .group_by("step")
        .agg(pl.col("loss").mean(), pl.col("loss_floor").first(), low=loss.min(), high=loss.max())
        .sort("step")
        .with_columns(run=pl.lit(number, pl.Int64))
    )
    return means.filter(_kept(pl.col("step"), POINTS)).select(list(LOSSES))


def _kept(values: pl.Expr, most: int) -> pl.Expr:
    """Every so many of the values in order, and the last."""
    rank = values.rank("dense") - 1
    stride = (rank.max() // most + 1).cast(pl.Int64)
    return (rank % stride == 0) | (rank == rank.max())


def read_heat(tables: Iterable[tuple[int, Path]]) -> pl.DataFrame:
    """Gradient norms of trained runs by layer and step, at the outputs of the layers.

    Args:
        tables: number of the run, and its layers.csv, which has been read before.

    Returns:
        One row per run, layer and measured step with the columns `HEAT`: means over the seeds,
        thinned. `until` is the next measured step.
    """
    names = ["seed", "step", "layer", "log10_grad_norm"]
    found = [
        pl.read_csv(file.read_bytes(), schema=SCHEMA)
        .select(names)
        .with_columns(run=pl.lit(number, pl.Int64))
        for number, file in tables
    ]
    if not found:
        return pl.DataFrame(schema=HEAT)
    heat = (
        pl.concat(found)
        .filter(pl.col("step").n_unique().over("run") > 1)
        .group_by("run", "seed", "step", "layer", maintain_order=True)
        .agg(pl.col("log10_grad_norm").last())
        .group_by("run", "layer", "step", maintain_order=True)
        .agg(pl.col("log10_grad_norm").mean())
        .filter(
            _kept(pl.col("layer"), LAYERS).over("run"), _kept(pl.col("step"), STEPS).over("run")
        )
    )
    after = pl.col("step").shift(-1)
    width = pl.col("step") - pl.col("step").shift(1)
    finite = pl.when(pl.col("log10_grad_norm").is_finite()).then("log10_grad_norm")
    return (
        heat.sort("run", "layer", "step")
        .with_columns(
            until=pl.coalesce(after, pl.col("step") + width).over("run", "layer"),
            log10_grad_norm=finite,
        )
        .select(list(HEAT))
    )
