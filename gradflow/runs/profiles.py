"""Many layers.csv at once: read, averaged over the seeds, and thinned (polars).

Files go through one multi-file scan in batches. Where a batch fails, its files are read one by
one, so that the damaged ones are named and the others are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from gradflow.runs.consistency import FINITE, NUMBERS, Broken
from gradflow.runs.headers import header_fault
from gradflow.runs.records import LayerRecord, columns

BATCH = 200
NAMES = columns(LayerRecord)
KEYS = ("step", "layer", "unit")
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
SCHEMA = dict.fromkeys(NAMES, pl.Float64) | {
    "seed": pl.Int64,
    "step": pl.Int64,
    "layer": pl.Int64,
    "unit": pl.String,
    "nonfinite": pl.Int64,
    "saved_bytes": pl.Int64,
}
# Read so that a cell which is no whole number is found, as it is where one run is read.
COUNTS = ("nonfinite", "saved_bytes")
# Where one of these is largest or smallest, the layer is kept whatever is left out.
EXTREMES = ("log10_grad_norm", "act_rms", "branch_gain", "act_cos", "grad_cos")
# `run` is a number; `x` the layer with its units spread evenly; `low` and `high` span the seeds.
COLUMNS = ("run", "layer", "unit", "x", *VALUES, "low", "high")

Table = tuple[Path, int]
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)


def read_units(
    tables: Sequence[Table], layers: int
) -> tuple[pl.DataFrame, dict[int, str], dict[int, Broken]]:
    """Read the layers of many runs.

    Args:
        tables: each file with the rows that it must have.
        layers: that are kept of one run, about.

    Returns:
        One row per run and unit, the run being its place in `tables`; for each file that cannot
        be read the reason; and for each with rows that are not finite the first of them.
    """
    faults: dict[int, str] = {}
    broken: dict[int, Broken] = {}
    parts = [empty_units()]
    for start in range(0, len(tables), BATCH):
        batch = {start + i: table for i, table in enumerate(tables[start : start + BATCH])}
        rows = first_step(_read_batch(batch, faults))
        broken |= _broken(rows)
        parts.append(thin(average(rows), layers).select(COLUMNS))
    return pl.concat(parts), faults, broken


def empty_units() -> pl.DataFrame:
    """The table of units without a row."""
    kinds = {"run": pl.Int64, "layer": pl.Int64, "unit": pl.String}
    return pl.DataFrame(schema={name: kinds.get(name, pl.Float64) for name in COLUMNS})


def first_step(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of the first step of each run."""
    return rows.filter(pl.col("step") == pl.col("step").min().over("run"))


def _is_broken() -> pl.Expr:
    """`consistency.is_broken` of every row."""
    finite = (~pl.col(name).is_finite() for name in FINITE)
    numbers = (pl.col(name).is_nan() for name in NUMBERS)
    tests = [pl.col("nonfinite") > 0, *finite, *numbers]
    return pl.any_horizontal(test.fill_null(value=False) for test in tests).alias("broken")


def _broken(rows: pl.DataFrame) -> dict[int, Broken]:
    first = pl.col("layer", "unit").first()
    found = rows.filter("broken").group_by("run").agg(first, pl.len())
    return {run: (layer, unit, count) for run, layer, unit, count in found.iter_rows()}


def average(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the seeds, with the span of the gradient norm."""
    norm = pl.col("log10_grad_norm")
    return (
        rows.group_by("run", "layer", "unit", maintain_order=True)
        .agg(*(pl.col(name).mean() for name in VALUES), low=norm.min(), high=norm.max())
        .with_columns(x=_place())
    )


def _place() -> pl.Expr:
    """Units of a layer are spread over it, as they follow each other: 0.5, 1.0, 1.5, ..."""
    per_layer = (pl.len() - 1) / pl.col("layer").max()
    return (pl.int_range(pl.len()) / per_layer.clip(lower_bound=1)).over("run")


def thin(units: pl.DataFrame, layers: int) -> pl.DataFrame:
    """Keep every so many layers, the first two and the last, and those with extreme values."""
    layer, depth = pl.col("layer"), pl.col("layer").max().over("run")
    stride = ((depth + layers - 1) // layers).clip(lower_bound=1)
    kept = (layer % stride == 0) | (layer <= 1) | (layer == depth)
    for name in EXTREMES:
        for place in (pl.col(name).arg_min(), pl.col(name).arg_max()):
            kept |= (layer == layer.get(place).over("run")).fill_null(value=False)
    finite = [pl.when(pl.col(n).is_finite()).then(n).alias(n) for n in (*VALUES, "low", "high")]
    return units.filter(kept).with_columns(finite)


def _read_batch(batch: dict[int, Table], faults: dict[int, str]) -> pl.DataFrame:
    """The rows of all files that are complete; the others are added to `faults`."""
    whole = {}
    for number, (file, _) in batch.items():
        fault = outer_fault(file)
        if fault is None:
            whole[number] = file
        else:
            faults[number] = fault
    rows = _scan(whole, faults)
    bad = dict(_inner_faults(rows, {number: batch[number][1] for number in whole}))
    faults |= {number: bad[number] for number in bad if number not in faults}
    return rows.filter(~pl.col("run").is_in(list(bad)))


def outer_fault(file: Path) -> str | None:
    """What is wrong with a table before it is parsed: missing, empty, header, cells, cut short."""
    if not file.is_file():
        return f"has no {file.name}"
    try:
        data = file.read_bytes()
    except OSError as error:
        return f"cannot be read: {file.name}: {error.strerror}"
    first_line = data.partition(b"\n")[0].decode(errors="replace")
    fault = header_fault(first_line.strip().split(","), NAMES)
    if fault is None and not data.endswith(b"\n"):
        fault = "ends in the middle of a line"
    # Polars fills short lines with nulls, and cuts long ones where it skips columns.
    commas = data.count(b"\n") * (len(NAMES) - 1)
    if fault is None and b'"' not in data and data.count(b",") != commas:
        fault = "has lines with too few or too many cells"
    return fault and f"is damaged: {file.name} {fault}"


def _scan(files: dict[int, Path], faults: dict[int, str]) -> pl.DataFrame:
    numbers = {str(file): number for number, file in files.items()}
    if files:
        try:
            scan = pl.scan_csv(
                list(files.values()), schema=SCHEMA, include_file_paths="file", glob=False
            )
            run = pl.col("file").replace_strict(numbers, return_dtype=pl.Int64).alias("run")
            return scan.select(run, *KEYS, *VALUES, *COUNTS, _is_broken()).collect()
        except (*UNREADABLE, TypeError):  # a path that is no UTF-8 is a TypeError
            pass  # one of them is damaged: find out which
    return pl.concat([_no_rows(), *_one_by_one(files, faults)])


def _no_rows() -> pl.DataFrame:
    kinds = {name: SCHEMA[name] for name in (*KEYS, *VALUES, *COUNTS)}
    return pl.DataFrame(schema={"run": pl.Int64, **kinds, "broken": pl.Boolean})


def _one_by_one(files: dict[int, Path], faults: dict[int, str]) -> Iterator[pl.DataFrame]:
    run = pl.col("run").cast(pl.Int64)
    for number, file in files.items():
        try:
            rows = pl.read_csv(file.read_bytes(), schema=SCHEMA)
            numbered = rows.with_columns(run=pl.lit(number))
            yield numbered.select(run, *KEYS, *VALUES, *COUNTS, _is_broken())
        except UNREADABLE as error:
            reason = str(error).strip().partition("\n")[0]
            faults[number] = f"is damaged: {file.name}: {reason}"


def _inner_faults(rows: pl.DataFrame, promised: dict[int, int]) -> Iterator[tuple[int, str]]:
    lost = pl.any_horizontal(pl.col(name).is_null() for name in KEYS)
    counts = rows.group_by("run").agg(pl.len(), lost=lost.sum())
    found = {number: (count, lost) for number, count, lost in counts.iter_rows()}
    for number, promise in promised.items():
        count, lost_keys = found.get(number, (0, 0))
        if count != promise:
            yield number, f"is damaged: layers.csv has {count} rows, run.json promises {promise}"
        elif count == 0:
            yield number, "is damaged: layers.csv has no rows"
        elif lost_keys:
            yield number, f"is damaged: layers.csv lacks step, layer or unit in {lost_keys} rows"
