"""The process around a command: signals, streams, one line for every error, and the exit code."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn, TextIO

import typer

from gradflow.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_OK,
    GradflowError,
    MeasurementError,
    first_line,
)

TRACEBACK_VARIABLE = "GRADFLOW_TRACEBACK"
# Objects that are made between two garbage collections; Python's own number is 700.
_COLLECT_EVERY = 100_000
_STREAM_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
_INTERRUPTED = "interrupted; nothing half-written remains"
_interrupted = threading.Event()


def run_process(command: Callable[[], int]) -> NoReturn:
    """Set the process up, run the command, and end the process with its exit code."""
    signal.signal(signal.SIGINT, _interrupt)
    # A process that was started with a stream closed has None there: what it says goes nowhere.
    sys.stdout, sys.stderr = (stream or _nowhere() for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # whatever the terminal cannot show is no error
            stream.reconfigure(errors="replace")
    # Measuring makes many objects and hardly a cycle: to collect garbage every few milliseconds
    # takes a tenth of a run.
    gc.set_threshold(_COLLECT_EVERY)
    _leave(command())


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _interrupt(*_: object) -> None:
    """Answer Ctrl-C. Libraries that it hits while they load may raise an error of their own."""
    _interrupted.set()
    raise KeyboardInterrupt


def _leave(code: int) -> NoReturn:
    """Flush the streams and end at once: taking the interpreter and torch apart takes 0.5 s."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _unwritable(error)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; return its exit code, and say every error in one line on stderr."""
    try:
        return _exit_code(command)
    except Exception as error:  # noqa: BLE001 (the one place where errors nobody expects end)
        if _interrupted.is_set():
            return _say_interrupted()
        return _internal(error)


def _exit_code(command: Callable[[], int | None]) -> int:
    try:
        code = int(command() or EXIT_OK)
        return _say_interrupted() if code == EXIT_INTERRUPTED else code
    except GradflowError as error:
        complain(str(error))
        return error.exit_code
    except typer.TyperException as error:
        complain(f"{error.format_message().rstrip('.')}; see --help")
        return error.exit_code
    except OSError as error:
        # Errors of files, which have names, are answered where files are written: this is a stream.
        if error.filename is not None or error.errno not in _STREAM_ERRORS:
            raise
        return _unwritable(error)
    except (KeyboardInterrupt, typer.Abort):
        return _say_interrupted()
    except SystemExit as end:  # typer ends so after a completion; typer and Rich at a broken pipe
        return _unread() if end.code else EXIT_OK


def _say_interrupted() -> int:
    complain(_INTERRUPTED)
    return EXIT_INTERRUPTED


def _internal(error: Exception) -> int:
    """Answer an error that is none of a person's: name it, and say how to see where it is."""
    kind, rest = type(error).__name__, f"{TRACEBACK_VARIABLE}=1 shows the traceback"
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in {"", "0"}:
        import traceback

        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        rest = "the traceback is above"
    complain(f"an error of gradflow's own: {kind}: {first_line(error)}; {rest}")
    return EXIT_INTERNAL


def _unread() -> int:
    """Send the rest of stdout nowhere, because its reader went away, which is its right."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _unwritable(error: OSError) -> int:
    """Answer a stdout that cannot be written, or whose reader went away."""
    _unread()
    if isinstance(error, BrokenPipeError):
        return EXIT_OK
    complain(f"stdout could not be written: {error.strerror or error}; free some space")
    return MeasurementError.exit_code


def complain(message: str) -> None:
    """Say a message in one line on stderr."""
    typer.echo(f"gradflow: {' '.join(message.split())}", err=True)
