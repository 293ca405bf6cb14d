"""What several commands share: options of the same meaning, output to files, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from gradflow.errors import UsageError
from gradflow.text import can_draw, in_ascii

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
Progress = Callable[[str, int, int], None]


def shortcut(given: Mapping[str, Any], residual: bool, plain: bool) -> dict[str, str]:
    """The field that `--residual` or `--plain` stands for.

    Raises:
        UsageError: both are given, or one of them beside `--shortcut`.
    """
    check_shortcut(given, residual, plain)
    if residual and plain:
        rule = "a unit has a shortcut or has none"
        raise UsageError(rule, "--residual --plain", "give one of the two")
    if residual or plain:
        return {"shortcut": "residual" if residual else "plain"}
    return {}


def check_shortcut(given: Mapping[str, Any], residual: bool, plain: bool) -> None:
    """Refuse two ways to say what the shortcut is.

    Raises:
        UsageError: `--residual` or `--plain` beside `--shortcut`.
    """
    if "shortcut" in given and (residual or plain):
        short = "--residual" if residual else "--plain"
        rule = f"{short} is short for --shortcut {short[2:]}"
        raise UsageError(rule, f"{short} and --shortcut", "give one of the two")


def check_target(target: str | None, option: str = "--json") -> None:
    """Refuse, before anything is measured, a file that cannot be written.

    Args:
        target: the file, or `-` for stdout.
        option: that it was given with.

    Raises:
        UsageError: it is a folder, or lies in none.
    """
    if target in (None, "-"):
        return
    file = Path(str(target))
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        rule = f"{option} names a file that can be written"
        raise UsageError(rule, repr(target), "choose another, or - for stdout")


def write_text(target: str, text: str) -> None:
    """Text to a file, or to stdout for `-`; there in ASCII where it cannot be shown otherwise.

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


def say(line: str, style: str = "") -> None:
    """One line on stderr."""
    from rich.console import Console  # 50 ms, which `--help` need not wait for

    Console(stderr=True, soft_wrap=True, highlight=False).print(line, style=style, markup=False)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Show progress on stderr, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading torch", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield progress
