"""What a person sees in the terminal: Rich renderables, returned and never printed here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradflow.judging.comparison import mean_profile
from gradflow.judging.theory_words import theory_sentence
from gradflow.judging.words import place
from gradflow.runs.records import LayerRecord, Run
from gradflow.runs.summary import Summary
from gradflow.showing.terminal.training_tables import training_lines
from gradflow.showing.terminal.unit_cells import UnitCell
from gradflow.specs.stack import StackSpec
from gradflow.specs.training_spec import training_line
from gradflow.specs.user_code import shown
from gradflow.text import count, gib, giga, milliseconds, number, signed, two_digits

# Rows shown at each end of a long table.
ENDS = 8
PROFILE_SIZE = (78, 14)
DOT = "·"
MOST_POINTS = 1000
STYLES = {"healthy": "bold green", "unstable": "bold yellow"}


@dataclass(frozen=True)
class Column:
    """One column of the layer table: its heading, the field, and how a mean is written."""

    heading: str
    field: str
    digits: str


COLUMNS = (
    Column("log10|g|", "log10_grad_norm", "+.3f"),
    Column("gain", "gain", ".3f"),
    Column("skip", "skip_gain", ".3f"),
    Column("branch", "branch_gain", ".3f"),
    Column("identity", "identity_share", ".3f"),
    Column("log10|dW|", "log10_param_grad_norm", "+.2f"),
    Column("update", "update_ratio", ".1e"),
    Column("act rms", "act_rms", "#.3g"),
)
Curve = Sequence[tuple[float, float]]
TIMES = (("fwd ms", "forward_s"), ("bwd ms", "backward_s"))


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
    """Which parts of a published scheme this run has replaced by options."""
    if run.summary.departures:
        yield f"scheme {shown(str(run.spec.scheme))}, {run.summary.departures}"


def subtitle(run: Run) -> Iterator[str]:
    """The rest of the specification, and where it was measured."""
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
    shown = [c for c in COLUMNS if any(getattr(r, c.field) is not None for r in rows)]
    timed = [t for t in TIMES if run.time_records]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("unit")
    for heading in [c.heading for c in shown] + [name for name, _ in timed]:
        table.add_column(heading, justify="right")
    for i, row in enumerate(rows):
        if hidden and i == ENDS:
            dots = ["…"] * (len(shown) + len(timed))
            table.add_row("…", f"{hidden} more", *dots, style="dim")
        table.add_row(*_cells(row, shown, timed))
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


def _cells(
    row: LayerRecord, shown: Sequence[Column], timed: Sequence[tuple[str, str]]
) -> Iterator[RenderableType]:
    yield str(row.layer)
    yield UnitCell(row.unit)
    for column in shown:
        yield number(getattr(row, column.field), column.digits)
    for _, field in timed:
        yield milliseconds(getattr(row, field))


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
    return draw(curves[0], curves[1], depth)


def _curve(logs: Sequence[float], depth: int) -> list[tuple[float, float]]:
    units = (len(logs) - 1) / depth
    return [(i / units, logs[i]) for i in telling(logs)]


def draw(measured: Curve, theory: Curve, depth: int) -> RenderableType:
    """A line of braille for the measurement, over dots for theory; either may be empty."""
    if max(len(measured), len(theory)) < 2:
        return Text("no profile: fewer than two layers have a finite gradient", style="dim")
    dots = f"; {DOT} theory" if theory else ""
    text = _plot(measured, theory, depth, f"log10 |dL/dy| over the layers (0 is the input{dots})")
    return Padding(text, (1, 0))


def telling(values: Sequence[float]) -> list[int]:
    """Places of finite values, no more than a drawing can tell apart.

    Of each stretch of a long sequence the lowest and the highest.
    """
    stretch = math.ceil(len(values) / MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(values), stretch):
        places = range(start, min(start + stretch, len(values)))
        finite = [i for i in places if math.isfinite(values[i])]
        if finite:
            kept += sorted(
                {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            )
    return kept


def _plot(measured: Curve, theory: Curve, depth: int, title: str) -> Text:
    import plotext  # 50 ms, and only `run` draws

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(*PROFILE_SIZE)
    plotext.xticks(sorted({round(depth * quarter / 4) for quarter in range(5)}))
    plotext.title(title)
    # No axis label reads -0.00. What is drawn last lies on top.
    for curve, marker in ((theory, DOT), (measured, "braille")):
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
    style = STYLES.get(summary.verdict, "bold red")
    where = f" at {place(summary)}" if place(summary) else ""
    yield Text.assemble((summary.verdict + where, style), ". ", summary.advice)
    if summary.total_log10_gain is not None:
        yield Text(gain_sentence(summary))
    if summary.trend in ("exponential", "power law"):
        yield Text(trend_sentence(summary))
    if theory := theory_sentence(summary):
        yield Text(theory)
    if summary.skip_share:
        share = f"{summary.skip_share:.1%} through the shortcuts"
        yield Text(
            f"Energy of the gradient: {share}, {1 - summary.skip_share:.1%} through branches."
        )


def gain_sentence(summary: Summary) -> str:
    """Total gain, rate with interval, e-folding depth."""
    text = f"From output to input: {signed(summary.total_log10_gain)} decades"
    rate, high = summary.log10_gain_per_layer, summary.log10_gain_per_layer_high
    if rate is not None:
        text += f", {signed(rate, 4)}" + (f" ± {high - rate:.4f}" if high is not None else "")
        text += " per layer"
    return text + (" (95 %)." if high is not None else ".")


def trend_sentence(summary: Summary) -> str:
    """How the profile goes on with depth."""
    kind = {"exponential": "exponential", "power law": "a power law"}[str(summary.trend)]
    text = f"The profile is {kind} in depth"
    if summary.trend == "exponential" and summary.efolding_layers is not None:
        text += f", a factor e every {summary.efolding_layers:.3g} layers"
    if summary.healthy_depth is None:
        return text + "; it stays in the healthy range at any depth."
    return text + f"; it leaves the healthy range near depth {two_digits(summary.healthy_depth)}."


def speed_lines(summary: Summary) -> Iterator[Text]:
    """FLOP/s of both passes, and their share of what the device can do."""
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
    """Time, memory and overhead."""
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
