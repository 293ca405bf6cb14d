"""Error types, each with the exit code that the command line gives it.

0 ok · 1 a gate or finding the user asked for · 2 usage · 3 measurement failed · 4 no or
incompatible baseline · 70 an error of gradflow's own · 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

EXIT_OK = 0
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class GradflowError(Exception):
    """Something a person can act on; printed as one line, never as a traceback."""

    exit_code = 3

    def __str__(self) -> str:
        """The message in one line, whatever was put into it."""
        return " ".join(super().__str__().split())


class FindingError(GradflowError):
    """A gate that the user asked for does not hold."""

    exit_code = 1


class UsageError(GradflowError):
    """A value that cannot work: names the rule, what arrived and what to do.

    Args:
        rule: what has to hold.
        got: the value that arrived, shown as `repr` unless it is text already, and not empty.
        remedy: what to do instead.
    """

    exit_code = 2

    def __init__(self, rule: str, got: object, remedy: str) -> None:
        self.rule, self.got, self.remedy = rule, got, remedy
        shown = got if isinstance(got, str) and got else repr(got)
        super().__init__(f"{rule}; got {shown}; {remedy}")


class MeasurementError(GradflowError):
    """The measurement itself failed: out of memory, disk full, no finite answer."""

    exit_code = 3


class RunFolderError(GradflowError):
    """A folder that cannot be read as a run; names the folder and the reason."""

    exit_code = 3


class BaselineError(GradflowError):
    """A baseline is missing, or was measured under other conditions."""

    exit_code = 4


def closest_first(name: str, known: Iterable[str]) -> list[str]:
    """The known names, the most similar to a misspelt one first; equally similar keep order."""
    return sorted(known, key=lambda other: -SequenceMatcher(None, name, other).ratio())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch failed to allocate, on CUDA or on the host."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def first_line(error: BaseException) -> str:
    """The error's text, or its first line where libraries write pages."""
    return next(iter(str(error).strip().splitlines()), "no reason given")
