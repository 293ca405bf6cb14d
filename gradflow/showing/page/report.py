"""The report: run folders in; a page and pictures out. Nothing is measured here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gradflow.errors import UsageError
from gradflow.runs.results import Results
from gradflow.showing.page.chart_parts import picture_of
from gradflow.showing.page.chart_tables import NamedRuns, chart_tables
from gradflow.showing.page.html_page import ShownRuns, charts_of, render
from gradflow.showing.sentences import design_by_design

MOST_BYTES = 5_000_000
MARK = b'<meta name="generator" content="gradflow'
_MARK_WITHIN = 1_000


@dataclass(frozen=True)
class PageLimits:
    """How many runs a page lists at most, holds the charts of, and draws at first."""

    listed: int = 1_500
    charted: int = 100
    drawn: int = 24

    def halved(self) -> PageLimits:
        """Half as many listed and charted runs, as many drawn ones."""
        return PageLimits(self.listed // 2, self.charted // 2, self.drawn)


def page(results: Results, limits: PageLimits = PageLimits()) -> str:
    """The page, which shows fewer and fewer runs until its HTML is below 5 MB."""
    html = render(results, selection(results, limits))
    return html if len(html.encode()) < MOST_BYTES else page(results, limits.halved())


def selection(results: Results, limits: PageLimits) -> ShownRuns:
    """The runs that a page within these limits shows."""
    runs = design_by_design(results)
    charted = pick(runs, limits.charted)
    return ShownRuns(pick(runs, limits.listed), charted, pick(charted, limits.drawn))


def pick(runs: NamedRuns, most: int) -> NamedRuns:
    """At most `most` runs in the given order: of every verdict, then of each design in turn."""
    if len(runs) <= most:
        return runs
    taken: dict[int, None] = {}
    for places in (_turns(runs, by_design=False)[0], *_turns(runs, by_design=True)):
        new = [place for place in places if place not in taken]
        taken |= dict.fromkeys(_evenly(new, most - len(taken)))
    return [runs[place] for place in sorted(taken)]


def _turns(runs: NamedRuns, *, by_design: bool) -> list[list[int]]:
    """Places of the first run of each verdict (and design), then of the second, and so on."""
    groups: dict[tuple[str, str], list[tuple[int, bool, int]]] = {}
    for place, (run, name) in enumerate(runs):
        # A design shows most at its deepest run; of equal depths a run with times is better.
        rank = (-run.spec.depth, run.summary.forward_s is None, place)
        group = (run.summary.verdict, name.design if by_design else "")
        groups.setdefault(group, []).append(rank)
    ranked = [[place for *_, place in sorted(group)] for group in groups.values()]
    longest = max(map(len, ranked))
    return [[group[i] for group in ranked if i < len(group)] for i in range(longest)]


def _evenly(places: list[int], most: int) -> list[int]:
    if len(places) <= most:
        return places
    return [places[i * len(places) // most] for i in range(most)]


def write_page(results: Results, file: Path) -> None:
    """Write the page, all of it or nothing; only an older report is replaced.

    Raises:
        UsageError: the file cannot be written, or is something other than a report.
    """
    _check_page_file(file)
    text = page(results)
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8", errors="backslashreplace")
        staged.replace(file)
    except OSError as error:
        raise _unwritable(file, error) from None
    finally:
        staged.unlink(missing_ok=True)


def _check_page_file(file: Path) -> None:
    """Make sure, before anything is read, that a page may be written there.

    Raises:
        UsageError: the file lies in a run folder, or is something other than an older report.
    """
    rule = "--out is a new file, or an older report"
    if (file.parent / "run.json").exists():
        raise UsageError(rule, f"{file}, in a run folder", "choose another --out")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and MARK not in _start(file):
            raise UsageError(rule, f"{file}, which is neither", "choose another --out")
    except OSError as error:
        raise _unwritable(file, error) from None


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_MARK_WITHIN)


def _unwritable(file: Path, error: OSError) -> UsageError:
    return UsageError("the file can be written", f"{file} ({error.strerror})", "choose another")


def write_pictures(results: Results, folder: Path, kind: str) -> list[Path]:
    """Write each chart that has something to show as `<folder>/<name>.<kind>`.

    Args:
        results: the runs; as many are drawn as a page draws at first.
        folder: the folder of the pictures, which is made if it does not exist.
        kind: `png` or `svg`.

    Raises:
        UsageError: the folder cannot be written to.
    """
    tables = chart_tables(results, selection(results, PageLimits()).drawn)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in charts_of(results).items():
            table = tables[drawing.table]
            if table[drawing.value].null_count() < len(table):
                file = folder / f"{name}.{kind}"
                picture_of(drawing, table).save(file, ppi=144)
                written.append(file)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return written
