"""Predictions that nobody has measured yet, for the terminal and as data; returned, not printed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradflow.judging.naming import names
from gradflow.judging.outlook import NO_THEORY, Outlook, Reach
from gradflow.runs.summary import Summary
from gradflow.showing.terminal.run_tables import ENDS, STYLES, draw
from gradflow.text import count, markdown_table, number, signed

HEADINGS = ("design", "depth", "verdict", "decades", "per layer", "healthy to")
NOTE = (
    "Predicted, not measured. decades: growth of the gradient norm from output to input, ± what "
    "one seed may differ by. healthy to: the depth up to which it stays in the healthy range."
)


def outlook_view(found: Outlook) -> RenderableType:
    """Everything that `gradflow run --theory-only` shows."""
    spec, summary = found.spec, found.summary
    heading = Text(f"{spec.title}: predicted, not measured", style="bold")
    about = Text(f"{spec.details}, loss {spec.loss}", style="dim")
    if found.prediction.reason is not None:
        return Group(heading, about, Text(f"No theory: {found.prediction.reason}."))
    values = found.prediction.log10_grad_norm or ()
    units = (len(values) - 1) / spec.depth
    curve = [(i / units, value) for i, value in enumerate(values)]
    style = STYLES.get(summary.verdict, "bold red")
    return Group(
        heading,
        about,
        profile_table(found),
        draw([], curve, spec.depth),
        Text.assemble((summary.verdict, style), ". ", summary.advice),
        *map(Text, sentences(found)),
    )


def sentences(found: Outlook) -> Iterator[str]:
    """Gain with its band; how it goes on with depth."""
    summary = found.summary
    yield (
        f"From output to input: {signed(summary.total_log10_gain)} ± {found.band:.2f} decades, "
        f"{signed(summary.log10_gain_per_layer, 4)} per layer."
    )
    if found.reach is not None:
        yield reach_sentence(found.reach)


def reach_sentence(reach: Reach) -> str:
    """The depth at which the gradient leaves the healthy range."""
    if reach.at_least:
        return f"It is healthy to depth {reach.depth:,} at least."
    if reach.depth == 0:
        return "It is healthy at no depth."
    return f"It leaves the healthy range beyond depth {reach.depth:,}."


def profile_table(found: Outlook) -> Table:
    """One row per unit with the band of one seed; the middle of a long stack left out."""
    rows = unit_rows(found)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("layer", "unit", "log10|g|", "low", "high", "act rms", "cosine"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    long = len(rows) > 3 * ENDS
    for row in rows[:ENDS] if long else rows:
        table.add_row(*_cells(row))
    if long:
        table.add_row("…", f"{len(rows) - 2 * ENDS} more", *["…"] * 5, style="dim")
        for row in rows[-ENDS:]:
            table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> Iterator[str]:
    layer, unit, *logs, rms, cosine = row.values()
    yield str(layer)
    yield unit
    for log in logs:
        yield number(log, "+.3f")
    yield number(rms, "#.3g")
    yield f"{cosine:.3f}"


def unit_rows(found: Outlook) -> list[dict[str, Any]]:
    """One dictionary per unit, from the input up; empty without theory."""
    spec, told = found.spec, found.prediction
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


def outlooks_view(found: Sequence[Outlook]) -> RenderableType:
    """Everything that `gradflow compare --theory-only` shows."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        left = heading in ("design", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "design")
    for design, depth, verdict, *numbers in _texts(found):
        style = STYLES.get(verdict, "dim" if verdict == NO_THEORY else "red")
        table.add_row(design, depth, Text(verdict, style=style), *numbers)
    reasons = reason_lines(found)
    return Group(table, Text(NOTE, style="dim"), *(Text(line, style="dim") for line in reasons))


def reason_lines(found: Sequence[Outlook]) -> list[str]:
    """Why there is no theory; reasons that differ in their numbers only are said once."""
    groups: dict[str, list[str]] = {}
    for each in found:
        reason = each.prediction.reason
        if reason is not None:
            groups.setdefault(re.sub(r"[\d.,]+", "#", reason), []).append(reason)
    return [f"No theory in {count(len(g), 'row')}: {g[0]}." for g in groups.values()]


def _texts(found: Sequence[Outlook]) -> Iterator[tuple[str, ...]]:
    """The rows of the table, design by design."""
    called = zip(found, names(found), strict=True)
    for each, name in sorted(called, key=lambda pair: (pair[1].design, pair[1].depth)):
        decades = signed(each.summary.total_log10_gain)
        yield (
            name.without_depth,
            f"{name.depth:,}",
            each.summary.verdict,
            decades if each.band is None else f"{decades} ±{each.band:.2f}",
            signed(each.summary.log10_gain_per_layer, 4),
            "" if each.reach is None else _reach(each.reach),
        )


def _reach(reach: Reach) -> str:
    return f"{reach.depth:,}+" if reach.at_least else f"{reach.depth:,}"


def about(found: Outlook) -> dict[str, Any]:
    """The content of `run --theory-only --json`."""
    return {
        "spec": found.spec.to_json(),
        "verdict": found.summary.verdict,
        **_numbers(found.summary, found),
        "layers": unit_rows(found),
    }


def _numbers(summary: Summary, found: Outlook) -> dict[str, Any]:
    reach = found.reach
    return {
        "total_log10_gain": summary.total_log10_gain,
        "theory_band": found.band,
        "log10_gain_per_layer": summary.log10_gain_per_layer,
        "trend": summary.trend,
        "healthy_depth": None if reach is None else reach.depth,
        "healthy_depth_at_least": None if reach is None else reach.at_least,
        "theory_reason": summary.theory_reason,
    }


def rows_as_data(found: Sequence[Outlook]) -> list[dict[str, Any]]:
    """One flat dictionary per network: design, spec, prediction."""
    return [
        {"design": name.design, **each.spec.to_json(), "verdict": each.summary.verdict}
        | _numbers(each.summary, each)
        for each, name in zip(found, names(found), strict=True)
    ]


def as_json(found: Sequence[Outlook]) -> str:
    """One JSON object."""
    return json.dumps({"rows": rows_as_data(found)}, indent=2, allow_nan=False) + "\n"


def as_csv(found: Sequence[Outlook]) -> str:
    """The rows as CSV; missing cells are empty."""
    rows, text = rows_as_data(found), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(found: Sequence[Outlook]) -> str:
    """The table of the terminal."""
    lines = [*markdown_table(HEADINGS, _texts(found)), "", NOTE, *reason_lines(found)]
    return "\n".join(lines) + "\n"
