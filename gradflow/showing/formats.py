"""Comparisons, predictions and lists of runs as CSV, JSON and Markdown: all rows, none left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from gradflow.judging.comparison import SPEED_KEYS, ComparedRun, Comparison
from gradflow.judging.outlook import Outlook
from gradflow.judging.trainable import TrainableDepth, trainable_depths
from gradflow.runs.naming import names
from gradflow.runs.records import Summary
from gradflow.runs.results import Results
from gradflow.runs.store import plain
from gradflow.showing.sentences import answer_lines, design_by_design, run_sentence
from gradflow.showing.terminal.many_runs import (
    LISTED_NUMBERS,
    LISTED_TIMES,
    OUTCOME_COLUMNS,
    ComparisonColumn,
    comparison_answer,
    cost_columns,
    cost_notes,
    depth_lines,
    gradient_columns,
    is_timed,
    is_trained,
    listed_cells,
    speed_call,
)
from gradflow.showing.terminal.predictions import (
    PREDICTION_HEADINGS,
    PREDICTION_NOTE,
    prediction_cells,
    reason_lines,
    unit_rows,
)
from gradflow.specs.fields import deciding
from gradflow.specs.model_spec import asked_for
from gradflow.specs.run_options import RunOptions
from gradflow.text import csv_table, escape_markdown, json_text, markdown_table

# Comparisons


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat dictionary per run: identity, summary, ratios, depth that its design can have."""
    depths = {each.design: each for each in trainable_depths(comparison)}
    return [
        _row_as_data(row, comparison.noise) | _depth_as_data(depths.get(row.design))
        for row in comparison.rows
    ]


def _depth_as_data(known: TrainableDepth | None) -> dict[str, float | None]:
    return {
        "trainable_depth": known.depth if known else None,
        "predicted_trainable_depth": known.predicted if known else None,
        "predicted_trainable_depth_at_least": known.predicted_at_least if known else None,
    }


def _row_as_data(row: ComparedRun, noise: float) -> dict[str, Any]:
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
    headings = {field.name: field.name for field in fields(Summary)} | {"loss": "loss_value"}
    summary = {heading: getattr(row.summary, name) for name, heading in headings.items()}
    calls = {
        "time_call": speed_call(row.total, noise),
        "not_ratioed_because": row.total.reason or None,
    }
    return identity | place | summary | _ratios(row) | calls


def _ratios(row: ComparedRun) -> dict[str, float | None]:
    each = {"forward": row.forward, "backward": row.backward, "time": row.total}
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {
        f"{name}_ratio{end}": getattr(ratio, field)
        for name, ratio in each.items()
        for end, field in ends.items()
    }


def comparison_csv(comparison: Comparison) -> str:
    """The rows of a comparison as CSV; cells are empty where a run has no such value."""
    return csv_table(comparison_rows(comparison))


def comparison_json(comparison: Comparison) -> str:
    """One JSON object: the reference, the rows, and what could not be measured."""
    path = comparison.reference.path
    return json_text(
        {
            "reference": path.name if path else None,
            "noise_threshold": comparison.noise,
            "rows": plain(comparison_rows(comparison)),
            "trainable_depths": [asdict(each) for each in trainable_depths(comparison)],
            "failures": list(comparison.failures),
        }
    )


def comparison_markdown(comparison: Comparison) -> str:
    """The tables of the terminal as Markdown with all rows, the answer first."""
    columns, note = gradient_columns(comparison)
    table = _markdown_table(comparison, columns)
    parts = [comparison_answer(comparison), table, [escape_markdown(note)]]
    depths = [f"- {escape_markdown(line)}" for line in depth_lines(comparison)]
    parts += [["Trainable depth:", "", *depths]] if depths else []
    if is_timed(comparison):
        parts.append(_markdown_table(comparison, cost_columns(comparison.noise)))
        parts.append([escape_markdown(note) for note in cost_notes(comparison)])
    if is_trained(comparison):
        parts.append(_markdown_table(comparison, OUTCOME_COLUMNS))
    return "\n".join("\n".join(part) + "\n" for part in parts)


def _markdown_table(comparison: Comparison, columns: Sequence[ComparisonColumn]) -> list[str]:
    headings = ["design", *(column.heading for column in columns)]
    rows = ([row.design, *(column.cell(row) for column in columns)] for row in comparison.rows)
    return list(markdown_table(headings, rows))


# By the name of the option that asks for the format.
COMPARISON_FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "csv": comparison_csv,
    "json": comparison_json,
    "markdown": comparison_markdown,
}


# Predictions


def prediction_json(predicted: Outlook) -> str:
    """One JSON object for one network: spec, verdict, numbers, and its units."""
    return json_text(
        {
            "spec": predicted.spec.to_json(),
            "verdict": predicted.summary.verdict,
            **_predicted_numbers(predicted),
            "layers": unit_rows(predicted),
        }
    )


def _predicted_numbers(predicted: Outlook) -> dict[str, Any]:
    summary, reach = predicted.summary, predicted.reach
    return {
        "total_log10_gain": summary.total_log10_gain,
        "theory_band": predicted.band,
        "log10_gain_per_layer": summary.log10_gain_per_layer,
        "trend": summary.trend,
        "healthy_depth": None if reach is None else reach.depth,
        "healthy_depth_at_least": None if reach is None else reach.at_least,
        "theory_reason": summary.theory_reason,
    }


def _prediction_rows(predicted: Sequence[Outlook]) -> list[dict[str, Any]]:
    """One flat dictionary per network: design, spec, prediction."""
    return [
        {"design": name.design, **each.spec.to_json(), "verdict": each.summary.verdict}
        | _predicted_numbers(each)
        for each, name in zip(predicted, names(predicted), strict=True)
    ]


def predictions_csv(predicted: Sequence[Outlook]) -> str:
    """The predictions as CSV, a row for each network; missing cells are empty."""
    return csv_table(_prediction_rows(predicted))


def predictions_json(predicted: Sequence[Outlook]) -> str:
    """One JSON object with a row for each network."""
    return json_text({"rows": _prediction_rows(predicted)})


def predictions_markdown(predicted: Sequence[Outlook]) -> str:
    """The table of the terminal as Markdown, with its notes."""
    table = markdown_table(PREDICTION_HEADINGS, prediction_cells(predicted))
    return "\n".join([*table, "", PREDICTION_NOTE, *reason_lines(predicted)]) + "\n"


PREDICTION_FORMATS: Mapping[str, Callable[[Sequence[Outlook]], str]] = {
    "csv": predictions_csv,
    "json": predictions_json,
    "markdown": predictions_markdown,
}


# The runs of a results folder


def results_markdown(results: Results) -> str:
    """The answer, and the table of all runs with their sentences, as Markdown."""
    told = map(escape_markdown, answer_lines(results.runs, results.names))
    rows = []
    for run, name in design_by_design(results):
        design, verdict, *numbers = (text.plain for text in listed_cells(run, name, timed=True))
        rows.append((design, verdict, run_sentence(run), *numbers))
    headings = ("run", "verdict", "what it means", *LISTED_NUMBERS, *LISTED_TIMES)
    return "\n".join([*told, "", *markdown_table(headings, rows, left=3)]) + "\n"
