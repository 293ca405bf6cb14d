"""The columns in which runs stand side by side, with the notes on how to read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gradflow.judging.comparison import Comparison, Ratio, Row
from gradflow.judging.theory_words import theory_cell
from gradflow.judging.training_outcome import outcome_sentence
from gradflow.runs.summary import Summary
from gradflow.showing.terminal.printing import BARS, in_ascii
from gradflow.text import gib, milliseconds, number, two_digits

PROFILE_CELLS = 8
MARKS = {"slower": "▲", "faster": "▼", "not interleaved": "~"}


@dataclass(frozen=True)
class Column:
    """One column: its heading, the text of a cell, and whether it is aligned left."""

    heading: str
    cell: Callable[[Row], str]
    left: bool = False


def ascii_columns(columns: Sequence[Column]) -> list[Column]:
    """The same in ASCII, before widths are taken of their texts."""
    return [replace(c, heading=in_ascii(c.heading), cell=_ascii_cell(c)) for c in columns]


def _ascii_cell(column: Column) -> Callable[[Row], str]:
    return lambda row: in_ascii(column.cell(row))


def _depth(row: Row) -> str:
    return f"{row.depth}{'*' if row.is_reference else ' '}"


def _short(value: float | None, digits: str, widest: int = 8) -> str:
    """A number by its format, or in powers of ten where that would be too wide."""
    if value is None:
        return ""
    text = format(value, digits)
    return text if len(text) <= widest else f"{value:.0e}"


def _rate(row: Row) -> str:
    rate, high = row.summary.log10_gain_per_layer, row.summary.log10_gain_per_layer_high
    if rate is None:
        return ""
    decimals = 4 if abs(rate) < 1 else 2
    half = "" if high is None else f" ±{_short(high - rate, f'.{decimals}f', 7)}"
    return _short(rate, f"+.{decimals}f") + half


def _efolding(row: Row) -> str:
    layers = row.summary.efolding_layers
    if layers is None or not 10 <= layers < 1e5:
        return _short(layers, ".1f", 6)
    return two_digits(layers)


def _milliseconds(seconds: float | None) -> str:
    text = milliseconds(seconds)
    return text if seconds is None or len(text) <= 7 else f"{seconds * 1e3:.0e}"


def sparkline(profile: Sequence[float]) -> str:
    """A profile of decades in a few characters; a cell is the mean of its stretch.

    Heights are relative within the line, but a profile that spans less than a decade is not
    magnified. Where values are not finite the cell is `·`.
    """
    cells = min(PROFILE_CELLS, len(profile))
    stretches = [
        profile[i * len(profile) // cells : (i + 1) * len(profile) // cells] for i in range(cells)
    ]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = min(finite, default=0.0), max([1.0, *(m - min(finite) for m in finite)])
    return "".join(_bar((mean - low) / span) for mean in means)


def _bar(height: float) -> str:
    return BARS[min(int(height * len(BARS)), len(BARS) - 1)] if math.isfinite(height) else "·"


GRADIENT = (
    Column("depth", _depth),
    Column("verdict", lambda row: row.summary.verdict, left=True),
    Column("decades", lambda row: _short(row.summary.total_log10_gain, "+.2f")),
    Column("per layer ±", _rate),
    Column("e-fold", _efolding),
    Column("skip", lambda row: _short(row.summary.skip_share, ".0%", 4)),
    Column("dW", lambda row: _short(row.summary.param_grad_spread, ".1f", 6)),
    Column("profile", lambda row: sparkline(row.profile), left=True),
)

GRADIENT_NOTE = (
    "decades: growth of the gradient norm from output to input, in all and per layer with its "
    "95 % interval. e-fold: layers for a factor e. skip: share that comes through the shortcuts. "
    "dW: decades between the largest and the smallest parameter gradient. profile: log |gradient| "
    "from the input to the output."
)
THEORY = Column("theory", lambda row: theory_cell(row.summary))
THEORY_NOTE = " theory: decades above what theory predicts, ! where that is beyond its band."


def gradient_columns(comparison: Comparison) -> tuple[tuple[Column, ...], str]:
    """The columns and their note; theory where it has something to say of any run."""
    reference = next(row for row in comparison.rows if row.is_reference)
    note = f"* the reference: {reference.name.run}. {GRADIENT_NOTE}"
    if not any(row.summary.theory_deviation is not None for row in comparison.rows):
        return GRADIENT, note
    *columns, profile = GRADIENT
    return (*columns, THEORY, profile), note + THEORY_NOTE


TRAINING = (
    Column("depth", _depth),
    Column("outcome", lambda row: _outcome(row.summary), left=True),
    Column("loss", lambda row: _short(row.summary.final_loss, ".3f")),
    Column("floor", lambda row: _short(row.summary.loss_floor, ".3f")),
    Column("chance", lambda row: _short(row.summary.loss_chance, ".3f")),
    Column("closed", lambda row: _short(row.summary.gap_closed, ".0%", 6)),
)

TRAINING_NOTE = (
    "loss: cross-entropy in nats, mean over the last tenth of the steps. floor: the smallest that "
    "there is. chance: the smallest without looking at the input. closed: part of the way from "
    "chance to the floor. All else is of the first step."
)


def _outcome(summary: Summary) -> str:
    return outcome_sentence(summary.outcome, summary.outcome_step) if summary.outcome else ""


def cost_columns(noise: float) -> tuple[Column, ...]:
    """What each run costs per layer, and the ratio to the reference."""
    return (
        Column("depth", _depth),
        Column("fwd ms", lambda row: _milliseconds(row.summary.forward_s_per_layer)),
        Column("ratio ±", lambda row: ratio_cell(row.forward, noise)),
        Column("bwd ms", lambda row: _milliseconds(row.summary.backward_s_per_layer)),
        Column("ratio ±", lambda row: ratio_cell(row.backward, noise)),
        Column("peak", lambda row: gib(row.summary.peak_bytes) if row.summary.peak_bytes else ""),
    )


def ratio_cell(ratio: Ratio, noise: float) -> str:
    """A ratio, half its interval in percent, and the mark of what may be said of it."""
    if ratio.value is None:
        return "-  "
    if (ratio.value, ratio.low, ratio.high) == (1, 1, 1):
        return "1  "
    half = _half_width(ratio)
    interval = "" if half is None else f" ±{half:.0%}" if half < 1 else " ±99+%"
    return f"{number(ratio.value, '.2f')}{interval} {MARKS.get(call(ratio, noise), ' ')}"


def call(ratio: Ratio, noise: float) -> str:
    """What may be said of a ratio: slower, faster, nothing, or why nothing may be said."""
    if ratio.value is None:
        return ratio.reason
    if not ratio.interleaved:
        return "not interleaved"
    if not ratio.differs(noise):
        return "no difference"
    return "slower" if ratio.value > 1 else "faster"


def _half_width(ratio: Ratio) -> float | None:
    if ratio.value is None or ratio.low is None or ratio.high is None:
        return None
    return max(ratio.high / ratio.value - 1, 1 - ratio.low / ratio.value)


def cost_notes(comparison: Comparison) -> list[str]:
    """How to read the ratios, and why some are not there."""
    calls = Counter(call(row.total, comparison.noise) for row in comparison.rows)
    how = (
        "Times are per layer, ratios to the reference (*); ± is the 95 % interval of the ratio. "
        "▲ slower, ▼ faster: the interval is without 1, and the ratio is more than "
        f"{comparison.noise:.1%} away from it."
    )
    notes = [how]
    if calls["not interleaved"]:
        notes.append("~ not timed in turn with the reference: no difference is called.")
    reasons = Counter(row.total.reason for row in comparison.rows if row.total.reason)
    notes += [f"- no ratio in {rows} of these rows: {why}." for why, rows in reasons.items()]
    return notes
