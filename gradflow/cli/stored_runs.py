"""Runs that are given as folders or globs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradflow.cli.common import say
from gradflow.errors import RunFolderError, UsageError
from gradflow.text import printable

if TYPE_CHECKING:
    from gradflow.runs.records import Run

Runs = Annotated[
    list[str] | None, typer.Argument(help="run folders or globs; with these nothing is measured")
]


def load_runs(patterns: list[str]) -> list[Run]:
    """The runs that folders and globs name; unreadable ones are named and skipped.

    Raises:
        UsageError: a pattern matches nothing, or nothing can be read.
    """
    found, unreadable = read_runs(patterns)
    for line in unreadable:
        say(f"skipped: {line}", style="yellow")
    if not found:
        raise UsageError("at least one run can be read", " ".join(patterns), "measure some first")
    return found


def read_runs(patterns: list[str]) -> tuple[list[Run], list[str]]:
    """The runs that folders and globs name, each once, and a line for each that cannot be read.

    Raises:
        UsageError: a pattern matches nothing.
    """
    from gradflow.runs.store import load

    found: list[Run] = []
    unreadable: list[str] = []
    for folder in dict.fromkeys(path for pattern in patterns for path in matching(pattern)):
        try:
            found.append(load(folder))
        except RunFolderError as error:
            unreadable.append(str(error))
    return found, unreadable


def say_notes(runs: Sequence[Run]) -> None:
    """What does not fit together in these runs, a line each."""
    from gradflow.runs.consistency import contradiction, first_broken, same_network

    named = [(run.path.name if run.path else run.spec.title, run) for run in runs]
    notes = [
        line
        for name, run in named
        for line in contradiction(name, run.summary.verdict, first_broken(run.first_records))
    ]
    for line in (*notes, *same_network(named)):
        say(f"note: {printable(line)}", style="yellow")


def matching(pattern: str) -> list[Path]:
    """What has that name, or the folders that a glob matches: plain files are no runs.

    Raises:
        UsageError: there is none.
    """
    with suppress(OSError):  # a name that is too long, for one
        if Path(pattern).exists():
            return [Path(pattern)]
    names = sorted(glob(pattern))  # noqa: PTH207 (`Path.glob` takes no absolute patterns)
    matches = [path for name in names if not (path := Path(name)).is_file()]
    if not matches:
        raise UsageError("a run folder or a glob that matches some", pattern, "look into results/")
    return matches
