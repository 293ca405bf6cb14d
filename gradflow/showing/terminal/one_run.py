"""One run in the terminal: layers, profile, verdict, training and cost, returned as Rich views."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradflow.judging.comparison import mean_profile
from gradflow.judging.remarks import place, theory_sentence
from gradflow.judging.training_outcome import outcome_sentence, training_class_named
from gradflow.judging.verdicts import verdict_named
from gradflow.runs.records import LayerRecord, Run, StepRecord, Summary
from gradflow.showing.sentences import gain_sentence, loss_words, trend_sentence
from gradflow.showing.terminal.printing import UnitCell, plain_table
from gradflow.specs.requests import training_line
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import without_digest
from gradflow.text import BARS, count, gib, giga, milliseconds, number

# Rows shown at each end of a long table.
ENDS = 8
_PROFILE_SIZE = (78, 14)
_DOT = "·"
_MOST_POINTS = 1000
# The character for a loss or a gradient that is not finite.
_LOST = "x"
# A picture of a training has at most so many characters across and rows down.
_CELLS, _MOST_LAYERS, _WIDEST_CELL = 64, 13, 6
_Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _LayerColumn:
    """One column of the table of layers: its heading, its field, and how a mean is written."""

    heading: str
    field: str
    digits: str

    def cell(self, row: LayerRecord) -> str:
        """The field of the row as text; seconds are written as milliseconds."""
        value = getattr(row, self.field)
        return number(value, self.digits) if self.digits else milliseconds(value)


_COLUMNS = (
    _LayerColumn("log10|g|", "log10_grad_norm", "+.3f"),
    _LayerColumn("gain", "gain", ".3f"),
    _LayerColumn("skip", "skip_gain", ".3f"),
    _LayerColumn("branch", "branch_gain", ".3f"),
    _LayerColumn("identity", "identity_share", ".3f"),
    _LayerColumn("log10|dW|", "log10_param_grad_norm", "+.2f"),
    _LayerColumn("update", "update_ratio", ".1e"),
    _LayerColumn("act rms", "act_rms", "#.3g"),
)
_TIME_COLUMNS = (_LayerColumn("fwd ms", "forward_s", ""), _LayerColumn("bwd ms", "backward_s", ""))


def run_view(run: Run) -> RenderableType:
    """Everything that `gradflow run` shows."""
    return Group(
        Text(run.spec.title, style="bold"),
        *(Text(line) for line in departure_lines(run)),
        *(Text(line, style="dim") for line in subtitle(run)),
        layer_table(run),
        profile(run.first_records),
        *verdict_lines(run.summary),
        *training_lines(run),
        *cost_lines(run),
    )


def departure_lines(run: Run) -> Iterator[str]:
    """The parts of a published scheme that this run has replaced by options."""
    if run.summary.departures:
        yield f"scheme {without_digest(str(run.spec.scheme))}, {run.summary.departures}"


def subtitle(run: Run) -> Iterator[str]:
    """The lines below the title: sizes, seeds, training, loss, number format and device."""
    spec, where = run.spec, run.environment
    yield f"{spec.details}, {count(run.options.seeds, 'seed')}"
    if isinstance(spec, StackSpec):
        yield from filter(None, [spec.origin])
        if run.options.steps:
            yield training_line(spec, run.options)
    yield f"loss {spec.loss}, {where['dtype']} on {where['device_name']}"


def layer_table(run: Run) -> Table:
    """One row per unit, the middle of a long stack left out; means over the seeds."""
    rows, hidden = end_rows(run.first_records)
    columns = [c for c in _COLUMNS if any(getattr(row, c.field) is not None for row in rows)]
    columns += _TIME_COLUMNS if run.time_records else ()
    table = plain_table()
    table.add_column("layer", justify="right")
    table.add_column("unit")
    for column in columns:
        table.add_column(column.heading, justify="right")
    for i, row in enumerate(rows):
        if hidden and i == ENDS:
            table.add_row("…", f"{hidden} more", *["…"] * len(columns), style="dim")
        table.add_row(str(row.layer), UnitCell(row.unit), *(c.cell(row) for c in columns))
    return table


def end_rows(records: Iterable[LayerRecord]) -> tuple[list[LayerRecord], int]:
    """Means over the seeds at both ends of a long stack, and how many units lie between."""
    kept: list[LayerRecord] = []
    hidden = 0
    for _, seed in groupby(records, key=attrgetter("seed")):
        rows = enumerate(seed, 1 - ENDS)
        first = [row for _, row in islice(rows, ENDS)]
        last = deque(rows, 2 * ENDS)
        rest = last[-1][0] if last else 0
        hidden = rest - ENDS if rest > 2 * ENDS else 0
        kept += first + [row for place, row in last if place > hidden]
    return mean_rows(kept), hidden


def mean_rows(records: Iterable[LayerRecord]) -> list[LayerRecord]:
    """One row per unit from the input up: means over the seeds, missing values left out."""
    places: dict[tuple[int, str], list[LayerRecord]] = {}
    for record in records:
        places.setdefault((record.layer, record.unit), []).append(record)
    return [rows[0] if len(rows) == 1 else _mean(rows) for rows in places.values()]


def _mean(rows: Sequence[LayerRecord]) -> LayerRecord:
    values: dict[str, Any] = {
        name: _mean_of([getattr(row, name) for row in rows]) for name in _AVERAGED
    }
    first = rows[0]
    return LayerRecord(first.seed, first.step, first.layer, first.unit, **values)


_AVERAGED = tuple(
    name for name in LayerRecord.__slots__ if name not in ("seed", "step", "layer", "unit")
)


def _mean_of(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def profile(records: Sequence[LayerRecord]) -> RenderableType:
    """log10 of the gradient norm over the layers, the mean over the seeds; theory dotted."""
    depth = records[-1].layer
    curves = [
        _curve(mean_profile(records, name), depth)
        for name in ("log10_grad_norm", "theory_log10_grad_norm")
    ]
    return draw_profile(curves[0], curves[1], depth)


def _curve(logs: Sequence[float], depth: int) -> list[tuple[float, float]]:
    units = (len(logs) - 1) / depth
    return [(i / units, logs[i]) for i in _extremes(logs)]


def draw_profile(measured: _Curve, theory: _Curve, depth: int) -> RenderableType:
    """A line of braille for the measurement, over dots for theory; either may be empty."""
    if max(len(measured), len(theory)) < 2:
        return Text("no profile: fewer than two layers have a finite gradient", style="dim")
    dots = f"; {_DOT} theory" if theory else ""
    text = _plot(measured, theory, depth, f"log10 |dL/dy| over the layers (0 is the input{dots})")
    return Padding(text, (1, 0))


def _extremes(values: Sequence[float]) -> list[int]:
    """Places of the finite values; of a long sequence only the ends of each stretch that is drawn.

    A drawing cannot tell more than `_MOST_POINTS` stretches apart, so the lowest and the highest
    value of each stand for all of it.
    """
    stretch = math.ceil(len(values) / _MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(values), stretch):
        places = range(start, min(start + stretch, len(values)))
        finite = [i for i in places if math.isfinite(values[i])]
        if finite:
            kept += sorted(
                {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            )
    return kept


def _plot(measured: _Curve, theory: _Curve, depth: int, title: str) -> Text:
    import plotext  # 50 ms, and only `run` draws

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(*_PROFILE_SIZE)
    plotext.xticks(sorted({round(depth * quarter / 4) for quarter in range(5)}))
    plotext.title(title)
    # Adding 0.0 keeps -0.00 off the axis. The curve that is drawn last lies on top.
    for curve, marker in ((theory, _DOT), (measured, "braille")):
        if curve:
            x, y = zip(*((x, round(y, 2) + 0.0) for x, y in curve), strict=True)
            plotext.plot(x, y, marker=marker)
    heights = [y for _, y in (*measured, *theory)]
    if max(heights) - min(heights) < 1:  # a flat profile is drawn flat, not magnified
        middle = (max(heights) + min(heights)) / 2
        plotext.ylim(middle - 0.5, middle + 0.5)
    drawing = plotext.uncolorize(plotext.build()).rstrip()
    return Text(drawing, no_wrap=True, overflow="crop")


def verdict_lines(summary: Summary) -> Iterator[RenderableType]:
    """The verdict with its place and advice, and the numbers behind it."""
    style = f"bold {verdict_named(summary.verdict).colour}"
    where = f" at {place(summary)}" if place(summary) else ""
    yield Text.assemble((summary.verdict + where, style), ". ", summary.advice)
    if summary.total_log10_gain is not None:
        yield Text(gain_sentence(summary))
    yield from map(Text, filter(None, [trend_sentence(summary), theory_sentence(summary)]))
    if summary.skip_share:
        share = f"{summary.skip_share:.1%} through the shortcuts"
        yield Text(
            f"Energy of the gradient: {share}, {1 - summary.skip_share:.1%} through branches."
        )


def training_lines(run: Run) -> Iterator[RenderableType]:
    """The outcome of a training, its loss and its gradients; nothing without training."""
    summary = run.summary
    if summary.outcome is None:
        return
    style = f"bold {training_class_named(summary.outcome).colour}"
    told = outcome_sentence(summary.outcome, summary.outcome_step)
    yield Text.assemble("\n", (told, style), ". ", str(summary.outcome_advice))
    yield Text(f"The {loss_words(summary)}. The verdict above is that of the first step.")
    yield from _loss_lines(run.step_records)
    yield from _heat_lines(run.layer_records)


def _loss_lines(records: Sequence[StepRecord]) -> Iterator[Text]:
    """The loss over the steps, mean over the seeds, from the floor up."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record.loss)
    steps = _evenly(sorted(by_step), _CELLS)
    losses = [fmean(by_step[step]) for step in steps]
    low, high = _loss_range(records[0], losses)
    cells = "".join(_bar(min(loss, high), low, high) for loss in losses)
    yield Text(f"{'loss':>7} {cells}", no_wrap=True)


def _loss_range(record: StepRecord, losses: Sequence[float]) -> tuple[float, float]:
    """Ends of the scale: floor and 2 chance - floor, or the extremes where these are unknown."""
    floor, chance = record.loss_floor, record.loss_chance
    if floor is not None and chance is not None:
        return floor, 2 * chance - floor
    finite = [loss for loss in losses if math.isfinite(loss)]
    return min(finite, default=0.0), max(finite, default=0.0)


def _heat_lines(records: Sequence[LayerRecord]) -> Iterator[Text]:
    """log10 of the gradient norm, layers down and steps across; nothing for a single step."""
    heat = _heat_of(records)
    steps = _evenly(sorted({step for step, _ in heat}), _CELLS)
    if len(steps) < 2:
        return
    # The input of some models takes no gradient, and then has no row.
    layers = _evenly(sorted({n for (_, n), v in heat.items() if not math.isnan(v)}), _MOST_LAYERS)
    finite = [value for value in heat.values() if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    wide = max(1, min(_WIDEST_CELL, _CELLS // len(steps)))
    scale = f"{BARS[0]} {low:+.2f} to {BARS[-1]} {high:+.2f}"
    yield Text(f"log10 |dL/dy|, layers down and steps across: {scale}")
    for layer in layers:
        cells = "".join(_bar(heat.get((s, layer), math.nan), low, high) * wide for s in steps)
        yield Text(f"{layer or 'input':>7} {cells}", no_wrap=True)
    last = str(steps[-1])
    yield Text(
        f"{'step':>7} {steps[0]}{last:>{wide * len(steps) - len(str(steps[0]))}}", no_wrap=True
    )


def _heat_of(records: Sequence[LayerRecord]) -> dict[tuple[int, int], float]:
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
        return _LOST
    place = (value - low) / (high - low) if high > low else 0.5
    return BARS[max(0, min(len(BARS) - 1, int(place * len(BARS))))]


def _evenly(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def speed_lines(summary: Summary) -> Iterator[Text]:
    """FLOP/s of both passes, and their shares of the matmul rate of the device."""
    rates = [summary.forward_flop_per_s, summary.backward_flop_per_s]
    device = summary.matmul_flop_per_s
    if not all(rates):
        return
    forward, backward = (f"{giga(rate)} GFLOP/s" for rate in rates if rate)
    if not device:
        yield Text(f"Speed: forward {forward}, backward {backward}.")
        return
    shares = [f"{rate / device:.0%}" for rate in rates if rate]
    yield Text(
        f"Speed: forward {forward}, {shares[0]} of this machine's matmul rate; "
        f"backward {backward}, {shares[1]}."
    )


def cost_lines(run: Run) -> Iterator[RenderableType]:
    """The lines on time, speed, memory and overhead of a run."""
    summary = run.summary
    if summary.forward_s is not None and summary.backward_s is not None:
        yield Text(
            f"One pass: forward {milliseconds(summary.forward_s)} ms, "
            f"backward {milliseconds(summary.backward_s)} ms; per layer "
            f"{milliseconds(summary.forward_s_per_layer)} + "
            f"{milliseconds(summary.backward_s_per_layer)} ms."
        )
        yield from speed_lines(summary)
    if summary.peak_bytes is not None:
        ratio = (run.overhead or {}).get("statistics_over_bare")
        overhead = f"; observing cost {ratio:.2f} times a bare pass" if ratio else ""
        yield Text(f"Peak memory {gib(summary.peak_bytes)}{overhead}.")
    policy = run.environment.get("memory_policy")
    if policy:
        yield Text(f"Memory policy: {policy}.")
