"""Which files a stack run goes through on its way from the command line to a row of layers.csv.

Runs a small stack under a profile hook. Its drivers are the functions on the call stack at the
moments when the numbers of a unit (`UnitRow`) and a row of layers.csv (`LayerRecord`) are made. The
direct path is the files of the drivers, of the functions that drivers call, and of the functions
that those call, in order of first entry, up to the first `LayerRecord`. Methods of objects that are
handed down, such as a clock, are part of where they were made. A file is entered twice if drivers
call into it, straight or by a function of another file, in two stretches with another file between.

    python benchmarks/run_path.py
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from side_by_side import write_table

import gradflow
from gradflow.cli.app import app

PACKAGE = Path(gradflow.__file__).parent
WORDS = "run --depth 2 --width 16 --seq-len 8 --batch-size 2 --no-timing --quiet --out"
MADE = ("UnitRow", "LayerRecord")


@dataclass(frozen=True)
class Call:
    """A call between two functions of the package, and the line that it stands in."""

    caller: CodeType
    line: int
    callee: CodeType

    @property
    def enters(self) -> bool:
        """Whether a function of another file is called, and no method."""
        name = self.callee.co_qualname
        is_function = "." not in name and not name.startswith("<")
        return is_function and self.caller.co_filename != self.callee.co_filename


@dataclass
class Trace:
    """The calls of a run up to its first LayerRecord, and the drivers."""

    calls: list[Call] = field(default_factory=list)
    drivers: list[CodeType] = field(default_factory=list)
    is_done: bool = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Note one event of the interpreter."""
        if event != "call" or self.is_done:
            return
        made = type(frame.f_locals.get("self")).__name__
        if frame.f_code.co_name == "__init__" and made in MADE:
            self.drivers += [each.f_code for each in callers(frame)][::-1]
            self.is_done = made == "LayerRecord"
        elif is_ours(frame.f_code):
            caller = next(callers(frame.f_back), None)
            if caller is not None:
                self.calls.append(Call(caller.f_code, caller.f_lineno, frame.f_code))


def is_ours(code: CodeType) -> bool:
    """Whether this is a function of the package; bodies of modules and classes are none."""
    is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
    return is_function and code.co_filename.startswith(str(PACKAGE))


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of the package on the call stack, from the innermost out."""
    while frame is not None:
        if is_ours(frame.f_code):
            yield frame
        frame = frame.f_back


def traced_run() -> Trace:
    """Run a small stack twice from its command line, and return the trace of the second run."""
    trace = Trace()
    with tempfile.TemporaryDirectory() as out:
        call = [*WORDS.split(), out]
        app(call, standalone_mode=False)  # so that all modules are imported
        sys.setprofile(trace)
        try:
            app(call, standalone_mode=False)
        finally:
            sys.setprofile(None)
    return trace


def stretches(trace: Trace) -> list[list[str]]:
    """Return the files of each stretch: one that drivers call into, and those that it calls.

    Calls into the same file, one after the other, are one stretch.
    """
    drivers = set(trace.drivers)
    found: list[list[str]] = [[short(trace.drivers[0])]]
    direct: set[CodeType] = set()
    seen: set[Call] = set()
    for call in trace.calls:
        if call in seen or not call.enters:
            continue
        seen.add(call)
        if call.caller in drivers:
            direct.add(call.callee)
            if short(call.callee) != found[-1][0]:
                found.append([short(call.callee)])
        elif call.caller in direct:
            found[-1].append(short(call.callee))
    return found


def short(code: CodeType) -> str:
    """Return the file of a function, relative to the package."""
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()


def direct_path(trace: Trace | None = None) -> list[str]:
    """Return the files from the command line to a row of layers.csv, in order of first entry."""
    trace = trace or traced_run()
    called = (name for stretch in stretches(trace) for name in stretch)
    return list(dict.fromkeys([*called, *map(short, trace.drivers)]))


def entered_twice(trace: Trace) -> list[str]:
    """Return the files of the direct path that are entered in two stretches or more."""
    parts = [set(stretch) for stretch in stretches(trace)]
    return [name for name in direct_path(trace) if sum(name in part for part in parts) > 1]


def main() -> None:
    """Trace a run and write the table."""
    trace = traced_run()
    path, twice = direct_path(trace), entered_twice(trace)
    rows = [(str(i), name, "twice" * (name in twice)) for i, name in enumerate(path, start=1)]
    title = "The direct path from the command line to a row of layers.csv"
    note = f"{len(path)} files, {len(twice)} of them entered twice."
    write_table("run_path", title, ("", "file", "entered"), rows, note)


if __name__ == "__main__":
    main()
