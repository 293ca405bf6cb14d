"""Runs side by side: Rich tables for the terminal, and the same rows as CSV, JSON, Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from operator import attrgetter
from textwrap import wrap
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from gradflow import markdown
from gradflow.comparison import SPEED_KEYS, Comparison, Ratio, Row
from gradflow.model_spec import asked_for
from gradflow.outcome import outcome_sentence
from gradflow.overview import STYLES, answer, designs_through
from gradflow.records import Summary
from gradflow.spec import TRAINING as TRAINING_OPTIONS
from gradflow.store import plain
from gradflow.theory_words import theory_cell
from gradflow.trainable import TrainableDepth, trainable_depths
from gradflow.units import gib, milliseconds, number, rounded

WIDTH = 80
# Longer tables are shown by their two ends.
MOST_ROWS, ENDS = 40, 15
BARS = "▁▂▃▄▅▆▇█"
PROFILE_CELLS = 8
MARKS = {"slower": "▲", "faster": "▼", "not interleaved": "~"}


@dataclass(frozen=True)
class Column:
    """One column: its heading, the text of a cell, and whether it is aligned left."""

    heading: str
    cell: Callable[[Row], str]
    left: bool = False


def comparison_view(comparison: Comparison) -> RenderableType:
    """Everything that `gradflow compare` shows; the answer comes last, where the eye is."""
    columns, note = gradient_columns(comparison)
    parts: list[RenderableType] = [table(comparison, columns), Text(note, style="dim")]
    depths = depth_lines(comparison)
    parts += map(Text, ["", "trainable depth", *depths] if depths else [])
    if _timed(comparison):
        parts += [Text(), table(comparison, cost_columns(comparison.noise))]
        parts += [Text(note, style="dim") for note in cost_notes(comparison)]
    if _trained(comparison):
        parts += [Text(), table(comparison, TRAINING), Text(TRAINING_NOTE, style="dim")]
    answers = answer_lines(comparison)
    return Group(*parts, Text(), *(Text(line, style="bold") for line in answers))


def _timed(comparison: Comparison) -> bool:
    return any(row.run.time_records for row in comparison.rows)


def _trained(comparison: Comparison) -> bool:
    return any(row.summary.outcome for row in comparison.rows)


def answer_lines(comparison: Comparison) -> list[str]:
    """How many runs let the gradient through, and which designs."""
    runs = [row.run for row in comparison.rows]
    which = designs_through(runs, [row.name for row in comparison.rows])
    return [line for line in (answer(runs), which) if line]


def depth_lines(comparison: Comparison) -> list[str]:
    """How deep each design can be, where it was measured at several depths."""
    return [each.sentence for each in trainable_depths(comparison)]


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
    return rounded(layers)


def _milliseconds(seconds: float | None) -> str:
    text = milliseconds(seconds)
    return text if seconds is None or len(text) <= 7 else f"{seconds * 1e3:.0e}"


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
    if not any(row.summary.theory_deviation is not None for row in comparison.rows):
        return GRADIENT, GRADIENT_NOTE
    *columns, profile = GRADIENT
    return (*columns, THEORY, profile), GRADIENT_NOTE + THEORY_NOTE


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
    reference = next(row for row in comparison.rows if row.is_reference)
    how = (
        f"* the reference: {reference.name.run}. Times are per layer; ± is the 95 % interval of "
        "the ratio. ▲ slower, ▼ faster: the interval is without 1, and the ratio is more than "
        f"{comparison.noise:.1%} away from it."
    )
    notes = [how]
    if calls["not interleaved"]:
        notes.append("~ not timed in turn with the reference: no difference is called.")
    reasons = Counter(row.total.reason for row in comparison.rows if row.total.reason)
    notes += [f"- no ratio in {rows} of these rows: {why}." for why, rows in reasons.items()]
    return notes


def table(comparison: Comparison, columns: Sequence[Column]) -> Text:
    """Rows by design, each on one line of at most 80 characters.

    The name of a design stands beside its rows, folded over them; where it does not fit there, on
    lines of its own above. The middle of a long table is left out, and counted.
    """
    head, tail = _ends(comparison.rows)
    layout = _Layout.fitting(columns, [*head, *tail])
    lines = [layout.heading(), *_grouped(layout, head)]
    if tail:
        left_out = comparison.rows[len(head) : len(comparison.rows) - len(tail)]
        lines += [Text(_elided(left_out), style="dim"), *_grouped(layout, tail)]
    return Text("\n").join(lines)


def _ends(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    return (rows, ()) if len(rows) <= MOST_ROWS else (rows[:ENDS], rows[-ENDS:])


def _elided(rows: Sequence[Row]) -> str:
    verdicts = Counter(row.summary.verdict for row in rows).most_common()
    counted = ", ".join(f"{number_of} {verdict}" for verdict, number_of in verdicts)
    return f"… {len(rows):,} more: {counted}; --csv - has them all"


def _grouped(layout: _Layout, rows: Sequence[Row]) -> Iterator[Text]:
    for _, group in groupby(rows, key=attrgetter("design")):
        yield from layout.group(list(group))


@dataclass(frozen=True)
class _Layout:
    """Where things stand in a table. `room` is the width of the names; 0: they stand above."""

    columns: Sequence[Column]
    widths: Sequence[int]
    room: int

    @classmethod
    def fitting(cls, columns: Sequence[Column], rows: Sequence[Row]) -> _Layout:
        """Names beside their rows where all of them fit there."""
        texts = [[c.heading, *(c.cell(row) for row in rows)] for c in columns]
        widths = [max(map(len, column)) for column in texts]
        room = WIDTH - sum(widths) - len(widths)
        groups = [list(group) for _, group in groupby(rows, key=attrgetter("design"))]
        folded = [_fold(group[0].design, room) for group in groups]
        longest = max(len(line) for name in folded for line in name)
        fits = all(len(name) <= len(group) for name, group in zip(folded, groups, strict=True))
        return cls(columns, widths, max(longest, len("design")) if fits and longest <= room else 0)

    def heading(self) -> Text:
        """The names of the columns."""
        return Text(self._line("design", [c.heading for c in self.columns]), style="bold")

    def group(self, rows: Sequence[Row]) -> Iterator[Text]:
        """The lines of one design."""
        name = _fold(rows[0].design, self.room or WIDTH)
        if not self.room:
            yield from map(Text, name)
            name = []
        for i, row in enumerate(rows):
            beside = name[i] if i < len(name) else ""
            line = Text(self._line(beside, [column.cell(row) for column in self.columns]))
            line.highlight_words([row.summary.verdict], STYLES.get(row.summary.verdict, "red"))
            line.highlight_words([MARKS["slower"], MARKS["faster"]], "bold")
            yield line

    def _line(self, name: str, cells: Sequence[str]) -> str:
        placed = [
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(cells, self.widths, self.columns, strict=True)
        ]
        return " ".join([name.ljust(self.room)] * bool(self.room) + placed).rstrip()


def _fold(name: str, room: int) -> list[str]:
    """The name in lines; its phrases (`no norm`) stay whole if they can."""
    for text in (name.replace(" ", "\xa0").replace(",\xa0", ", "), name):
        lines = wrap(text, max(room, 1), break_on_hyphens=False, break_long_words=room >= WIDTH)
        if max(map(len, lines)) <= room:
            break
    return [line.replace("\xa0", " ") for line in lines]


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


def rows_as_data(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat dictionary per run: identity, summary, ratios, depth that its design can have."""
    depths = {each.design: each for each in trainable_depths(comparison)}
    return [
        _row_as_data(row, comparison.noise) | _depth_as_data(depths.get(row.design))
        for row in comparison.rows
    ]


def _depth_as_data(found: TrainableDepth | None) -> dict[str, float | None]:
    names = {
        "trainable_depth": "depth",
        "predicted_trainable_depth": "predicted",
        "predicted_trainable_depth_at_least": "predicted_at_least",
    }
    return {name: getattr(found, field, None) for name, field in names.items()}


def _row_as_data(row: Row, noise: float) -> dict[str, Any]:
    run, options = row.run, row.run.options
    identity = {
        "run": run.path.name if run.path else None,
        "design": row.design,
        "reference": row.is_reference,
        **asked_for(run.spec).to_json(),
        "depth": run.spec.depth,
        "seed": options.seed,
        "seeds": options.seeds,
        "raw_range": options.raw_range,
        "compile": options.compile,
        **{name: getattr(options, name) for name in ("steps", *TRAINING_OPTIONS)},
    }
    place = {key: run.environment.get(key) for key in SPEED_KEYS if key not in identity}
    # The spec names its kind of loss, the summary the value that it took.
    names = {field.name: field.name for field in fields(Summary)} | {"loss": "loss_value"}
    summary = {names[name]: getattr(row.summary, name) for name in names}
    calls = {"time_call": call(row.total, noise), "not_ratioed_because": row.total.reason or None}
    return identity | place | summary | _ratios(row) | calls


def _ratios(row: Row) -> dict[str, float | None]:
    each = {"forward": row.forward, "backward": row.backward, "time": row.total}
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {
        f"{name}_ratio{end}": getattr(ratio, field)
        for name, ratio in each.items()
        for end, field in ends.items()
    }


def as_csv(comparison: Comparison) -> str:
    """The rows as CSV; missing cells are empty."""
    rows = rows_as_data(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """One JSON object: the reference, the rows, and what could not be measured."""
    path = comparison.reference.path
    content = {
        "reference": path.name if path else None,
        "noise_threshold": comparison.noise,
        "rows": plain(rows_as_data(comparison)),
        "trainable_depths": [asdict(each) for each in trainable_depths(comparison)],
        "failures": list(comparison.failures),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """The terminal tables with all rows, the answer first."""
    columns, _ = gradient_columns(comparison)
    parts = [answer_lines(comparison), _markdown_table(comparison, columns)]
    depths = [f"- {markdown.escaped(line)}" for line in depth_lines(comparison)]
    parts += [["Trainable depth:", "", *depths]] if depths else []
    if _timed(comparison):
        parts.append(_markdown_table(comparison, cost_columns(comparison.noise)))
        parts.append([markdown.escaped(note) for note in cost_notes(comparison)])
    if _trained(comparison):
        parts.append(_markdown_table(comparison, TRAINING))
    return "\n".join("\n".join(part) + "\n" for part in parts)


def _markdown_table(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    headings = ["design", *(column.heading for column in columns)]
    rows = ([row.design, *(column.cell(row) for column in columns)] for row in comparison.rows)
    return list(markdown.table(headings, rows))
