"""`gradflow report`: a page, pictures and a table of what is stored; nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gradflow.cli.common import Quiet, say, write_text

Results = Annotated[Path, typer.Option(help="folder that runs are stored in")]
Page = Annotated[Path | None, typer.Option("--out", help="the page (report.html in --results)")]
Png = Annotated[Path | None, typer.Option(metavar="DIR", help="each chart as a PNG there")]
Svg = Annotated[Path | None, typer.Option(metavar="DIR", help="each chart as an SVG there")]
Markdown = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="the runs in a Markdown table, - for stdout"),
]


def report(
    *,
    results: Results = Path("results"),
    out: Page = None,
    png: Png = None,
    svg: Svg = None,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Make one page of the stored runs: verdicts, charts, environment; measures nothing."""
    from gradflow.runs.reading import NothingToReadError, read_results
    from gradflow.showing.page import report

    page = results / "report.html" if out is None else out
    try:
        found = read_results(results)
    except NothingToReadError as error:
        say_skipped(error.skipped)
        raise
    say_skipped(found.skipped)
    for line in found.notes:
        say(f"note: {line}", style="yellow")
    report.write_page(found, page)
    for folder, kind in ((png, "png"), (svg, "svg")):
        if folder is not None:
            report.write_pictures(found, folder, kind)
    if markdown is not None:
        from gradflow.showing.formats import results_markdown

        write_text(markdown, results_markdown(found))
    if markdown != "-" and not quiet:
        from rich.console import Console

        from gradflow.showing.terminal.many_runs import results_view
        from gradflow.showing.terminal.printing import print_view

        console = Console()
        print_view(results_view(found), console)
        console.print(f"page: {page}", soft_wrap=True, markup=False, highlight=False)


def say_skipped(lines: Sequence[str]) -> None:
    """What was not read."""
    for line in lines:
        say(f"gradflow: {line}")
