"""The interface of what measures the cells of a sweep, and the executor in this process.

An executor takes cells and yields an outcome for each as it finishes. Numbers do not depend on it:
every executor computes statistics with one thread per cell, because the order of a sum, and so its
last bits, may change with the number of threads.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from gradflow.engine.environment import describe_environment, library_version, resolve_device
from gradflow.errors import GradflowError, UsageError, first_line
from gradflow.judging.comparison import SPEED_KEYS
from gradflow.measuring.any import measure_any
from gradflow.runs.records import Run
from gradflow.specs.fields import check_choice
from gradflow.specs.grid import EXECUTORS, Cell
from gradflow.specs.user_files import load_again


@dataclass(frozen=True)
class CellResult:
    """A measured cell, or the error in its place: one line."""

    cell: Cell
    run: Run | None = None
    error: str = ""


class Executor(Protocol):
    """Measures cells, in any order.

    Attributes:
        shared: nobody can keep others off the machine while a cell is timed.
    """

    shared: bool

    def environment(self, cell: Cell) -> dict[str, Any]:
        """Return what a stored run must have been measured on to stand for this cell.

        A device that is not there raises UsageError.
        """

    def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
        """Measure the cells; outcomes come as they finish. Closing it ends all work."""


def local_environment(cell: Cell) -> dict[str, Any]:
    """Return versions and device of this machine, as far as numbers and times depend on them.

    A device that is not there raises UsageError.
    """
    here = describe_environment(cell.spec, resolve_device(cell.options.device, cell.spec.dtype))
    return {key: here[key] for key in ("gradflow", *SPEED_KEYS)} | library_version(cell.spec)


def measure_cell(cell: Cell, *, timing: bool = False, device: str | None = None) -> CellResult:
    """Measure one cell with one thread, on another device if one is given.

    An error becomes the outcome of the cell.
    """
    threads = torch.get_num_threads()
    options = replace(cell.options, timing=timing, device=device or cell.options.device)
    try:
        torch.set_num_threads(1)
        for name, reference in cell.code:
            load_again(name, reference)
        run = measure_any(cell.spec, options)
    except GradflowError as error:
        return CellResult(cell, error=first_line(error))
    except Exception as error:  # noqa: BLE001 (any error of one cell must not end the others)
        return CellResult(cell, error=f"{type(error).__name__}: {first_line(error)}")
    finally:
        torch.set_num_threads(threads)
    return CellResult(cell, replace(run, options=replace(cell.options, timing=timing)))


class Serial:
    """One cell after the other, in this process."""

    shared = False
    environment = staticmethod(local_environment)

    def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
        """Measure the cells in their order."""
        for cell in cells:
            yield measure_cell(cell)


def make_executor(
    name: str, cells: int, workers: int | None = None, address: str | None = None
) -> Executor:
    """Return the executor of that name; `auto` takes processes where there are several cells.

    A UsageError tells of an unknown name, a missing extra, or an option of another executor.
    """
    check_choice("--executor", name, EXECUTORS)
    if address is not None and name != "ray":
        rule = "--address is that of a Ray cluster"
        raise UsageError(rule, f"--executor {name}", "add --executor ray")
    if workers is not None and name in ("serial", "ray"):
        rule = "--workers counts worker processes"
        raise UsageError(rule, f"--executor {name}", "leave it out, or use --executor processes")
    if name == "ray":
        from gradflow.sweeps.cluster import Ray

        return Ray(address)
    if name == "processes" or (name == "auto" and cells > 1):
        from gradflow.sweeps.processes import Processes

        return Processes(workers)
    return Serial()
