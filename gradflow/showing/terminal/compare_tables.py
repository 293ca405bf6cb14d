"""Runs side by side, as `gradflow compare` shows them in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from gradflow.judging.comparison import Comparison
from gradflow.judging.overview import answer, designs_through
from gradflow.judging.trainable import trainable_depths
from gradflow.showing.terminal.compare_columns import (
    TRAINING,
    TRAINING_NOTE,
    ascii_columns,
    cost_columns,
    cost_notes,
    gradient_columns,
)
from gradflow.showing.terminal.compare_layout import table
from gradflow.showing.terminal.printing import in_ascii


def comparison_view(comparison: Comparison, *, drawn: bool = True) -> RenderableType:
    """Everything that `gradflow compare` shows; the answer comes last, where the eye is.

    Args:
        comparison: the runs.
        drawn: with block characters; else the tables are in ASCII.
    """
    written, said = (tuple, str) if drawn else (ascii_columns, in_ascii)
    columns, note = gradient_columns(comparison)
    parts: list[RenderableType] = [
        table(comparison, written(columns)),
        Text(said(note), style="dim"),
    ]
    depths = depth_lines(comparison)
    parts += map(Text, ["", "trainable depth", *depths] if depths else [])
    if is_timed(comparison):
        parts += [Text(), table(comparison, written(cost_columns(comparison.noise)))]
        parts += [Text(said(note), style="dim") for note in cost_notes(comparison)]
    if is_trained(comparison):
        parts += [Text(), table(comparison, written(TRAINING)), Text(TRAINING_NOTE, style="dim")]
    answers = answer_lines(comparison)
    return Group(*parts, Text(), *(Text(line, style="bold") for line in answers))


def is_timed(comparison: Comparison) -> bool:
    """Whether any of the runs has times."""
    return any(row.run.time_records for row in comparison.rows)


def is_trained(comparison: Comparison) -> bool:
    """Whether any of the runs was trained."""
    return any(row.summary.outcome for row in comparison.rows)


def answer_lines(comparison: Comparison) -> list[str]:
    """How many runs let the gradient through, and which designs."""
    runs = [row.run for row in comparison.rows]
    which = designs_through(runs, [row.name for row in comparison.rows])
    return [line for line in (answer(runs), which) if line]


def depth_lines(comparison: Comparison) -> list[str]:
    """How deep each design can be, where it was measured at several depths."""
    return [each.sentence for each in trainable_depths(comparison)]
