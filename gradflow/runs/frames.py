"""Layers and losses of thousands of runs as tables of polars: checked, averaged and thinned.

Tables in the very form that gradflow writes go through polars in batches. Whatever looks otherwise,
and every batch that polars refuses, goes through `tables.read_records`, which alone decides what a
table may look like and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from gradflow.errors import RunFolderError
from gradflow.runs.records import (
    FINITE_COLUMNS,
    NORM_COLUMNS,
    BrokenRows,
    LayerRecord,
    StepRecord,
    columns,
)
from gradflow.runs.tables import read_records

# Files, and bytes, that are read at once.
_BATCH, _BATCH_BYTES = 200, 1 << 28
_NAMES = columns(LayerRecord)
_HEADER = (",".join(_NAMES) + "\n").encode()
# Such bytes mean quotes, blanks beside numbers or other ends of lines, or only odd names.
_ODD_BYTES = tuple(bytes([code]) for code in (0, 9, 11, 12, 13, 32, 34))
_SCHEMA = dict.fromkeys(_NAMES, pl.Float64) | {
    "seed": pl.Int64,
    "step": pl.Int64,
    "layer": pl.Int64,
    "unit": pl.String,
    "nonfinite": pl.Int64,
    "saved_bytes": pl.Int64,
}
_NEVER_EMPTY = ("seed", "step", "layer", "unit")
# Columns of which means over the seeds are kept.
VALUES = (
    "act_rms",
    "log10_grad_norm",
    "skip_gain",
    "branch_gain",
    "act_cos",
    "grad_cos",
    "theory_log10_grad_norm",
    "theory_log10_grad_norm_low",
    "theory_log10_grad_norm_high",
    "forward_s",
    "backward_s",
)
# Where one of these is largest or smallest, the layer is kept whatever is left out.
EXTREMES = ("log10_grad_norm", "act_rms", "branch_gain", "act_cos", "grad_cos")
# `run` is a number; `x` the layer with its units spread evenly; `low` and `high` span the seeds.
UNIT_COLUMNS = ("run", "layer", "unit", "x", *VALUES, "low", "high")
# Means over the seeds by step; `low` and `high` span them.
LOSS_COLUMNS = {
    "run": pl.Int64,
    "step": pl.Int64,
    "loss": pl.Float64,
    "loss_floor": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}
# Means over the seeds at the outputs of the layers; `until` is the next measured step.
HEAT_COLUMNS = {
    "run": pl.Int64,
    "layer": pl.Int64,
    "step": pl.Int64,
    "until": pl.Int64,
    "log10_grad_norm": pl.Float64,
}
# Points of a line, and layers and steps of a heat map, at most.
_MOST_POINTS, _MOST_LAYERS, _MOST_STEPS = 150, 8, 40


@dataclass(frozen=True)
class TableFile:
    """One table of one run: the number of the run, the file, and the rows that it must have."""

    run: int
    file: Path
    rows: int


@dataclass
class LayerFrames:
    """The layers of many runs, averaged and thinned.

    Attributes:
        units: one row per run and unit with `UNIT_COLUMNS`, means over the seeds at the first step.
        heat: one row per trained run, layer and measured step with `HEAT_COLUMNS`.
        faults: for each run whose table cannot be read the reason.
        broken: for each run with rows that are not finite which these are.
    """

    units: pl.DataFrame
    heat: pl.DataFrame
    faults: dict[int, str] = field(default_factory=dict)
    broken: dict[int, BrokenRows] = field(default_factory=dict)


def read_layers(
    tables: Sequence[TableFile], layers: int, trained: Collection[int] = ()
) -> LayerFrames:
    """Read the layers of many runs.

    Args:
        tables: the layers.csv of the runs.
        layers: how many are kept of one run, about.
        trained: the runs of which heat maps are made.
    """
    units = [pl.DataFrame(schema=_unit_schema())]
    heat = [pl.DataFrame(schema=HEAT_COLUMNS)]
    found = LayerFrames(units[0], heat[0])
    for batch in _batches(tables, found.faults):
        rows = _read_batch(batch, found.faults)
        first = rows.filter(pl.col("step") == pl.col("step").min().over("run"))
        found.broken |= _broken_rows(first)
        units.append(thinned(_average(first), layers).select(UNIT_COLUMNS))
        heat.append(_heat(rows.filter(pl.col("run").is_in(list(trained)))))
    found.units, found.heat = pl.concat(units), pl.concat(heat)
    return found


def _unit_schema() -> dict[str, type[pl.DataType]]:
    kinds: dict[str, type[pl.DataType]] = {"run": pl.Int64, "layer": pl.Int64, "unit": pl.String}
    return {name: kinds.get(name, pl.Float64) for name in UNIT_COLUMNS}


# Files in batches


@dataclass(frozen=True)
class _Plain:
    """A table in the form that gradflow writes, as bytes without the header; None if it is not."""

    table: TableFile
    body: bytes | None


def _batches(tables: Sequence[TableFile], faults: dict[int, str]) -> Iterator[list[_Plain]]:
    batch: list[_Plain] = []
    size = 0
    for table in tables:
        try:
            data = table.file.read_bytes()
        except OSError as error:
            faults[table.run] = f"cannot be read: {table.file.name}: {error.strerror}"
            continue
        batch.append(_Plain(table, data[len(_HEADER) :] if _is_plain(data) else None))
        size += len(data)
        if len(batch) == _BATCH or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _is_plain(data: bytes) -> bool:
    """Whether a table has the form that gradflow writes; cells are only counted in all lines."""
    # Polars fills short lines with nulls.
    commas = data.count(b"\n") * (len(_NAMES) - 1)
    return (
        data.startswith(_HEADER)
        and data.endswith(b"\n")
        and data.count(b",") == commas
        and not any(byte in data for byte in _ODD_BYTES)
    )


def _read_batch(batch: Sequence[_Plain], faults: dict[int, str]) -> pl.DataFrame:
    """The rows of all tables that can be read; the others are added to `faults`."""
    plain = [each for each in batch if each.body is not None]
    rows = _by_polars(plain)
    whole = set() if rows is None else _whole(rows, plain)
    parts = [] if rows is None else [rows.filter(pl.col("run").is_in(list(whole)))]
    # Where one of many is damaged, the others are still read by polars.
    alone = plain if rows is None and len(plain) > 1 else []
    for each in batch:
        if each in alone and (one := _by_polars([each])) is not None and _whole(one, [each]):
            parts.append(one)
        elif each.table.run not in whole:
            parts += _by_records(each.table, faults)
    return pl.concat([_no_rows(), *parts])


def _no_rows() -> pl.DataFrame:
    return pl.DataFrame(schema={**_SCHEMA, "run": pl.Int64})


def _by_polars(batch: Sequence[_Plain]) -> pl.DataFrame | None:
    """The rows of all tables with the numbers of their runs; None if a cell is refused."""
    bodies = [each.body or b"" for each in batch]
    try:
        rows = pl.read_csv(b"".join([_HEADER, *bodies]), schema=_SCHEMA)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None
    lengths = [body.count(b"\n") for body in bodies]
    if sum(lengths) != len(rows):
        return None
    runs = np.repeat(np.array([each.table.run for each in batch], np.int64), lengths)
    return rows.with_columns(pl.Series("run", runs))


def _whole(rows: pl.DataFrame, batch: Sequence[_Plain]) -> set[int]:
    """The runs that have all their rows, without a cell empty that must not be."""
    empty = pl.any_horizontal(pl.col(name).is_null() for name in _NEVER_EMPTY)
    counts = rows.group_by("run").agg(pl.len(), empty=empty.any())
    lengths = {run: length for run, length, empty in counts.iter_rows() if not empty}
    return {each.table.run for each in batch if lengths.get(each.table.run) == each.table.rows}


def _by_records(table: TableFile, faults: dict[int, str]) -> Iterator[pl.DataFrame]:
    """The rows of one table by the reader that knows all rules, or none and a fault."""
    try:
        records = read_records(table.file, LayerRecord, table.rows)
    except RunFolderError as error:
        faults[table.run] = str(error).removeprefix(str(table.file.parent)).strip()
        return
    cells = {name: [getattr(record, name) for record in records] for name in _NAMES}
    # A seed of any size is told from the others by its place among them.
    places = {seed: place for place, seed in enumerate(dict.fromkeys(cells["seed"]))}
    cells["seed"] = [places[seed] for seed in cells["seed"]]
    yield pl.DataFrame(cells, schema=_SCHEMA).with_columns(run=pl.lit(table.run, pl.Int64))


# Units: means over the seeds at the first step


def _broken_rows(rows: pl.DataFrame) -> dict[int, BrokenRows]:
    """The `records.broken_rows` of every run with such rows, by the number of the run."""
    finite = (~pl.col(name).is_finite() for name in FINITE_COLUMNS)
    norms = (pl.col(name).is_nan() for name in NORM_COLUMNS)
    tests = [pl.col("nonfinite") > 0, *finite, *norms]
    broken = pl.any_horizontal(test.fill_null(value=False) for test in tests)
    first = pl.col("layer", "unit").first()
    found = rows.filter(broken).group_by("run").agg(first, pl.len())
    return {run: BrokenRows(layer, unit, count) for run, layer, unit, count in found.iter_rows()}


def _average(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the seeds, with the span of the gradient norm."""
    norm = pl.col("log10_grad_norm")
    # Units of a layer are spread over it, as they follow each other: 0.5, 1.0, 1.5, ...
    per_layer = ((pl.len() - 1) / pl.col("layer").max()).clip(lower_bound=1)
    return (
        rows.group_by("run", "layer", "unit", maintain_order=True)
        .agg(*(pl.col(name).mean() for name in VALUES), low=norm.min(), high=norm.max())
        .with_columns(x=(pl.int_range(pl.len()) / per_layer).over("run"))
    )


def thinned(units: pl.DataFrame, layers: int) -> pl.DataFrame:
    """Keep every so many layers, the first two and the last, and those with extreme values.

    Args:
        units: one row per run and unit; values that are not finite become missing.
        layers: how many are kept of one run, about.
    """
    layer, depth = pl.col("layer"), pl.col("layer").max().over("run")
    stride = ((depth + layers - 1) // layers).clip(lower_bound=1)
    kept = (layer % stride == 0) | (layer <= 1) | (layer == depth)
    for name in EXTREMES:
        for place in (pl.col(name).arg_min(), pl.col(name).arg_max()):
            kept |= (layer == layer.get(place).over("run")).fill_null(value=False)
    finite = [_if_finite(name).alias(name) for name in (*VALUES, "low", "high")]
    return units.filter(kept).with_columns(finite)


def _if_finite(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_finite()).then(name)


# Training: gradient norms by layer and step, and losses by step


def _heat(rows: pl.DataFrame) -> pl.DataFrame:
    """Gradient norms of the runs with several steps by layer and step, thinned."""
    heat = (
        rows.filter(pl.col("step").n_unique().over("run") > 1)
        .group_by("run", "seed", "step", "layer", maintain_order=True)
        .agg(pl.col("log10_grad_norm").last())
        .group_by("run", "layer", "step", maintain_order=True)
        .agg(pl.col("log10_grad_norm").mean())
        .filter(
            _every_so_many("layer", _MOST_LAYERS).over("run"),
            _every_so_many("step", _MOST_STEPS).over("run"),
        )
    )
    after = pl.col("step").shift(-1)
    width = pl.col("step") - pl.col("step").shift(1)
    return (
        heat.sort("run", "layer", "step")
        .with_columns(
            until=pl.coalesce(after, pl.col("step") + width).over("run", "layer"),
            log10_grad_norm=_if_finite("log10_grad_norm"),
        )
        .select(list(HEAT_COLUMNS))
    )


def read_losses(tables: Sequence[TableFile]) -> tuple[pl.DataFrame, dict[int, str]]:
    """Read the losses of trained runs, averaged over the seeds.

    Args:
        tables: the steps.csv of the runs.

    Returns:
        One row per run and step with `LOSS_COLUMNS`, thinned; and for each run whose table cannot
        be read the reason.
    """
    parts, faults = [pl.DataFrame(schema=LOSS_COLUMNS)], {}
    for table in tables:
        try:
            records = read_records(table.file, StepRecord, table.rows)
        except RunFolderError as error:
            faults[table.run] = str(error).removeprefix(str(table.file.parent)).strip()
        else:
            parts.append(_losses(table.run, records))
    return pl.concat(parts), faults


def _losses(number: int, records: Sequence[StepRecord]) -> pl.DataFrame:
    loss = _if_finite("loss")
    cells = {name: [getattr(r, name) for r in records] for name in ("step", "loss", "loss_floor")}
    means = (
        pl.DataFrame(cells, schema_overrides={"loss": pl.Float64, "loss_floor": pl.Float64})
        .with_columns(loss=loss)
        .group_by("step")
        .agg(pl.col("loss").mean(), pl.col("loss_floor").first(), low=loss.min(), high=loss.max())
        .sort("step")
        .with_columns(run=pl.lit(number, pl.Int64))
    )
    return means.filter(_every_so_many("step", _MOST_POINTS)).select(list(LOSS_COLUMNS))


def _every_so_many(name: str, most: int) -> pl.Expr:
    """Whether a value is one of about `most` evenly spaced ones in order, or the last."""
    rank = pl.col(name).rank("dense") - 1
    stride = (rank.max() // most + 1).cast(pl.Int64)
    return (rank % stride == 0) | (rank == rank.max())
