"""`gradflow report`: a page, pictures and a table of what is stored; nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gradflow.cli.common import Quiet, say, show_view, write_text

_ResultsFolder = Annotated[Path, typer.Option(help="folder that runs are stored in")]
_Page = Annotated[Path | None, typer.Option("--out", help="the page (report.html in --results)")]
_Png = Annotated[Path | None, typer.Option(metavar="DIR", help="each chart as a PNG there")]
_Svg = Annotated[Path | None, typer.Option(metavar="DIR", help="each chart as an SVG there")]
_Markdown = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="the runs in a Markdown table, - for stdout"),
]


def report_command(
    *,
    results: _ResultsFolder = Path("results"),
    out: _Page = None,
    png: _Png = None,
    svg: _Svg = None,
    markdown: _Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Make one page of the stored runs: verdicts, charts, environment; measures nothing."""
    from gradflow.judging.remarks import oddities
    from gradflow.runs.results import NothingToReadError, read_results
    from gradflow.showing.page import report

    page = results / "report.html" if out is None else out
    try:
        stored = read_results(results)
    except NothingToReadError as error:
        _say_skipped(error.skipped)
        raise
    _say_skipped(stored.skipped)
    for line in oddities(stored):
        say(f"note: {line}", style="yellow")
    report.write_page(stored, page)
    for folder, kind in ((png, "png"), (svg, "svg")):
        if folder is not None:
            report.write_pictures(stored, folder, kind)
    if markdown is not None:
        from gradflow.showing.formats import results_markdown

        write_text(markdown, results_markdown(stored))
    if markdown != "-" and not quiet:
        from gradflow.showing.terminal.many_runs import results_view

        show_view(results_view(stored), numbers_coloured=True, then=f"page: {page}")


def _say_skipped(lines: Sequence[str]) -> None:
    """Say in a line each which folders were not read."""
    for line in lines:
        say(f"gradflow: {line}")
