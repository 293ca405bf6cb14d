"""Training in the terminal: the outcome, the loss over the steps, and gradients layer by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from rich.console import RenderableType
from rich.text import Text

from gradflow.judging.overview import loss_words
from gradflow.judging.training_outcome import outcome_sentence
from gradflow.runs.records import LayerRecord, Run, StepRecord
from gradflow.showing.terminal.printing import BARS

LOST = "x"
# Characters across, and rows down; longer ones are thinned evenly.
CELLS, MOST_LAYERS, WIDEST = 64, 13, 6
STYLES = {"converged": "bold green", "learning": "bold yellow", "unstable": "bold yellow"}
Heat = dict[tuple[int, int], float]


def training_lines(run: Run) -> Iterator[RenderableType]:
    """What training came to; nothing where there was none."""
    summary = run.summary
    if summary.outcome is None:
        return
    style = STYLES.get(summary.outcome, "bold red")
    told = outcome_sentence(summary.outcome, summary.outcome_step)
    yield Text.assemble("\n", (told, style), ". ", str(summary.outcome_advice))
    yield Text(f"The {loss_words(summary)}. The verdict above is that of the first step.")
    yield from loss_lines(run.step_records)
    yield from heat_lines(run.layer_records)


def loss_lines(records: Sequence[StepRecord]) -> Iterator[Text]:
    """The loss over the steps, mean over the seeds, from the floor up."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record.loss)
    steps = _spread(sorted(by_step), CELLS)
    losses = [fmean(by_step[step]) for step in steps]
    low, high = _loss_range(records[0], losses)
    cells = "".join(_bar(min(loss, high), low, high) for loss in losses)
    yield Text(f"{'loss':>7} {cells}", no_wrap=True)


def _loss_range(record: StepRecord, losses: Sequence[float]) -> tuple[float, float]:
    """From the floor up; losses far above chance would hide what happens below it."""
    floor, chance = record.loss_floor, record.loss_chance
    if floor is not None and chance is not None:
        return floor, 2 * chance - floor
    finite = [loss for loss in losses if math.isfinite(loss)]
    return min(finite, default=0.0), max(finite, default=0.0)


def heat_lines(records: Sequence[LayerRecord]) -> Iterator[Text]:
    """log10 of the gradient norm, layers down and steps across; nothing for a single step."""
    heat = heat_of(records)
    steps = _spread(sorted({step for step, _ in heat}), CELLS)
    if len(steps) < 2:
        return
    # An input that takes no gradient has nothing to show.
    layers = _spread(sorted({n for (_, n), v in heat.items() if not math.isnan(v)}), MOST_LAYERS)
    finite = [value for value in heat.values() if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    wide = max(1, min(WIDEST, CELLS // len(steps)))
    scale = f"{BARS[0]} {low:+.2f} to {BARS[-1]} {high:+.2f}"
    yield Text(f"log10 |dL/dy|, layers down and steps across: {scale}")
    for layer in layers:
        cells = "".join(_bar(heat.get((s, layer), math.nan), low, high) * wide for s in steps)
        yield Text(f"{layer or 'input':>7} {cells}", no_wrap=True)
    last = str(steps[-1])
    yield Text(
        f"{'step':>7} {steps[0]}{last:>{wide * len(steps) - len(str(steps[0]))}}", no_wrap=True
    )


def heat_of(records: Sequence[LayerRecord]) -> Heat:
    """log10 |dL/dy| by step and layer, at the output of the layer; means over the seeds."""
    last: dict[tuple[int, int, int], float] = {}
    for row in records:
        value = math.nan if row.log10_grad_norm is None else row.log10_grad_norm
        last[row.seed, row.step, row.layer] = value
    groups: dict[tuple[int, int], list[float]] = {}
    for (_, step, layer), value in last.items():
        groups.setdefault((step, layer), []).append(value)
    return {place: fmean(values) for place, values in groups.items()}


def _bar(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return LOST
    place = (value - low) / (high - low) if high > low else 0.5
    return BARS[max(0, min(len(BARS) - 1, int(place * len(BARS))))]


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
