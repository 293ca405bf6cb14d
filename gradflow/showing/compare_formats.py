"""Runs side by side as CSV, JSON and Markdown: the rows that the terminal shows, all of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from gradflow.judging.comparison import SPEED_KEYS, Comparison, Row
from gradflow.judging.trainable import TrainableDepth, trainable_depths
from gradflow.runs.store import plain
from gradflow.runs.summary import Summary
from gradflow.showing.terminal.compare_columns import (
    TRAINING,
    Column,
    call,
    cost_columns,
    cost_notes,
    gradient_columns,
)
from gradflow.showing.terminal.compare_tables import answer_lines, depth_lines, is_timed, is_trained
from gradflow.specs.fields import deciding
from gradflow.specs.model_spec import asked_for
from gradflow.specs.run_options import RunOptions
from gradflow.text import escape_markdown, markdown_table


def rows_as_data(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat dictionary per run: identity, summary, ratios, depth that its design can have."""
    depths = {each.design: each for each in trainable_depths(comparison)}
    return [
        _row_as_data(row, comparison.noise) | _depth_as_data(depths.get(row.design))
        for row in comparison.rows
    ]


def _depth_as_data(found: TrainableDepth | None) -> dict[str, float | None]:
    return {
        "trainable_depth": found.depth if found else None,
        "predicted_trainable_depth": found.predicted if found else None,
        "predicted_trainable_depth_at_least": found.predicted_at_least if found else None,
    }


def _row_as_data(row: Row, noise: float) -> dict[str, Any]:
    run, options = row.run, row.run.options
    identity = {
        "run": run.path.name if run.path else None,
        "design": row.design,
        "reference": row.is_reference,
        **asked_for(run.spec).to_json(),
        "depth": run.spec.depth,
        **{name: getattr(options, name) for name in deciding(RunOptions, "numbers")},
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
    """The rows as CSV; cells are empty where a run has no such value."""
    rows = rows_as_data(comparison)
    columns = dict.fromkeys(name for row in rows for name in row)  # a stack's, then a model's own
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
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
    columns, note = gradient_columns(comparison)
    table = _markdown_table(comparison, columns)
    parts = [answer_lines(comparison), table, [escape_markdown(note)]]
    depths = [f"- {escape_markdown(line)}" for line in depth_lines(comparison)]
    parts += [["Trainable depth:", "", *depths]] if depths else []
    if is_timed(comparison):
        parts.append(_markdown_table(comparison, cost_columns(comparison.noise)))
        parts.append([escape_markdown(note) for note in cost_notes(comparison)])
    if is_trained(comparison):
        parts.append(_markdown_table(comparison, TRAINING))
    return "\n".join("\n".join(part) + "\n" for part in parts)


def _markdown_table(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    headings = ["design", *(column.heading for column in columns)]
    rows = ([row.design, *(column.cell(row) for column in columns)] for row in comparison.rows)
    return list(markdown_table(headings, rows))
