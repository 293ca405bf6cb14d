"""Columns that a run gets after its measurement: what theory predicts, and what units cost.

A prediction is relative to the gradient at the output, so the measured value there is added: 0 for
the default cotangent, whose norm is 1 where the output is one stream. Torch-free.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from statistics import median
from typing import Any

import numpy as np

from gradflow.judging.outlook import MOST_UNITS
from gradflow.judging.remarks import NOT_FINITE
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import LayerRecord, Run, Summary, Timing
from gradflow.specs.model_spec import ModelSpec, Spec
from gradflow.specs.stack import StackSpec
from gradflow.theory import Prediction, predict

TRAINED = "the weights learn, and the input is that of a task"
_TOO_DEEP = f"more than {MOST_UNITS:,} units; see --theory-only"


def with_theory(run: Run) -> Run:
    """Return the run of a stack with the columns, and the summary's numbers, `theory_...`.

    Where theory has no answer the columns stay empty, and the summary says why.
    """
    assert isinstance(run.spec, StackSpec)  # models have no theory
    reason = _withheld(run)
    prediction = Prediction(None, reason=reason) if reason else predict(run.spec)
    if prediction.reason is not None:
        return replace(run, summary=replace(run.summary, theory_reason=prediction.reason))
    seeds = [_logs(rows) for _, rows in groupby(run.layer_records, key=attrgetter("seed"))]
    given = run.spec.loss == "cotangent" and run.spec.readout is None  # of norm 1, exactly
    outputs = [0.0 if given else logs[-1] for logs in seeds]
    apart = deviation(seeds, outputs, prediction)
    if apart is None:
        summary = replace(run.summary, theory_reason=NOT_FINITE)
    else:
        summary = replace(run.summary, theory_deviation=apart[0], theory_band=apart[1])

    def filled(records: Iterable[LayerRecord]) -> Iterator[LayerRecord]:
        by_seed = groupby(records, key=attrgetter("seed"))
        for (_, rows), output in zip(by_seed, outputs, strict=True):
            yield from theory_rows(rows, prediction, output)

    return replace(run, layer_records=_mapped(run.layer_records, filled), summary=summary)


def _withheld(run: Run) -> str | None:
    if run.options.steps:
        return TRAINED
    units = run.spec.depth * run.spec.units_per_block
    return _TOO_DEEP if units > MOST_UNITS else None


def _logs(rows: Iterable[LayerRecord]) -> array[float]:
    return array("d", (_value(row.log10_grad_norm) for row in rows))


def theory_rows(
    rows: Iterable[LayerRecord], prediction: Prediction, output: float
) -> Iterator[LayerRecord]:
    """Yield the rows of one seed with the columns of a prediction.

    Args:
        rows: all rows of the seed, from the input up.
        prediction: prediction with one entry for each row.
        output: measured log10 norm of the gradient at the output; nothing is added where it is not
            finite.
    """
    if not math.isfinite(output):
        yield from rows
        return
    values = zip(prediction.log10_grad_norm or (), prediction.band(), strict=True)
    for row, (value, (low, high)) in zip(rows, values, strict=True):
        yield replace(
            row,
            theory_log10_grad_norm=output + value,
            theory_log10_grad_norm_low=output + low,
            theory_log10_grad_norm_high=output + high,
        )


def deviation(
    seeds: Sequence[Sequence[float]], outputs: Sequence[float], prediction: Prediction
) -> tuple[float, float] | None:
    """Return measured mean less theory where they lie farthest apart, and half the band there.

    Both are in decades; None if a measured value is missing or not finite.

    Args:
        seeds: measured log10 norms of each seed, from the input up.
        outputs: measured log10 norm at the output of each seed.
        prediction: prediction with one entry for each row.
    """
    measured = np.array(seeds)
    if not np.isfinite(measured).all():
        return None
    apart = (measured - np.array(outputs)[:, None]).mean(axis=0) - prediction.log10_grad_norm
    place = int(np.abs(apart).argmax())
    low, high = prediction.band(len(seeds))[place]
    return float(apart[place]), (high - low) / 2


def _value(number: float | None) -> float:
    return math.nan if number is None else number


_Change = Callable[[Iterable[LayerRecord]], Iterator[LayerRecord]]
_TIME_COLUMNS = ("forward_s", "forward_s_iqr", "backward_s", "backward_s_iqr")
# Above these the run carries a warning that names the remedy.
_NOISY_SPREAD = 0.10
_RECONCILED = 0.10


def with_times(run: Run, timing: Timing | None, pass_seconds: Sequence[float] = ()) -> Run:
    """Return the run with the times of the seed that was timed, the first; as it is without any.

    Args:
        run: a run without times.
        timing: times of the same network; None if it was not timed.
        pass_seconds: seconds that each statistics pass spent on the timed layers; empty where none
            can be compared with a timed pass.
    """
    if timing is None:
        return run
    if isinstance(run.spec, ModelSpec):
        timing = _numbered(timing, run.layer_records)
    return replace(
        run,
        layer_records=_mapped(run.layer_records, partial(_timed_rows, timing=timing)),
        time_records=timing.repeats,
        summary=_with_cost(run, timing),
        overhead=_overhead(timing, pass_seconds),
        warnings=(*run.warnings, *_warnings(timing, run.spec)),
    )


def _numbered(timing: Timing, rows: Iterable[LayerRecord]) -> Timing:
    """Return the times of a model with its layers' numbers; some layers may have no times."""
    layers = {row.unit: row.layer for row in rows}
    repeats = (replace(one, layer=layers.get(one.unit, one.layer)) for one in timing.repeats)
    return replace(timing, repeats=tuple(repeats))


def _mapped(rows: Sequence[LayerRecord], change: _Change) -> Sequence[LayerRecord]:
    """Return the changed rows, on disk if the rows are there."""
    return rows.map(change) if isinstance(rows, Spool) else list(change(rows))


def _timed_rows(rows: Iterable[LayerRecord], timing: Timing) -> Iterator[LayerRecord]:
    places = [(row.layer, row.unit) for row in timing.repeats if row.repeat == 0]
    units = dict(zip(places, timing.units, strict=True))
    for row in rows:
        times = units.pop((row.layer, row.unit), ())
        columns: dict[str, Any] = dict(zip(_TIME_COLUMNS, times, strict=False))
        yield replace(row, **columns) if times else row


def _with_cost(run: Run, timing: Timing) -> Summary:
    # A model's timed layers stand for no others.
    depth = timing.layers if isinstance(run.spec, ModelSpec) else run.spec.depth
    share = depth / timing.layers
    forward = sum(f for f, _, _, _ in timing.units) * share
    backward = sum(b for _, _, b, _ in timing.units) * share
    return replace(
        run.summary,
        forward_s=forward,
        backward_s=backward,
        forward_s_per_layer=forward / depth,
        backward_s_per_layer=backward / depth,
        matmul_flop_per_s=timing.matmul_flop_per_s,
        **_flops(timing, share, forward, backward),
    )


def _flops(timing: Timing, share: float, forward_s: float, backward_s: float) -> dict[str, Any]:
    """Return the FLOPs of a whole pass, and the FLOP/s."""
    if timing.flops is None:
        return {}
    forward, backward = (round(flop * share) for flop in timing.flops)
    return {
        "forward_flop": forward,
        "backward_flop": backward,
        "forward_flop_per_s": forward / forward_s if forward_s else None,
        "backward_flop_per_s": backward / backward_s if backward_s else None,
    }


def _overhead(timing: Timing, pass_seconds: Sequence[float]) -> dict[str, float] | None:
    """Return what observing cost in this run, and how far the times of units add up."""
    if timing.bare_s is None or timing.bare_iqr_s is None:
        return None
    times = {
        "bare_pass_s": timing.bare_s,
        "bare_pass_iqr_s": timing.bare_iqr_s,
        "timed_pass_s": timing.total_s,
        "timed_over_bare": timing.total_s / timing.bare_s,
    }
    if not pass_seconds:
        return times
    seconds = median(pass_seconds)
    over = seconds / timing.bare_s
    return times | {"statistics_pass_s": seconds, "statistics_over_bare": over}


def _warnings(timing: Timing, spec: Spec) -> Iterator[str]:
    if timing.layers < spec.depth:
        which = "evenly spread; totals are their mean times the depth"
        if isinstance(spec, ModelSpec):
            which = "that have a backward pass; totals are theirs"
        yield f"times are those of {timing.layers} of {spec.depth:,} layers, {which}"
    if timing.spread > _NOISY_SPREAD:
        yield (
            f"timings vary by {timing.spread:.0%} between repeats: close other programs, "
            "or raise --repeats or --time-budget"
        )
    if timing.bare_s is None:
        return
    gap = timing.total_s / timing.bare_s - 1
    if abs(gap) > _RECONCILED:
        yield (
            f"unit times add up to {1 + gap:.0%} of the bare pass: units are too small to time "
            "one by one, or the machine is busy; take a larger batch, or more --repeats"
        )
