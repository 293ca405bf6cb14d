"""The page as HTML: one file that needs nothing else, made from `page/` by Jinja.

Every text passes Jinja's escaping; data for the script is JSON in which no `<` is left. The page
forbids itself all requests (its content security policy), and only its own two scripts may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import polars as pl
import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gradflow.judging.remarks import oddities
from gradflow.judging.verdicts import VERDICTS
from gradflow.runs.naming import shared
from gradflow.runs.results import Results, StoredRun
from gradflow.showing.page.chart_parts import BAR, CHART_HEIGHT, DARK, LIGHT, Drawing, themed
from gradflow.showing.page.chart_tables import FAR, NamedRuns, chart_tables
from gradflow.showing.page.charts import ALL_CHARTS, CHARTS
from gradflow.showing.sentences import (
    answer,
    designs_through,
    run_sentence,
)
from gradflow.text import count, milliseconds, number, printable, signed
from gradflow.version import __version__

_WARNINGS_SHOWN = 2
_SKIPPED_SHOWN = 20
_ENVIRONMENTS_SHOWN = 6
_ENVIRONMENT = {
    "device_name": "device",
    "device": "kind",
    "threads": "threads",
    "dtype": "number format",
    "torch": "torch",
    "gradflow": "gradflow",
    "python": "Python",
    "platform": "platform",
    "matmul_precision": "matmul precision",
    "tf32": "TF32",
    "deterministic": "deterministic",
    "git": "git commit",
}


@dataclass(frozen=True)
class ShownRuns:
    """The runs that a page lists, those whose charts it holds, and those it draws at first."""

    listed: NamedRuns
    charted: NamedRuns
    drawn: NamedRuns


def render(results: Results, shown: ShownRuns) -> str:
    """The page as HTML, with its scripts, styles and data inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_file("report.html"))
    scripts = [_script(vega()), _script(_file("report.js"))]
    return template.render(
        version=__version__,
        scripts=scripts,
        policy=" ".join(_hash(script) for script in scripts),
        style=Markup(_file("report.css")),
        palettes=(LIGHT, DARK),
        charts=charts_of(results),
        data=_json(_chart_data(results, shown)),
        **words(results, shown),
    )


def charts_of(results: Results) -> dict[str, Drawing]:
    """All charts; without those of training where no run was trained."""
    return ALL_CHARTS if len(results.losses) else CHARTS


def words(results: Results, shown: ShownRuns) -> dict[str, Any]:
    """The texts of the page, by the name that its template has for them."""
    runs, notes = results.runs, oddities(results)
    often = Counter(run.summary.verdict for run in runs)
    order = [*VERDICTS, *sorted(set(often) - set(VERDICTS))]
    return {
        "runs": len(runs),
        "answer": answer(runs),
        "through": designs_through(runs, results.names),
        "shared": shared(runs),
        "measured": _measured(runs),
        "verdicts": [(verdict, often[verdict]) for verdict in order if often[verdict]],
        "known": VERDICTS,
        "rows": list(_table_rows(shown)),
        "timed": any(run.summary.forward_s_per_layer is not None for run in runs),
        "environments": _environments(runs),
        "left_out": list(_left_out(results, shown)),
        "skipped": results.skipped[:_SKIPPED_SHOWN],
        "more_skipped": len(results.skipped) - _SKIPPED_SHOWN,
        "notes": notes[:_SKIPPED_SHOWN],
        "more_notes": len(notes) - _SKIPPED_SHOWN,
    }


def _table_rows(shown: ShownRuns) -> Iterator[dict[str, Any]]:
    """One dictionary per listed run; every number as text and as a value to sort by."""
    charted = {run.number for run, _ in shown.charted}
    drawn = {run.number for run, _ in shown.drawn}
    for run, name in shown.listed:
        yield {
            "number": run.number,
            "name": name.without_depth,
            "folder": run.name,
            "verdict": run.summary.verdict,
            "sentence": run_sentence(run),
            "warnings": run.warnings[:_WARNINGS_SHOWN],
            "charted": run.number in charted,
            "drawn": run.number in drawn,
            "cells": list(_numbers(run)),
        }


def _numbers(run: StoredRun) -> Iterator[tuple[str, float | None]]:
    summary = run.summary
    skip = summary.skip_share
    yield f"{run.spec.depth:,}", run.spec.depth
    yield signed(summary.total_log10_gain), summary.total_log10_gain
    yield signed(summary.log10_gain_per_layer, 4), summary.log10_gain_per_layer
    yield _layers(summary.efolding_layers), summary.efolding_layers
    yield "" if skip is None else f"{skip:.0%}", skip
    yield milliseconds(summary.forward_s_per_layer), summary.forward_s_per_layer
    yield milliseconds(summary.backward_s_per_layer), summary.backward_s_per_layer


def _layers(amount: float | None) -> str:
    return number(amount, ".3g") if amount is None or amount < 100 else f"{amount:,.0f}"


def _measured(runs: tuple[StoredRun, ...]) -> str:
    """The days on which the runs were made, in words; empty if nobody knows."""
    days = sorted({day for run in runs if (day := _day(run.environment.get("start_utc")))})
    if not days:
        return ""
    first, last = (f"{day.day} {day:%B %Y}" for day in (days[0], days[-1]))
    return f"measured on {first}" if first == last else f"measured from {first} to {last}"


def _day(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).replace(tzinfo=None)
    except ValueError:
        return None


def _environments(runs: tuple[StoredRun, ...]) -> dict[str, Any]:
    """The different environments, the most frequent first, and in how many runs each occurs."""
    often = Counter(tuple(_known(run.environment)) for run in runs)
    common = often.most_common(_ENVIRONMENTS_SHOWN)
    lines = zip(_ENVIRONMENT.values(), *(values for values, _ in common), strict=True)
    return {
        "counts": [count(n, "run") for _, n in common],
        "rows": [(title, values) for title, *values in lines],
        "more": len(often) - len(common),
    }


def _known(environment: dict[str, Any]) -> Iterator[str]:
    for name in _ENVIRONMENT:
        value = environment.get(name)
        if name == "git" and isinstance(value, dict):
            changed = " with changes" if value.get("dirty") else ""
            yield f"{printable(value.get('commit'))[:10]}{changed}"
        else:
            yield _plain(value)


def _plain(value: object) -> str:
    if value is None:
        return "unknown"
    return printable(value) if not isinstance(value, bool) else "yes" if value else "no"


def _left_out(results: Results, shown: ShownRuns) -> Iterator[str]:
    """Sentences on the runs and layers that the page leaves out, and where they can be seen."""
    total, listed, charted = len(results.runs), len(shown.listed), len(shown.charted)
    drawn, layers = len(shown.drawn), results.layers_kept
    evenly = "taken in turn from every verdict and design"
    if listed < total:
        yield (
            f"The table lists {listed:,} of {total:,} runs, {evenly}; "
            "gradflow report --markdown FILE lists all of them."
        )
    if charted < total:
        yield f"Charts hold {charted:,} of {total:,} runs, {evenly}."
    if drawn < charted:
        yield (
            f"At first {drawn:,} of {charted:,} runs are drawn, {evenly}; tick the others in the "
            "table to draw them too."
        )
    if any(run.spec.depth > layers for run, _ in shown.charted):
        yield (
            f"Of stacks deeper than {layers} layers, lines show about {layers}: evenly spaced, and "
            "those with the largest and the smallest values."
        )


def _chart_data(results: Results, shown: ShownRuns) -> dict[str, Any]:
    """What the page's script works on: runs, tables by column, and a specification per chart."""
    tables = chart_tables(results, shown.charted)
    return {
        "runs": [
            {"number": run.number, "run": name.run, "design": name.design}
            for run, name in shown.charted
        ],
        "far": FAR,
        "bar": BAR,
        "tables": {
            name: table.drop("run", "design").to_dict(as_series=False)
            for name, table in tables.items()
        },
        "charts": {
            name: _chart_spec(name, _sample(tables[drawing.table], shown))
            for name, drawing in charts_of(results).items()
        },
    }


def _sample(table: pl.DataFrame, shown: ShownRuns) -> pl.DataFrame:
    """One row for each design, unit and depth; drawn designs come first, for the best colours."""
    kinds = [name for name in ("design", "unit", "depth") if name in table.columns]
    drawn = pl.col("design").is_in(list({name.design for _, name in shown.drawn}))
    few = table.unique(kinds, keep="first", maintain_order=True)
    return few.sort(drawn, descending=True, maintain_order=True)


def _chart_spec(name: str, sample: pl.DataFrame) -> dict[str, Any]:
    """A chart without its rows, in colours that the page's style sheet sets."""
    drawing = ALL_CHARTS[name]
    colours = tuple(f"var(--line-{i})" for i in range(len(LIGHT)))
    chart = themed(drawing.draw(drawing, sample), "currentColor", "transparent", colours)
    spec = chart.properties(width="container").to_dict()
    spec.pop("datasets")
    spec |= {"data": {"name": drawing.table}, "autosize": {"type": "fit-x", "contains": "padding"}}
    if not drawing.bars:
        spec["height"] = CHART_HEIGHT
    steered_by = ("table", "title", "columns", "span", "near", "seen", "bars")
    return {"spec": spec} | {name: getattr(drawing, name) for name in steered_by}


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, 0.9 MB (2 s)."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _file(name: str) -> str:
    return (files("gradflow.showing") / "page" / name).read_text(encoding="utf-8")


def _script(text: str) -> Markup:
    # Only `</script` would end a script early; `<\/` means the same in a JavaScript string.
    return Markup(text.replace("</script", "<\\/script").replace("\r", ""))


def _hash(script: Markup) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(value: Any) -> Markup:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return Markup(text)
