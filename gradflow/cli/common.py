"""What several commands share: common options, stored runs, files, progress, the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gradflow.errors import RunFolderError, UsageError
from gradflow.measuring.progress import Progress
from gradflow.text import can_draw, in_ascii, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradflow.runs.records import Run

RunFolders = Annotated[
    list[str] | None, typer.Argument(help="run folders or globs; with these nothing is measured")
]
Out = Annotated[Path, typer.Option(help="folder that runs are stored in")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="[FILE]", help="one JSON object, to a file or to stdout (-)"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no table and no progress")]
Residual = Annotated[bool, typer.Option("--residual", help="short for --shortcut residual")]
Plain = Annotated[bool, typer.Option("--plain", help="short for --shortcut plain")]

# A file, or - for stdout, by the name of its format.
Targets = dict[str, str | None]
Content = TypeVar("Content")


# The shortcut


def shortcuts(given: Mapping[str, Any], residual: bool, plain: bool) -> list[str]:
    """The values of `--shortcut` that `--residual` and `--plain` stand for.

    Raises:
        UsageError: `--residual` or `--plain` beside `--shortcut`.
    """
    named = ["residual"] * residual + ["plain"] * plain
    if named and "shortcut" in given:
        short = f"--{named[0]}"
        rule = f"{short} is short for --shortcut {named[0]}"
        raise UsageError(rule, f"{short} and --shortcut", "give one of the two")
    return named


def one_shortcut(given: Mapping[str, Any], residual: bool, plain: bool) -> dict[str, str]:
    """The field that `--residual` or `--plain` stands for; empty without both.

    Raises:
        UsageError: both are given, or one of them beside `--shortcut`.
    """
    named = shortcuts(given, residual, plain)
    if len(named) > 1:
        rule = "a unit has a shortcut or has none"
        raise UsageError(rule, "--residual --plain", "give one of the two")
    return {"shortcut": named[0]} if named else {}


# Stored runs


def load_runs(patterns: list[str]) -> list[Run]:
    """The runs that folders and globs name; unreadable ones are named and skipped.

    Raises:
        UsageError: a pattern matches nothing, or nothing can be read.
    """
    runs, unreadable = read_runs(patterns)
    for line in unreadable:
        say(f"skipped: {line}", style="yellow")
    if not runs:
        raise UsageError("at least one run can be read", " ".join(patterns), "measure some first")
    return runs


def read_runs(patterns: list[str]) -> tuple[list[Run], list[str]]:
    """The runs that folders and globs name, each once, and a line for each that cannot be read.

    Raises:
        UsageError: a pattern matches nothing.
    """
    from gradflow.runs.store import load

    runs: list[Run] = []
    unreadable: list[str] = []
    for folder in dict.fromkeys(path for pattern in patterns for path in _matching(pattern)):
        try:
            runs.append(load(folder))
        except RunFolderError as error:
            unreadable.append(str(error))
    return runs, unreadable


def _matching(pattern: str) -> list[Path]:
    """The path of that name, or the folders that a glob matches: plain files are no runs."""
    with suppress(OSError):  # a name that is too long, for one
        if Path(pattern).exists():
            return [Path(pattern)]
    paths = sorted(glob(pattern))  # noqa: PTH207 (`Path.glob` takes no absolute patterns)
    matches = [path for name in paths if not (path := Path(name)).is_file()]
    if not matches:
        raise UsageError("a run folder or a glob that matches some", pattern, "look into results/")
    return matches


def run_name(run: Run) -> str:
    """The name of a run's folder, or its title before it is stored."""
    return run.path.name if run.path else run.spec.title


def say_notes(runs: Sequence[Run]) -> None:
    """Say in a line each what does not fit together in the runs."""
    from gradflow.judging.remarks import contradiction, same_network
    from gradflow.runs.records import broken_rows

    named = [(run_name(run), run) for run in runs]
    notes = [
        line
        for name, run in named
        for line in contradiction(name, run.summary.verdict, broken_rows(run.first_records))
    ]
    for line in (*notes, *same_network(named)):
        say(f"note: {printable(line)}", style="yellow")


# Files and stdout


def check_target(target: str | None, option: str = "--json") -> None:
    """Refuse, before anything is measured, a file that cannot be written.

    Args:
        target: the file, or `-` for stdout.
        option: the option that names the target.

    Raises:
        UsageError: the target is a folder, or lies in none.
    """
    if target in (None, "-"):
        return
    file = Path(str(target))
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        rule = f"{option} names a file that can be written"
        raise UsageError(rule, repr(target), "choose another, or - for stdout")


def write_text(target: str, text: str) -> None:
    """Write text to a file, or to stdout for `-`; in ASCII where stdout cannot show it otherwise.

    Raises:
        UsageError: the file cannot be written.
    """
    if target == "-":
        sys.stdout.write(text if can_draw(sys.stdout.encoding) else in_ascii(text))
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        got = f"{target} ({error.strerror})"
        raise UsageError("the file can be written", got, "choose another") from None


def write_targets(
    targets: Targets, formats: Mapping[str, Callable[[Content], str]], content: Content
) -> None:
    """Write the content in each format that has a target.

    Raises:
        UsageError: a file cannot be written.
    """
    for name, target in targets.items():
        if target is not None:
            write_text(target, formats[name](content))


def show_view(view: RenderableType, *, numbers_coloured: bool = False, then: str = "") -> None:
    """Print a view on stdout.

    Args:
        view: what is shown.
        numbers_coloured: highlight numbers in the cells of tables, on a terminal with colours.
        then: a last line, which is never wrapped.
    """
    from rich.console import Console

    from gradflow.showing.terminal.printing import print_view

    console = Console(highlight=numbers_coloured)
    print_view(view, console)
    if then:
        console.print(then, soft_wrap=True, markup=False, highlight=False)


def say(line: str, style: str = "") -> None:
    """Print one line on stderr, which is never wrapped."""
    from rich.console import Console  # 50 ms, which `--help` need not wait for

    Console(stderr=True, soft_wrap=True, highlight=False).print(line, style=style, markup=False)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Show progress on stderr, where that is a terminal, from the first call on."""
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeRemainingColumn())
    bar = bars.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def progress(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total or None)
        bar.start()

    try:
        yield progress
    finally:
        bar.stop()
