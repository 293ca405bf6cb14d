"""`gradflow compare`: a grid, measured where it is not stored yet, or stored runs, side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradflow.cli.common import (
    Json,
    Out,
    Plain,
    Quiet,
    Residual,
    RunFolders,
    Targets,
    check_target,
    load_runs,
    progress_bar,
    say,
    say_notes,
    shortcuts,
    show_view,
    write_targets,
)
from gradflow.cli.options import with_fields
from gradflow.cli.theory_only import TheoryOnly, predict_grid
from gradflow.errors import MeasurementError, RunFolderError, UsageError
from gradflow.specs.fields import check_choice
from gradflow.specs.grid import DEFAULT_GRID, EXECUTORS, Cell, Grid, expand
from gradflow.specs.requests import MODEL_FIELDS, STACK_FIELDS
from gradflow.text import can_draw, count

if TYPE_CHECKING:
    from gradflow.judging.comparison import Comparison
    from gradflow.runs.records import Run
    from gradflow.sweeps.sweep import Sweep

_Fresh = Annotated[bool, typer.Option("--fresh", help="measure anew what is stored already")]
_Reference = Annotated[
    str | None,
    typer.Option(
        help="what times are divided by: number of the cell, or run folder  [default: 1]",
        metavar="N|FOLDER",
    ),
]
_ExecutorName = Annotated[
    str, typer.Option("--executor", help=f"{', '.join(EXECUTORS)}", metavar="NAME")
]
_Workers = Annotated[int | None, typer.Option(help="worker processes (one per core or GPU)", min=1)]
_Address = Annotated[str | None, typer.Option(help="of a running Ray cluster")]
_Noise = Annotated[float, typer.Option(help="ratios nearer to 1 than this are no difference")]
_Csv = Annotated[
    str | None, typer.Option("--csv", metavar="FILE", help="the rows as CSV (- stdout)")
]
_Markdown = Annotated[
    str | None, typer.Option("--markdown", metavar="FILE", help="the tables as Markdown (- stdout)")
]


@dataclass(frozen=True)
class _ChosenExecutor:
    """The executor that a person asked for: its name, worker processes, address of a cluster."""

    name: str
    workers: int | None
    address: str | None


@with_fields(lists=True)
def compare_command(
    given: dict[str, Any],
    *,
    runs: RunFolders = None,
    residual: Residual = False,
    plain: Plain = False,
    theory_only: TheoryOnly = False,
    reference: _Reference = None,
    fresh: _Fresh = False,
    executor: _ExecutorName = "auto",
    workers: _Workers = None,
    address: _Address = None,
    noise: _Noise = 0.01,
    out: Out = Path("results"),
    csv: _Csv = None,
    markdown: _Markdown = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compare designs side by side: options take lists, joined by commas. Bare: the seed grid."""
    if named := shortcuts(given, residual, plain):
        given["shortcut"] = named
    targets = {"csv": csv, "markdown": markdown, "json": json}
    _check_request(runs, bool(given) or theory_only, targets, noise)
    if theory_only:
        predict_grid(_make_grid(given), targets, quiet=quiet)
        return
    if runs:
        measured: Sequence[Run | None] = load_runs(runs)
        failures: list[str] = []
    else:
        grid = _make_grid(given)
        _check_reference(reference, grid)
        chosen = _ChosenExecutor(executor, workers, address)
        done = _measure_grid(grid, out, chosen, fresh=fresh, quiet=quiet)
        measured = [done.runs.get(cell) for cell in grid.cells]
        failures = _failure_lines(done.failures)
    from gradflow.judging.comparison import compare_runs

    base, present = _choose_reference(measured, reference), [run for run in measured if run]
    say_notes(present)
    _side_by_side(compare_runs(present, base, noise, failures), targets, quiet=quiet)
    if failures:
        raise MeasurementError(f"{count(len(failures), 'cell')} could not be measured; see above")


def _side_by_side(comparison: Comparison, targets: Targets, *, quiet: bool) -> None:
    """Write a comparison to its targets, and show its tables unless one of them is stdout."""
    from gradflow.showing.formats import COMPARISON_FORMATS
    from gradflow.showing.terminal.many_runs import comparison_view

    write_targets(targets, COMPARISON_FORMATS, comparison)
    if not quiet and "-" not in targets.values():
        show_view(comparison_view(comparison, drawn=can_draw(sys.stdout.encoding)))


def _check_request(runs: list[str] | None, made: bool, targets: Targets, noise: float) -> None:
    """Refuse a request that cannot work before anything is measured.

    Raises:
        UsageError: runs and options, two formats for stdout, an unwritable file, no such noise.
    """
    if runs and made:
        rule = "runs are either given as folders or made from options"
        raise UsageError(rule, "both", "leave out the folders or the options")
    if not (math.isfinite(noise) and noise >= 0):
        rule = "--noise is a relative difference of at least 0"
        raise UsageError(rule, noise, "use for example --noise 0.01")
    if list(targets.values()).count("-") > 1:
        raise UsageError("one format can go to stdout", "several", "give the others a file")
    for name, target in targets.items():
        check_target(target, f"--{name}")


def _make_grid(given: dict[str, Any]) -> Grid:
    """The cells that the given lists make; cells that are left out are named on stderr.

    Raises:
        UsageError: a bad value, or no cell at all.
    """
    designs = [name for name in given if name in STACK_FIELDS or name in MODEL_FIELDS]
    grid = expand(({} if designs else DEFAULT_GRID) | given)
    for line in grid.notes:
        say(f"note: {line}", style="yellow")
    for line in grid.skipped:
        say(f"skipped: {line}", style="yellow")
    return grid


def _measure_grid(
    grid: Grid, out: Path, chosen: _ChosenExecutor, *, fresh: bool, quiet: bool
) -> Sweep:
    """Every cell of the grid, measured now or found in `out`.

    Args:
        grid: the cells.
        out: folder of the runs.
        chosen: where the cells are measured.
        fresh: measure cells that are stored, too.
        quiet: show no progress.

    Raises:
        UsageError: a bad value.
        MeasurementError: no cell could be measured.
    """
    from gradflow.runs.staging import check_writable

    check_choice("--executor", chosen.name, EXECUTORS)
    check_writable(out)
    with progress_bar(quiet) as progress:
        progress("loading torch", 0, 0)
        from gradflow.sweeps.cells import make_executor
        from gradflow.sweeps.sweep import sweep

        executor = make_executor(chosen.name, len(grid.cells), chosen.workers, chosen.address)
        done = sweep(grid.cells, out, executor, fresh=fresh, progress=progress)
    _say_stored(done, len(grid.cells))
    for line in _failure_lines(done.failures):
        say(f"failed: {line}", style="red")
    if not done.runs:
        raise MeasurementError("no cell could be measured; the reasons are above")
    return done


def _say_stored(done: Sweep, cells: int) -> None:
    """Say how many cells were not measured because they were stored."""
    if done.reused:
        say(f"{len(done.reused)} of {count(cells, 'cell')} stored already (--fresh measures anew)")
    if done.resumed:
        say(f"{len(done.resumed)} of {count(cells, 'cell')} stored already but for their times")


def _failure_lines(failures: Sequence[tuple[Cell, str]]) -> list[str]:
    """One line for each cell that has no run, or no times."""
    return [f"{cell.spec.title}: {error}" for cell, error in failures]


def _check_reference(wanted: str | None, grid: Grid) -> None:
    """Refuse a number that no cell has before anything is measured.

    Raises:
        UsageError: there is no such cell.
    """
    if wanted is not None and wanted.isdecimal() and not 1 <= int(wanted) <= len(grid.cells):
        raise _no_reference(wanted, len(grid.cells))


def _choose_reference(runs: Sequence[Run | None], wanted: str | None) -> Run:
    """The run that times are divided by: the first unless a number or a folder is given.

    Args:
        runs: the runs in the order of the grid; None where a cell has failed.
        wanted: a number from 1, or a folder of these runs or of another one.

    Raises:
        UsageError: there is no such run.
    """
    if wanted is None:
        return next(run for run in runs if run)
    if wanted.isdecimal():
        run = runs[int(wanted) - 1] if 1 <= int(wanted) <= len(runs) else None
    else:
        run = _reference_folder(runs, Path(wanted))
    if run is None:
        raise _no_reference(wanted, len(runs))
    return run


def _reference_folder(runs: Sequence[Run | None], folder: Path) -> Run | None:
    from gradflow.runs.store import load

    for run in runs:
        if run and run.path and run.path.resolve() == folder.resolve():
            return run
    try:
        return load(folder)
    except RunFolderError:
        return None


def _no_reference(wanted: str, cells: int) -> UsageError:
    rule = f"--reference is the number of a measured cell, 1 to {cells}, or a run folder"
    return UsageError(rule, wanted, "use --reference 1")
