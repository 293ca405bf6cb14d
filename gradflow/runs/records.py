"""The records that measuring returns and everything else takes, and the one table of columns.

A column is a field of a record: its name, unit and meaning stand here and nowhere else. None means
missing and is written as an empty cell; NaN and infinities are numbers and are written as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradflow.specs.model_spec import Spec
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1


def column(meaning: str, unit: str = "", *, missing: bool = False) -> Any:
    """A field with its unit and meaning; fields that may be missing default to None."""
    metadata = {"meaning": meaning, "unit": unit}
    return field(default=None, metadata=metadata) if missing else field(metadata=metadata)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One row of `layers.csv`: one unit of one seed, or the input (layer 0)."""

    seed: int = column("seed of the weights, the input and the cotangent")
    step: int = column("training step; 0 is initialisation")
    layer: int = column("block, 1 to depth; 0 is the input")
    unit: str = column("branch of the unit; `input` in layer 0")
    act_rms: float | None = column("root mean square of the unit's output y")
    act_max_abs: float | None = column("largest |y|")
    grad_norm: float | None = column("norm of g = dL/dy over all elements of the batch")
    log10_grad_norm: float | None = column("its logarithm, exact beyond float64's range", "decades")
    gain: float | None = column("|dL/dx| / |dL/dy| of the unit, x its input", missing=True)
    skip_gain: float | None = column("the part of the gain through the shortcut", missing=True)
    branch_gain: float | None = column("the part of the gain through the branch", missing=True)
    skip_branch_cos: float | None = column("cosine between the two parts", missing=True)
    param_norm: float | None = column("norm of all the unit's parameters", missing=True)
    param_grad_norm: float | None = column("norm of dL/dparameters", missing=True)
    log10_param_grad_norm: float | None = column("its logarithm", "decades", missing=True)
    act_cos: float | None = column(
        "mean cosine between tokens of y (samples, where there are none): rank collapse",
        missing=True,
    )
    grad_cos: float | None = column(
        "mean cosine of g between samples: gradient shattering", missing=True
    )
    nonfinite: int | None = column("NaN and infinite elements of g", missing=True)
    zero_fraction: float | None = column("fraction of exact zeros in g", missing=True)
    theory_log10_grad_norm: float | None = column(
        "what theory predicts for `log10_grad_norm`; empty where it has no answer",
        "decades",
        missing=True,
    )
    theory_log10_grad_norm_low: float | None = column(
        "lower end of its band for one seed: tolerance and two standard deviations",
        "decades",
        missing=True,
    )
    theory_log10_grad_norm_high: float | None = column(
        "upper end of this band", "decades", missing=True
    )
    saved_bytes: int | None = column("kept by autograd for the unit's backward", "B", missing=True)
    forward_s: float | None = column("forward time, median over the repeats", "s", missing=True)
    forward_s_iqr: float | None = column("its interquartile range", "s", missing=True)
    backward_s: float | None = column("backward time, median over the repeats", "s", missing=True)
    backward_s_iqr: float | None = column("its interquartile range", "s", missing=True)
    identity_share: float | None = column(
        "squared cosine of dL/dx and dL/dy: the share of dL/dx that is dL/dy handed on",
        missing=True,
    )
    clipped_param_grad_norm: float | None = column(
        "norm of dL/dparameters as the optimizer took it, after clipping", missing=True
    )
    update_ratio: float | None = column(
        "norm of the optimizer's change of the parameters over their norm", missing=True
    )
    underflow_fraction: float | None = column(
        "fraction of g that is not 0, but below the normal numbers of its half-precision format",
        missing=True,
    )
    headroom_log2: float | None = column(
        "powers of two from the largest |g|, as scaled, to the largest number of its format",
        missing=True,
    )


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """One row of `params.csv`: one parameter tensor of one seed."""

    seed: int = column("seed")
    step: int = column("training step; 0 is initialisation")
    layer: int = column("block, 1 to depth")
    unit: str = column("branch of the unit")
    param: str = column("name within the unit")
    shape: str = column("sizes joined by x")
    numel: int = column("number of elements")
    norm: float = column("norm of the parameter")
    grad_norm: float | None = column("norm of its gradient; empty if autograd gave none")
    log10_grad_norm: float | None = column("its logarithm, exact beyond float64", "decades")
    nonfinite: int | None = column("NaN and infinite elements of its gradient")


@dataclass(frozen=True, slots=True)
class TimeRecord:
    """One row of `times.csv`: one unit in one timed repeat."""

    repeat: int = column("timed pass, from 0; warm-up passes are not stored")
    layer: int = column("block, 1 to depth")
    unit: str = column("branch of the unit")
    forward_s: float = column("forward time", "s")
    backward_s: float = column("backward time", "s")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One row of `steps.csv`: one step of training of one seed, before its update."""

    seed: int = column("seed of the weights and the batches")
    step: int = column("updates made so far")
    loss: float = column("of the batch of this step, which is new; cross-entropies are in nats")
    loss_floor: float | None = column("smallest expected loss of any model; empty if not known")
    loss_chance: float | None = column(
        "smallest expected loss without looking at the input; empty if not known"
    )
    grad_norm: float | None = column("norm of dL/dparameters over all of them, before the update")
    lr: float | None = column("learning rate of the update; empty if none followed", missing=True)
    update_ratio: float | None = column(
        "norm of the change of the parameters over their norm", missing=True
    )


Record = LayerRecord | ParamRecord | TimeRecord | StepRecord
TABLES: dict[str, type[Record]] = {
    "layers": LayerRecord,
    "params": ParamRecord,
    "times": TimeRecord,
    "steps": StepRecord,
}
# Columns that are finite in every row of a run whose verdict is one of finite numbers, and norms
# that may leave float64's range there, to 0 or inf, where their logarithms do not.
FINITE_COLUMNS = ("act_rms", "act_max_abs", "log10_grad_norm", "gain", "log10_param_grad_norm")
NORM_COLUMNS = ("grad_norm", "param_grad_norm")
TIMING_COLUMNS = ("forward_s", "forward_s_iqr", "backward_s", "backward_s_iqr")


def columns(record: type[Record]) -> tuple[str, ...]:
    """Column names of a table, in the order of the file."""
    return tuple(f.name for f in fields(record))


@dataclass(frozen=True)
class Summary:
    """Summary of a run. Decades are powers of ten; None is missing.

    `log10_gain_per_layer` is negative where the gradient shrinks towards the input. The interval
    covers 95 % over seeds and layers. `trend` is `exponential` or `power law` in depth, whichever
    fits the profile better, and `healthy_depth` the depth at which that trend leaves the
    healthy range. `departures` tells which parts of a scheme options have replaced. `outcome`, and
    what follows it, is what training came to (see `judging.training_outcome`); the verdict and all
    else is that of the first step.

    `forward_flop` and `backward_flop` are floating-point operations of one pass, those of matrix
    products, convolutions and attention; `matmul_flop_per_s` is what the device did of them per
    second in a bare matrix product.

    `theory_deviation` is the measured mean less theory, where the two lie farthest apart, in
    decades; `theory_band` what it may be there; `theory_reason` says why there is no theory.
    """

    verdict: str
    advice: str
    total_log10_gain: float | None = None
    log10_gain_per_layer: float | None = None
    log10_gain_per_layer_low: float | None = None
    log10_gain_per_layer_high: float | None = None
    efolding_layers: float | None = None
    trend: str | None = None
    healthy_depth: float | None = None
    param_grad_spread: float | None = None
    skip_share: float | None = None
    first_layer: int | None = None
    first_unit: str | None = None
    first_pass: str | None = None
    loss: float | None = None
    outcome: str | None = None
    outcome_step: int | None = None
    outcome_advice: str | None = None
    final_loss: float | None = None
    loss_floor: float | None = None
    loss_chance: float | None = None
    gap_closed: float | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    forward_s_per_layer: float | None = None
    backward_s_per_layer: float | None = None
    forward_flop: int | None = None
    backward_flop: int | None = None
    forward_flop_per_s: float | None = None
    backward_flop_per_s: float | None = None
    matmul_flop_per_s: float | None = None
    peak_bytes: int | None = None
    theory_deviation: float | None = None
    theory_band: float | None = None
    theory_reason: str | None = None
    departures: str | None = None


@dataclass(frozen=True)
class Timing:
    """Times of a run, from its timing passes.

    Attributes:
        units: median forward and backward seconds of each unit with their IQRs, in order.
        repeats: every raw repeat.
        total_s: median over the repeats of the sum over all units, forward plus backward.
        bare_s: the same network's forward + backward by torch alone, interleaved; None in a
            sweep, where the cells take turns instead. `bare_iqr_s` is its interquartile range.
        spread: interquartile range of `total_s` over its median.
        flops: of one forward and of one backward pass through these units; None if not counted.
        matmul_flop_per_s: of the device, in this dtype; None if not measured.
    """

    units: tuple[tuple[float, float, float, float], ...]
    repeats: tuple[TimeRecord, ...]
    total_s: float
    bare_s: float | None
    bare_iqr_s: float | None
    spread: float
    flops: tuple[int, int] | None = None
    matmul_flop_per_s: float | None = None

    @property
    def layers(self) -> int:
        """How many layers were timed: all, or a sample of a deep stack."""
        return len({row.layer for row in self.repeats})


@dataclass(frozen=True)
class Run:
    """One specification measured for one or more seeds on one device.

    `layers`, `params`, `times` and `steps` are the four tables as DataFrames; the records behind
    them are `layer_records`, `param_records`, `time_records` and `step_records`. `path` is the
    folder, once stored.
    """

    spec: Spec
    options: RunOptions
    summary: Summary
    environment: dict[str, Any]
    overhead: dict[str, Any] | None
    warnings: tuple[str, ...]
    layer_records: Sequence[LayerRecord]
    param_records: Sequence[ParamRecord]
    time_records: Sequence[TimeRecord]
    path: Path | None = None
    step_records: Sequence[StepRecord] = ()

    @cached_property
    def first_records(self) -> Sequence[LayerRecord]:
        """The rows of `layers.csv` at the first step, which verdicts and comparisons go by."""
        if isinstance(self.spec, StackSpec) and not self.options.steps:
            return self.layer_records  # which may be too many to hold
        return first_step(self.layer_records)

    @property
    def records(self) -> dict[str, Sequence[Any]]:
        """The rows of each table of `TABLES`."""
        return {name: getattr(self, records_of(name)) for name in TABLES}

    @cached_property
    def layers(self) -> pd.DataFrame:
        """`layers.csv`: one row per seed and unit."""
        return _frame(LayerRecord, self.layer_records)

    @cached_property
    def params(self) -> pd.DataFrame:
        """`params.csv`: one row per seed and parameter tensor."""
        return _frame(ParamRecord, self.param_records)

    @cached_property
    def times(self) -> pd.DataFrame:
        """`times.csv`: one row per timed repeat and unit."""
        return _frame(TimeRecord, self.time_records)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """`steps.csv`: one row per seed and training step."""
        return _frame(StepRecord, self.step_records)


def records_of(table: str) -> str:
    """The field of a `Run` with the rows of a table: `layer_records` of `layers`."""
    return f"{table.removesuffix('s')}_records"


class BrokenRows(NamedTuple):
    """Rows of a run that are not finite: layer and unit of the first, and how many there are."""

    layer: int
    unit: str
    rows: int


def broken_rows(records: Sequence[LayerRecord]) -> BrokenRows | None:
    """The rows that hold what no run with a finite verdict can hold; None if there are none."""
    broken = [row for row in records if _is_broken(row)]
    return BrokenRows(broken[0].layer, broken[0].unit, len(broken)) if broken else None


def _is_broken(row: LayerRecord) -> bool:
    finite = (getattr(row, name) for name in FINITE_COLUMNS)
    norms = (getattr(row, name) for name in NORM_COLUMNS)
    return (
        bool(row.nonfinite)
        or any(value is not None and not math.isfinite(value) for value in finite)
        or any(value is not None and math.isnan(value) for value in norms)
    )


def first_step(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    """The records of the first step that was measured."""
    first = min((record.step for record in records), default=0)
    return [record for record in records if record.step == first]


def _frame(record: type[Record], rows: Sequence[Record]) -> pd.DataFrame:
    import pandas as pd  # 0.8 s to import, so only where a DataFrame is asked for

    names = list(columns(record))
    return pd.DataFrame.from_records(list(map(attrgetter(*names), rows)), columns=names)
