"""`gradflow compare`: a grid, measured where it is not stored yet, or stored runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradflow.cli.common import (
    Json,
    Out,
    Plain,
    Quiet,
    Residual,
    Targets,
    check_shortcut,
    check_target,
    progress_bar,
    say,
    write_text,
)
from gradflow.cli.options import with_fields
from gradflow.cli.stored_runs import Runs, load_runs, say_notes
from gradflow.cli.theory_only import TheoryOnly, predict_grid
from gradflow.errors import MeasurementError, RunFolderError, UsageError
from gradflow.specs.fields import check_choice
from gradflow.specs.grid import DEFAULT_GRID, EXECUTORS, Cell, Grid, expand
from gradflow.specs.parse_request import MODEL_FIELDS, STACK_FIELDS
from gradflow.text import can_draw, count

if TYPE_CHECKING:
    from gradflow.judging.comparison import Comparison
    from gradflow.runs.records import Run
    from gradflow.sweeps.sweep import Sweep

Fresh = Annotated[bool, typer.Option("--fresh", help="measure anew what is stored already")]
Reference = Annotated[
    str | None,
    typer.Option(
        help="what times are divided by: number of the cell, or run folder  [default: 1]",
        metavar="N|FOLDER",
    ),
]
ExecutorName = Annotated[
    str, typer.Option("--executor", help=f"{', '.join(EXECUTORS)}", metavar="NAME")
]
Workers = Annotated[int | None, typer.Option(help="worker processes (one per core or GPU)", min=1)]
Address = Annotated[str | None, typer.Option(help="of a running Ray cluster")]
Noise = Annotated[float, typer.Option(help="ratios nearer to 1 than this are no difference")]
Csv = Annotated[
    str | None, typer.Option("--csv", metavar="FILE", help="the rows as CSV (- stdout)")
]
Markdown = Annotated[
    str | None, typer.Option("--markdown", metavar="FILE", help="the tables as Markdown (- stdout)")
]


@with_fields(lists=True)
def compare(
    given: dict[str, Any],
    *,
    runs: Runs = None,
    residual: Residual = False,
    plain: Plain = False,
    theory_only: TheoryOnly = False,
    reference: Reference = None,
    fresh: Fresh = False,
    executor: ExecutorName = "auto",
    workers: Workers = None,
    address: Address = None,
    noise: Noise = 0.01,
    out: Out = Path("results"),
    csv: Csv = None,
    markdown: Markdown = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compare designs side by side: options take lists, joined by commas. Bare: the seed grid."""
    check_shortcut(given, residual, plain)
    if residual or plain:
        given["shortcut"] = ["residual"] * residual + ["plain"] * plain
    targets = {"csv": csv, "markdown": markdown, "json": json}
    check_request(runs, bool(given) or theory_only, targets, noise)
    if theory_only:
        predict_grid(make_grid(given), targets, quiet=quiet)
        return
    if runs:
        found: Sequence[Run | None] = load_runs(runs)
        chosen, failures = choose_reference(found, reference), []
    else:
        grid = make_grid(given)
        check_reference(reference, grid)
        done = measure_grid(grid, out, (executor, workers, address), fresh=fresh, quiet=quiet)
        found = [done.runs.get(cell) for cell in grid.cells]
        chosen, failures = choose_reference(found, reference), failure_lines(done.failures)
    side_by_side([run for run in found if run], chosen, (noise, failures), targets, quiet=quiet)
    if failures:
        raise MeasurementError(f"{count(len(failures), 'cell')} could not be measured; see above")


def side_by_side(
    runs: Sequence[Run],
    reference: Run,
    how: tuple[float, Sequence[str]],
    targets: Targets,
    *,
    quiet: bool,
) -> None:
    """Compare the runs with the reference; write the files and show the tables.

    Args:
        runs: all of them.
        reference: one of them.
        how: the noise threshold, and what could not be measured.
        targets: files by format.
        quiet: no tables.
    """
    from gradflow.judging.comparison import compare as compared

    say_notes(runs)
    result = compared(runs, reference, *how)
    write_files(result, targets)
    if not quiet and "-" not in targets.values():
        show(result)


def check_request(runs: list[str] | None, made: bool, targets: Targets, noise: float) -> None:
    """Refuse what cannot work before anything is measured.

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


def make_grid(given: dict[str, Any]) -> Grid:
    """The cells that the given lists make; what is left out is said.

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


def measure_grid(
    grid: Grid,
    out: Path,
    how: tuple[str, int | None, str | None],
    *,
    fresh: bool,
    quiet: bool,
) -> Sweep:
    """Every cell of the grid, measured now or found in `out`.

    Args:
        grid: the cells.
        out: folder of the runs.
        how: name of the executor, its workers, its address.
        fresh: do not look for stored runs.
        quiet: no progress.

    Raises:
        UsageError: a bad value.
        MeasurementError: no cell could be measured.
    """
    from gradflow.runs.staging import check_writable

    check_choice("--executor", how[0], EXECUTORS)
    check_writable(out)
    with progress_bar(quiet) as progress:
        from gradflow.sweeps.executors import make_executor
        from gradflow.sweeps.sweep import sweep

        executor = make_executor(how[0], len(grid.cells), how[1], how[2])
        done = sweep(grid.cells, out, executor, fresh=fresh, progress=progress)
    say_found(done, len(grid.cells))
    for line in failure_lines(done.failures):
        say(f"failed: {line}", style="red")
    if not done.runs:
        raise MeasurementError("no cell could be measured; the reasons are above")
    return done


def say_found(done: Sweep, cells: int) -> None:
    """What was not measured because it was stored."""
    if done.reused:
        say(f"{len(done.reused)} of {count(cells, 'cell')} stored already (--fresh measures anew)")
    if done.resumed:
        say(f"{len(done.resumed)} of {count(cells, 'cell')} stored already but for their times")


def failure_lines(failures: Sequence[tuple[Cell, str]]) -> list[str]:
    """One line for each cell without a run, or without times."""
    return [f"{cell.spec.title}: {error}" for cell, error in failures]


def check_reference(wanted: str | None, grid: Grid) -> None:
    """Refuse a number that no cell has before anything is measured.

    Raises:
        UsageError: there is no such cell.
    """
    if wanted is not None and wanted.isdecimal() and not 1 <= int(wanted) <= len(grid.cells):
        raise _no_reference(wanted, len(grid.cells))


def choose_reference(runs: Sequence[Run | None], wanted: str | None) -> Run:
    """The run that times are divided by: the first unless a number or a folder is given.

    Args:
        runs: in the order of the grid; None where a cell has failed.
        wanted: a number from 1, or a folder, among the runs or not.

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


def write_files(result: Comparison, targets: Targets) -> None:
    """The comparison in each format that was asked for.

    Raises:
        UsageError: a file cannot be written.
    """
    from gradflow.showing.formats import COMPARISON_FORMATS

    for name, target in targets.items():
        if target is not None:
            write_text(target, COMPARISON_FORMATS[name](result))


def show(result: Comparison) -> None:
    """The tables on stdout."""
    from rich.console import Console

    from gradflow.showing.terminal.many_runs import comparison_view
    from gradflow.showing.terminal.printing import print_view

    console = Console(highlight=False)
    print_view(comparison_view(result, drawn=can_draw(console.encoding)), console)
