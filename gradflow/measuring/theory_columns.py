"""Theory beside a measurement: the columns of the prediction, and how far the two lie apart.

A prediction is relative to the gradient at the output, so the measured value there is added: 0 for
the default cotangent, whose norm is 1 where the output is one stream. Torch-free.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

import numpy as np

from gradflow.judging.outlook import MOST_UNITS
from gradflow.judging.theory_words import NOT_FINITE
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import LayerRecord, Run
from gradflow.specs.stack import StackSpec
from gradflow.theory import Prediction, predict

TRAINED = "the weights learn, and the input is that of a task"
TOO_DEEP = f"more than {MOST_UNITS:,} units; see --theory-only"


def with_theory(run: Run) -> Run:
    """The run with the columns `theory_...` and the summary's numbers of the same name.

    Args:
        run: as measured; where theory has no answer its columns stay empty, and the summary says
            why.
    """
    assert isinstance(run.spec, StackSpec)  # what was built; models have no theory
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

    records = run.layer_records
    rows = records.map(filled) if isinstance(records, Spool) else list(filled(records))
    return replace(run, layer_records=rows, summary=summary)


def _withheld(run: Run) -> str | None:
    if run.options.steps:
        return TRAINED
    units = run.spec.depth * run.spec.units_per_block
    return TOO_DEEP if units > MOST_UNITS else None


def _logs(rows: Iterable[LayerRecord]) -> array[float]:
    return array("d", (_value(row.log10_grad_norm) for row in rows))


def theory_rows(
    rows: Iterable[LayerRecord], prediction: Prediction, output: float
) -> Iterator[LayerRecord]:
    """Rows of one seed with what theory predicts for them, one by one.

    Args:
        rows: from the input up.
        prediction: with one entry per row.
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
    """Measured mean less theory where they lie farthest apart, and half the band of a mean there.

    Args:
        seeds: measured log10 norms of each, from the input up.
        outputs: of each seed the measured log10 norm at the output.
        prediction: for these rows.

    Returns:
        Both in decades, or None if a measured value is missing or not finite.
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
