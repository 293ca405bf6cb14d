"""Predictions of networks that nobody has measured, in the terminal; returned as Rich views."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradflow.judging.outlook import Outlook, Reach
from gradflow.judging.verdicts import verdict_named
from gradflow.runs.naming import names
from gradflow.showing.terminal.one_run import ENDS, draw_profile
from gradflow.showing.terminal.printing import plain_table
from gradflow.text import count, number, signed

PREDICTION_HEADINGS = ("design", "depth", "verdict", "decades", "per layer", "healthy to")
PREDICTION_NOTE = (
    "Predicted, not measured. decades: growth of the gradient norm from output to input, ± what "
    "one seed may differ by. healthy to: the depth up to which it stays in the healthy range."
)


def prediction_view(predicted: Outlook) -> RenderableType:
    """Everything that `gradflow run --theory-only` shows."""
    spec, summary = predicted.spec, predicted.summary
    heading = Text(f"{spec.title}: predicted, not measured", style="bold")
    details = Text(f"{spec.details}, loss {spec.loss}", style="dim")
    if predicted.prediction.reason is not None:
        return Group(heading, details, Text(f"No theory: {predicted.prediction.reason}."))
    values = predicted.prediction.log10_grad_norm or ()
    units = (len(values) - 1) / spec.depth
    curve = [(i / units, value) for i, value in enumerate(values)]
    style = f"bold {verdict_named(summary.verdict).colour}"
    return Group(
        heading,
        details,
        _profile_table(predicted),
        draw_profile([], curve, spec.depth),
        Text.assemble((summary.verdict, style), ". ", summary.advice),
        *map(Text, _sentences(predicted)),
    )


def _sentences(predicted: Outlook) -> Iterator[str]:
    """The predicted gain with the band of one seed, and the depth that theory calls healthy."""
    summary = predicted.summary
    yield (
        f"From output to input: {signed(summary.total_log10_gain)} ± {predicted.band:.2f} decades, "
        f"{signed(summary.log10_gain_per_layer, 4)} per layer."
    )
    if predicted.reach is not None:
        yield _reach_sentence(predicted.reach)


def _reach_sentence(reach: Reach) -> str:
    if reach.at_least:
        return f"It is healthy to depth {reach.depth:,} at least."
    if reach.depth == 0:
        return "It is healthy at no depth."
    return f"It leaves the healthy range beyond depth {reach.depth:,}."


def _profile_table(predicted: Outlook) -> Table:
    """One row per unit with the band of one seed; the middle of a long stack left out."""
    rows = unit_rows(predicted)
    table = plain_table()
    for heading in ("layer", "unit", "log10|g|", "low", "high", "act rms", "cosine"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    long = len(rows) > 3 * ENDS
    for row in rows[:ENDS] if long else rows:
        table.add_row(*_unit_cells(row))
    if long:
        table.add_row("…", f"{len(rows) - 2 * ENDS} more", *["…"] * 5, style="dim")
        for row in rows[-ENDS:]:
            table.add_row(*_unit_cells(row))
    return table


def _unit_cells(row: dict[str, Any]) -> Iterator[str]:
    layer, unit, *logs, rms, cosine = row.values()
    yield str(layer)
    yield unit
    for log in logs:
        yield number(log, "+.3f")
    yield number(rms, "#.3g")
    yield f"{cosine:.3f}"


def unit_rows(predicted: Outlook) -> list[dict[str, Any]]:
    """One dictionary per unit, from the input up, keyed by columns of `layers.csv`; or none."""
    spec, told = predicted.spec, predicted.prediction
    places = [(0, "input")]
    places += [(layer, unit) for layer in range(1, spec.depth + 1) for unit in spec.kind.units]
    columns = zip(told.log10_grad_norm or (), told.band(), told.act_rms, told.act_cos, strict=True)
    return [
        {
            "layer": layer,
            "unit": unit,
            "theory_log10_grad_norm": value,
            "theory_log10_grad_norm_low": low,
            "theory_log10_grad_norm_high": high,
            "act_rms": rms,
            "act_cos": cosine,
        }
        for (layer, unit), (value, (low, high), rms, cosine) in zip(places, columns, strict=False)
    ]


def predictions_view(predicted: Sequence[Outlook]) -> RenderableType:
    """Everything that `gradflow compare --theory-only` shows."""
    table = plain_table()
    for heading in PREDICTION_HEADINGS:
        left = heading in ("design", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "design")
    for design, depth, verdict, *numbers in prediction_cells(predicted):
        style = verdict_named(verdict).colour
        table.add_row(design, depth, Text(verdict, style=style), *numbers)
    notes = (PREDICTION_NOTE, *reason_lines(predicted))
    return Group(table, *(Text(line, style="dim") for line in notes))


def reason_lines(predicted: Sequence[Outlook]) -> list[str]:
    """Why theory has no answer; reasons that differ in their numbers only are said once."""
    groups: dict[str, list[str]] = {}
    for each in predicted:
        reason = each.prediction.reason
        if reason is not None:
            groups.setdefault(re.sub(r"[\d.,]+", "#", reason), []).append(reason)
    return [f"No theory in {count(len(g), 'row')}: {g[0]}." for g in groups.values()]


def prediction_cells(predicted: Sequence[Outlook]) -> Iterator[tuple[str, ...]]:
    """The cells under `PREDICTION_HEADINGS`, a row for each network, design by design."""
    called = zip(predicted, names(predicted), strict=True)
    for each, name in sorted(called, key=lambda pair: (pair[1].design, pair[1].depth)):
        decades = signed(each.summary.total_log10_gain)
        yield (
            name.without_depth,
            f"{name.depth:,}",
            each.summary.verdict,
            decades if each.band is None else f"{decades} ±{each.band:.2f}",
            signed(each.summary.log10_gain_per_layer, 4),
            "" if each.reach is None else f"{each.reach.depth:,}{'+' * each.reach.at_least}",
        )
