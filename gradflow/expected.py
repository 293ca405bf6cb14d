"""Theory beside a measurement: the columns of the prediction, and how far the two lie apart.

A prediction is relative to the gradient at the output, so the measured value there is added: 0 for
the default cotangent, whose norm is 1. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

import numpy as np

from gradflow.records import LayerRecord, Run
from gradflow.spec import StackSpec
from gradflow.theory import Prediction, predict

TRAINED = "the weights learn, and the input is that of a task"
NOT_FINITE = "the measured gradient is not finite everywhere"


def with_theory(run: Run) -> Run:
    """The run with the columns `theory_...` and the summary's numbers of the same name.

    Args:
        run: as measured; where theory has no answer its columns stay empty, and the summary says
            why.
    """
    assert isinstance(run.spec, StackSpec)  # what was built; models have no theory
    if run.options.steps:
        return replace(run, summary=replace(run.summary, theory_reason=TRAINED))
    prediction = predict(run.spec)
    if prediction.reason is not None:
        return replace(run, summary=replace(run.summary, theory_reason=prediction.reason))
    seeds = [list(rows) for _, rows in groupby(run.layer_records, key=attrgetter("seed"))]
    outputs = [_output(rows, run.spec.loss) for rows in seeds]
    rows = [
        row
        for of_seed, output in zip(seeds, outputs, strict=True)
        for row in theory_rows(of_seed, prediction, output)
    ]
    apart = deviation(seeds, outputs, prediction)
    if apart is None:
        summary = replace(run.summary, theory_reason=NOT_FINITE)
    else:
        summary = replace(run.summary, theory_deviation=apart[0], theory_band=apart[1])
    return replace(run, layer_records=rows, summary=summary)


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
    seeds: Sequence[Sequence[LayerRecord]], outputs: Sequence[float], prediction: Prediction
) -> tuple[float, float] | None:
    """Measured mean less theory where they lie farthest apart, and half the band of a mean there.

    Args:
        seeds: the rows of each, from the input up.
        outputs: of each seed the measured log10 norm at the output.
        prediction: for these rows.

    Returns:
        Both in decades, or None if a measured value is missing or not finite.
    """
    measured = np.array([[_value(row.log10_grad_norm) for row in rows] for rows in seeds])
    if not np.isfinite(measured).all():
        return None
    apart = (measured - np.array(outputs)[:, None]).mean(axis=0) - prediction.log10_grad_norm
    place = int(np.abs(apart).argmax())
    low, high = prediction.band(len(seeds))[place]
    return float(apart[place]), (high - low) / 2


def _output(rows: Sequence[LayerRecord], loss: str) -> float:
    """Measured log10 norm at the output; exactly 0 for the cotangent, which is made so."""
    return 0.0 if loss == "cotangent" else _value(rows[-1].log10_grad_norm)


def _value(number: float | None) -> float:
    return math.nan if number is None else number
