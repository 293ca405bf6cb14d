"""Many runs in the terminal: side by side against a reference, or as the list of a results folder.

The columns of a comparison are tables of `ComparisonColumn`; files in other formats take them too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradflow.judging.comparison import ComparedRun, Comparison, Ratio
from gradflow.judging.remarks import theory_cell
from gradflow.judging.trainable import trainable_depths
from gradflow.judging.training_outcome import outcome_sentence
from gradflow.judging.verdicts import verdict_named
from gradflow.runs.naming import RunName
from gradflow.runs.records import Summary
from gradflow.runs.results import Results, StoredRun
from gradflow.showing.sentences import answer_lines, design_by_design
from gradflow.showing.terminal.printing import plain_table
from gradflow.text import BARS, gib, in_ascii, milliseconds, number, signed, two_digits

_WIDTH = 80
_PROFILE_CELLS = 8
_MARKS = {"slower": "▲", "faster": "▼", "not interleaved": "~"}
# Comparisons with more rows are shown by their two ends; so are longer lists of results.
_MOST_COMPARED, _ENDS = 40, 15
_MOST_LISTED = 30


# The columns of a comparison


@dataclass(frozen=True)
class ComparisonColumn:
    """One column: its heading, the text of a cell, and whether it is aligned left."""

    heading: str
    cell: Callable[[ComparedRun], str]
    left: bool = False


def _depth(row: ComparedRun) -> str:
    return f"{row.depth}{'*' if row.is_reference else ' '}"


def _short(value: float | None, digits: str, widest: int = 8) -> str:
    """A number by its format, or in powers of ten where that would be too wide."""
    if value is None:
        return ""
    text = format(value, digits)
    return text if len(text) <= widest else f"{value:.0e}"


def _rate(row: ComparedRun) -> str:
    rate, high = row.summary.log10_gain_per_layer, row.summary.log10_gain_per_layer_high
    if rate is None:
        return ""
    decimals = 4 if abs(rate) < 1 else 2
    half = "" if high is None else f" ±{_short(high - rate, f'.{decimals}f', 7)}"
    return _short(rate, f"+.{decimals}f") + half


def _efolding(row: ComparedRun) -> str:
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
    cells = min(_PROFILE_CELLS, len(profile))
    stretches = [
        profile[i * len(profile) // cells : (i + 1) * len(profile) // cells] for i in range(cells)
    ]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = min(finite, default=0.0), max([1.0, *(m - min(finite) for m in finite)])
    return "".join(_bar((mean - low) / span) for mean in means)


def _bar(height: float) -> str:
    return BARS[min(int(height * len(BARS)), len(BARS) - 1)] if math.isfinite(height) else "·"


_GRADIENT_COLUMNS = (
    ComparisonColumn("depth", _depth),
    ComparisonColumn("verdict", lambda row: row.summary.verdict, left=True),
    ComparisonColumn("decades", lambda row: _short(row.summary.total_log10_gain, "+.2f")),
    ComparisonColumn("per layer ±", _rate),
    ComparisonColumn("e-fold", _efolding),
    ComparisonColumn("skip", lambda row: _short(row.summary.skip_share, ".0%", 4)),
    ComparisonColumn("dW", lambda row: _short(row.summary.param_grad_spread, ".1f", 6)),
    ComparisonColumn("profile", lambda row: sparkline(row.profile), left=True),
)
_GRADIENT_NOTE = (
    "decades: growth of the gradient norm from output to input, in all and per layer with its "
    "95 % interval. e-fold: layers for a factor e. skip: share that comes through the shortcuts. "
    "dW: decades between the largest and the smallest parameter gradient. profile: log |gradient| "
    "from the input to the output."
)
_THEORY_COLUMN = ComparisonColumn("theory", lambda row: theory_cell(row.summary))
_THEORY_NOTE = " theory: decades above what theory predicts, ! where that is beyond its band."


def gradient_columns(comparison: Comparison) -> tuple[tuple[ComparisonColumn, ...], str]:
    """The columns of the gradient and their note; theory where any run has been held against it."""
    reference = next(row for row in comparison.rows if row.is_reference)
    note = f"* the reference: {reference.name.run}. {_GRADIENT_NOTE}"
    if not any(row.summary.theory_deviation is not None for row in comparison.rows):
        return _GRADIENT_COLUMNS, note
    *columns, profile = _GRADIENT_COLUMNS
    return (*columns, _THEORY_COLUMN, profile), note + _THEORY_NOTE


OUTCOME_COLUMNS = (
    ComparisonColumn("depth", _depth),
    ComparisonColumn("outcome", lambda row: _outcome(row.summary), left=True),
    ComparisonColumn("loss", lambda row: _short(row.summary.final_loss, ".3f")),
    ComparisonColumn("floor", lambda row: _short(row.summary.loss_floor, ".3f")),
    ComparisonColumn("chance", lambda row: _short(row.summary.loss_chance, ".3f")),
    ComparisonColumn("closed", lambda row: _short(row.summary.gap_closed, ".0%", 6)),
)
_OUTCOME_NOTE = (
    "loss: cross-entropy in nats, mean over the last tenth of the steps. floor: the smallest that "
    "there is. chance: the smallest without looking at the input. closed: part of the way from "
    "chance to the floor. All else is of the first step."
)


def _outcome(summary: Summary) -> str:
    return outcome_sentence(summary.outcome, summary.outcome_step) if summary.outcome else ""


def cost_columns(noise: float) -> tuple[ComparisonColumn, ...]:
    """What each run costs per layer, and the ratio to the reference."""
    return (
        ComparisonColumn("depth", _depth),
        ComparisonColumn("fwd ms", lambda row: _milliseconds(row.summary.forward_s_per_layer)),
        ComparisonColumn("ratio ±", lambda row: ratio_cell(row.forward, noise)),
        ComparisonColumn("bwd ms", lambda row: _milliseconds(row.summary.backward_s_per_layer)),
        ComparisonColumn("ratio ±", lambda row: ratio_cell(row.backward, noise)),
        ComparisonColumn("peak", _peak),
    )


def _peak(row: ComparedRun) -> str:
    return gib(row.summary.peak_bytes) if row.summary.peak_bytes else ""


def ratio_cell(ratio: Ratio, noise: float) -> str:
    """A ratio, half its interval in percent, and the mark of what may be said of it."""
    if ratio.value is None:
        return "-  "
    if (ratio.value, ratio.low, ratio.high) == (1, 1, 1):
        return "1  "
    half = _half_width(ratio)
    interval = "" if half is None else f" ±{half:.0%}" if half < 1 else " ±99+%"
    return f"{number(ratio.value, '.2f')}{interval} {_MARKS.get(speed_call(ratio, noise), ' ')}"


def speed_call(ratio: Ratio, noise: float) -> str:
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
    """How to read the ratios, and why some of them are missing."""
    calls = Counter(speed_call(row.total, comparison.noise) for row in comparison.rows)
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


# The view of a comparison


def comparison_view(comparison: Comparison, *, drawn: bool = True) -> RenderableType:
    """Everything that `gradflow compare` shows; the answer comes last, where the eye is.

    Args:
        comparison: the runs.
        drawn: with block characters; else the tables are in ASCII.
    """
    write = str if drawn else in_ascii
    columns, note = gradient_columns(comparison)
    parts = [design_table(comparison, columns, write), Text(write(note), style="dim")]
    depths = depth_lines(comparison)
    parts += map(Text, ["", "trainable depth", *depths] if depths else [])
    if is_timed(comparison):
        parts += [Text(), design_table(comparison, cost_columns(comparison.noise), write)]
        parts += [Text(write(note), style="dim") for note in cost_notes(comparison)]
    if is_trained(comparison):
        parts += [Text(), design_table(comparison, OUTCOME_COLUMNS, write)]
        parts += [Text(_OUTCOME_NOTE, style="dim")]
    answers = comparison_answer(comparison)
    return Group(*parts, Text(), *(Text(line, style="bold") for line in answers))


def is_timed(comparison: Comparison) -> bool:
    """Whether any of the runs has times."""
    return any(row.run.time_records for row in comparison.rows)


def is_trained(comparison: Comparison) -> bool:
    """Whether any of the runs was trained."""
    return any(row.summary.outcome for row in comparison.rows)


def comparison_answer(comparison: Comparison) -> list[str]:
    """How many of the compared runs let the gradient through, and which designs."""
    rows = comparison.rows
    return answer_lines([row.run for row in rows], [row.name for row in rows])


def depth_lines(comparison: Comparison) -> list[str]:
    """How deep each design can be, where it was measured at several depths."""
    return [each.sentence for each in trainable_depths(comparison)]


def design_table(
    comparison: Comparison,
    columns: Sequence[ComparisonColumn],
    write: Callable[[str], str] = str,
) -> Text:
    """Rows by design, each on one line of at most 80 characters; `write` changes texts.

    The name of a design stands beside its rows, folded over them; where it does not fit there, on
    lines of its own above. The middle of a long table is left out, and counted.
    """
    rows = comparison.rows
    head, tail = (rows, ()) if len(rows) <= _MOST_COMPARED else (rows[:_ENDS], rows[-_ENDS:])
    layout = _Layout.fitting(columns, [*head, *tail], write)
    lines = [layout.heading(), *_grouped(layout, head)]
    if tail:
        left_out = rows[len(head) : len(rows) - len(tail)]
        lines += [Text(_elided(left_out), style="dim"), *_grouped(layout, tail)]
    return Text("\n").join(lines)


def _elided(rows: Sequence[ComparedRun]) -> str:
    verdicts = Counter(row.summary.verdict for row in rows).most_common()
    counted = ", ".join(f"{amount} {verdict}" for verdict, amount in verdicts)
    return f"… {len(rows):,} more: {counted}; --csv - has them all"


def _grouped(layout: _Layout, rows: Sequence[ComparedRun]) -> Iterator[Text]:
    for _, group in groupby(rows, key=attrgetter("design")):
        yield from layout.group(list(group))


@dataclass(frozen=True)
class _Layout:
    """The places of a table. `room` is the width of the names; if 0, names stand above rows."""

    columns: Sequence[ComparisonColumn]
    write: Callable[[str], str]
    widths: Sequence[int]
    room: int

    @classmethod
    def fitting(
        cls,
        columns: Sequence[ComparisonColumn],
        rows: Sequence[ComparedRun],
        write: Callable[[str], str],
    ) -> _Layout:
        """A layout with the names beside their rows where all of them fit there."""
        texts = [[c.heading, *(c.cell(row) for row in rows)] for c in columns]
        widths = [max(len(write(text)) for text in column) for column in texts]
        room = _WIDTH - sum(widths) - len(widths)
        groups = [list(group) for _, group in groupby(rows, key=attrgetter("design"))]
        folded = [_fold(group[0].design, room) for group in groups]
        longest = max(len(line) for name in folded for line in name)
        fits = all(len(name) <= len(group) for name, group in zip(folded, groups, strict=True))
        beside = max(longest, len("design")) if fits and longest <= room else 0
        return cls(columns, write, widths, beside)

    def heading(self) -> Text:
        """The line with the names of the columns."""
        return Text(self._line("design", [c.heading for c in self.columns]), style="bold")

    def group(self, rows: Sequence[ComparedRun]) -> Iterator[Text]:
        """The lines of the rows of one design."""
        name = _fold(rows[0].design, self.room or _WIDTH)
        if not self.room:
            yield from map(Text, name)
            name = []
        for i, row in enumerate(rows):
            beside = name[i] if i < len(name) else ""
            line = Text(self._line(beside, [column.cell(row) for column in self.columns]))
            line.highlight_words([row.summary.verdict], verdict_named(row.summary.verdict).colour)
            line.highlight_words([_MARKS["slower"], _MARKS["faster"]], "bold")
            yield line

    def _line(self, name: str, cells: Sequence[str]) -> str:
        placed = [
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(
                map(self.write, cells), self.widths, self.columns, strict=True
            )
        ]
        return " ".join([name.ljust(self.room)] * bool(self.room) + placed).rstrip()


def _fold(name: str, room: int) -> list[str]:
    """The lines of a folded name; phrases such as `no norm` stay whole if the room allows it."""
    for text in (name.replace(" ", "\xa0").replace(",\xa0", ", "), name):
        lines = wrap(text, max(room, 1), break_on_hyphens=False, break_long_words=room >= _WIDTH)
        if max(map(len, lines)) <= room:
            break
    return [line.replace("\xa0", " ") for line in lines]


# The list of a results folder

LISTED_NUMBERS = ("depth", "decades", "per layer")
LISTED_TIMES = ("fwd ms", "bwd ms")


def results_view(results: Results) -> RenderableType:
    """Everything that `gradflow report` shows in the terminal."""
    said, *more = answer_lines(results.runs, results.names)
    table = _runs_table(design_by_design(results))
    return Group(Text(said, style="bold"), *map(Text, more), Text(), table)


def _runs_table(rows: Sequence[tuple[StoredRun, RunName]]) -> Table:
    """One row per run, within 80 columns; the middle of a long list left out."""
    timed = any(run.summary.forward_s_per_layer is not None for run, _ in rows)
    table = plain_table()
    table.add_column("run", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for heading in (*LISTED_NUMBERS, *(LISTED_TIMES if timed else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    ends = len(rows) if len(rows) <= _MOST_LISTED else _MOST_LISTED // 2
    for run, name in rows[:ends]:
        table.add_row(*listed_cells(run, name, timed))
    if ends < len(rows):
        table.add_row(f"… {len(rows) - 2 * ends:,} more", style="dim")
        for run, name in rows[-ends:]:
            table.add_row(*listed_cells(run, name, timed))
    return table


def listed_cells(run: StoredRun, name: RunName, timed: bool) -> Iterator[Text]:
    """The cells of one run in the list: design, verdict, numbers, and times where `timed`."""
    summary = run.summary
    yield Text(name.without_depth)
    yield Text(summary.verdict, style=verdict_named(summary.verdict).colour)
    yield Text(f"{name.depth:,}")
    yield Text(signed(summary.total_log10_gain))
    yield Text(signed(summary.log10_gain_per_layer, 4))
    if timed:
        yield Text(milliseconds(summary.forward_s_per_layer))
        yield Text(milliseconds(summary.backward_s_per_layer))
