"""The command line: parse, call, print, exit code. No logic, and torch only inside commands."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import gradflow
from gradflow.cli.check import check
from gradflow.cli.compare import compare
from gradflow.cli.guide import guide
from gradflow.cli.report import report
from gradflow.cli.run import run
from gradflow.cli.schemes import schemes
from gradflow.errors import EXIT_INTERRUPTED, EXIT_OK, GradflowError, MeasurementError
from gradflow.specs.fields import check_choice


class Commands(TyperGroup):
    """The commands by name; an unknown one is answered with the list of them."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if not ctx.resilient_parsing:  # a shell that completes a line wants no complaint
            check_choice("the command", cmd_name, tuple(self.commands))
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=Commands,
    name="gradflow",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help pages take a quarter of a second to import
    context_settings={"help_option_names": ["-h", "--help"]},
)


class HelpByPanel(TyperCommand):
    """A command whose help lists the options under the title of their panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                name = "Arguments" if param.param_type_name == "argument" else "Options"
                title = getattr(param, "rich_help_panel", None) or name
                panels.setdefault(title, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


_interrupted = threading.Event()
# Objects that are made between two garbage collections; Python's own number is 700.
COLLECT_EVERY = 100_000
STREAM_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)


def main() -> None:
    """Run the command line and exit with its code; errors are one line on stderr."""
    signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # whatever the terminal cannot show is no error
            stream.reconfigure(errors="replace")
    # Measuring makes many objects and hardly a cycle: a collection of all of them every few
    # milliseconds takes a tenth of a run.
    gc.set_threshold(COLLECT_EVERY)
    _leave(run_app(sys.argv[1:]))


def _leave(code: int) -> NoReturn:
    """End the process at once: taking the interpreter and torch apart takes half a second."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _unwritable(error)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _interrupt(*_: object) -> None:
    """Ctrl-C. Libraries that it hits while they load may turn it into an error of their own."""
    _interrupted.set()
    raise KeyboardInterrupt


def run_app(argv: list[str]) -> int:
    """Run a command line; returns the exit code."""
    try:
        return _run(argv)
    except Exception:
        if not _interrupted.is_set():
            raise
        _complain("interrupted; nothing half-written remains")
        return EXIT_INTERRUPTED


def _run(argv: list[str]) -> int:
    try:
        words = _with_bare_json(argv or ["--help"])
        code = int(app(words, prog_name="gradflow", standalone_mode=False) or EXIT_OK)
        if code == EXIT_INTERRUPTED:  # typer's answer to Ctrl-C
            _complain("interrupted; nothing half-written remains")
        return code
    except GradflowError as error:
        _complain(str(error))
        return error.exit_code
    except typer.TyperException as error:
        _complain(f"{error.format_message().rstrip('.')}; see --help")
        return error.exit_code
    except OSError as error:
        # Files have names, and are taken care of where they are written: this is a stream.
        if error.filename is not None or error.errno not in STREAM_ERRORS:
            raise
        return _unwritable(error)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted; nothing half-written remains")
        return EXIT_INTERRUPTED
    except SystemExit:  # typer and Rich exit where a pipe is broken
        return _unread()


def _unread() -> int:
    """The reader of stdout went away, which is its right; what is left goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _unwritable(error: OSError) -> int:
    """Stdout cannot be written, or its reader went away."""
    _unread()
    if isinstance(error, BrokenPipeError):
        return EXIT_OK
    _complain(f"stdout could not be written: {error.strerror or error}; free some space")
    return MeasurementError.exit_code


def _complain(message: str) -> None:
    typer.echo(f"gradflow: {' '.join(message.split())}", err=True)


def _with_bare_json(argv: list[str]) -> list[str]:
    """Read `--json` without a value as `--json -`."""
    bare = [
        word == "--json" and after.startswith("-") and after != "-"
        for word, after in pairwise([*argv, "--"])
    ]
    return ["--json=-" if is_bare else word for word, is_bare in zip(argv, bare, strict=True)]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradflow {gradflow.__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Does the gradient reach my first layer, is that normal, and what does each layer cost?"""


for command in (run, compare, report, check, schemes, guide):
    # As the short help too, which Typer would cut off.
    app.command(cls=HelpByPanel, short_help=command.__doc__)(command)
