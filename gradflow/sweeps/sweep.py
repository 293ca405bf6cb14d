"""A grid of cells: measure what is not stored yet, time all alike, store each as it finishes.

Statistics run in parallel. Times are then taken alone, in this process: one pass of every cell in
turn, round after round, so that drift of the machine hits all cells alike. A cell that waits for
its times is kept on a shelf, so a killed sweep measures no statistics twice.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gradflow.engine.timing import Clock
from gradflow.errors import GradflowError
from gradflow.measuring.columns import with_times
from gradflow.measuring.progress import Progress
from gradflow.networks.stack import rehearse
from gradflow.runs import store
from gradflow.runs.records import Run
from gradflow.runs.staging import abandoned, locked_folder, not_stored, remove_abandoned
from gradflow.specs.fields import deciding
from gradflow.specs.grid import Cell
from gradflow.specs.model_spec import ModelRequest, asked_for
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import is_user_name
from gradflow.sweeps.cells import Executor
from gradflow.sweeps.rounds import Rounds

_Environments = Mapping[Cell, dict[str, Any]]


@dataclass
class Sweep:
    """The runs and the failures of a sweep.

    Attributes:
        runs: every cell that was measured or found, stored; in the order of the grid.
        reused: those that were found.
        resumed: those of which the statistics were found, so that only their times were taken.
        failures: cells with the reason why they have no run, or no times.
    """

    runs: dict[Cell, Run] = field(default_factory=dict)
    reused: list[Cell] = field(default_factory=list)
    resumed: list[Cell] = field(default_factory=list)
    failures: list[tuple[Cell, str]] = field(default_factory=list)

    def keep(self, cell: Cell, run: Run) -> None:
        """Remember a stored run without its parameters, by far its largest part."""
        self.runs[cell] = replace(run, param_records=())


def sweep(
    cells: Sequence[Cell],
    out: Path,
    executor: Executor,
    *,
    fresh: bool = False,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
) -> Sweep:
    """Measure the cells of a grid; `out` is where runs are looked for and stored.

    `fresh` measures anew what is stored already, and `clock` stands in for the device's own.

    Raises:
        UsageError: a device is not there, or a user's own block breaks the interface.
        MeasurementError: a result could not be stored; what was stored before is kept.
    """
    for cell in cells:
        if isinstance(cell.spec, StackSpec) and is_user_name(cell.spec.block):
            rehearse(cell.spec)  # a mistake in it is no failure of a cell
    remove_abandoned(out)
    here = _environments(cells, executor)
    with shelf_in(out) as shelf:
        work = _Work(cells, here, out, shelf, executor, _Meter(progress, cells))
        if not fresh:
            work.reuse()
        work.measure()
        work.time(clock)
    work.done.runs = {cell: work.done.runs[cell] for cell in cells if cell in work.done.runs}
    return work.done


def _environments(cells: Sequence[Cell], executor: Executor) -> _Environments:
    kinds = {_place(cell): cell for cell in cells}
    found = {kind: executor.environment(cell) for kind, cell in kinds.items()}
    return {cell: found[_place(cell)] for cell in cells}


def _place(cell: Cell) -> tuple[object, ...]:
    """The parts of a cell that decide its environment."""
    library = isinstance(cell.spec, ModelRequest) and cell.spec.is_from_library
    return cell.options.device, cell.spec.dtype, library


@dataclass
class _Work:
    """A sweep under way. `waiting` are cells that lack their times alone, with their folders."""

    cells: Sequence[Cell]
    here: _Environments
    out: Path
    shelf: Shelf
    executor: Executor
    meter: _Meter
    done: Sweep = field(default_factory=Sweep)
    waiting: dict[Cell, Path] = field(default_factory=dict)

    def reuse(self) -> None:
        """Find the stored runs of cells: whole ones, or else statistics."""
        if not self.executor.shared:
            self.shelf.adopt(self.out, self.cells)
        on_shelf = store.run_folders(self.shelf.folder)
        newest_first = [*reversed(store.run_folders(self.out)), *on_shelf]
        for cell, run in _look_up(newest_first, self.cells):
            wanted = cell.is_lasting and cell not in self.done.runs
            if wanted and _same_numbers(run, cell, self.here[cell]):
                self._reuse_one(cell, run)
        for folder in set(on_shelf).difference(self.waiting.values()):
            self.shelf.drop(folder)
        self.done.reused = [cell for cell in self.cells if cell in self.done.runs]
        self.done.resumed = [cell for cell in self.cells if cell in self.waiting]
        self.meter.found(self.done.reused, self.done.resumed)

    def _reuse_one(self, cell: Cell, run: Run) -> None:
        shared = self.executor.shared
        if not cell.options.timing or _timed_well(run, cell, self.here[cell], shared=shared):
            self._keep_untimed(cell, run)
            self.waiting.pop(cell, None)
        elif not shared and run.path:
            self.waiting.setdefault(cell, run.path)

    def _keep_untimed(self, cell: Cell, run: Run) -> None:
        """Keep a run as it is; a run on the shelf moves to the stored runs."""
        on_shelf = run.path is not None and run.path.parent == self.shelf.folder
        self.done.keep(cell, store.save(run, self.out) if on_shelf else run)

    def measure(self) -> None:
        """Measure the statistics of cells that were not found; shelve those that need times."""
        missing = [c for c in self.cells if c not in self.done.runs and c not in self.waiting]
        with closing(self.executor.outcomes(missing)) as outcomes:
            for outcome in outcomes:
                cell = outcome.cell
                if outcome.run is None:
                    self.done.failures.append((cell, outcome.error))
                elif cell.options.timing and not self.executor.shared:
                    self.waiting[cell] = self.shelf.put(cell, outcome.run)
                else:
                    self.done.keep(cell, store.save(outcome.run, self.out))
                self.meter.measured(cell)

    def time(self, clock: Clock | None) -> None:
        """Take the times of all cells together, then store each run."""
        cells = [cell for cell in self.cells if cell in self.waiting]
        if not cells:
            return
        rounds = Rounds(cells, clock)
        rounds.run(self.meter.timed)
        name = uuid.uuid4().hex[:12]
        for cell in cells:
            self._finish(cell, rounds, name)

    def _finish(self, cell: Cell, rounds: Rounds, name: str) -> None:
        folder = self.waiting[cell]
        try:
            run = store.load(folder)
        except GradflowError as error:
            self.done.failures.append((cell, f"its statistics are gone: {error}"))
            return
        if cell in rounds.failed:
            self.done.failures.append((cell, rounds.failed[cell]))
            self._keep_untimed(cell, run)
        else:
            self.done.keep(cell, store.save(_timed(run, cell, rounds, name), self.out))
        self.shelf.drop(folder)


def _same_numbers(run: Run, cell: Cell, here: Mapping[str, Any]) -> bool:
    """Whether a run has what the statistics of the cell would be, judged by the same limits."""
    options = deciding(RunOptions, "numbers", "verdict")
    same_options = all(getattr(run.options, k) == getattr(cell.options, k) for k in options)
    same_place = all(run.environment.get(k) == v for k, v in here.items() if k != "threads")
    return asked_for(run.spec) == cell.spec and same_options and same_place


def _timed_well(run: Run, cell: Cell, here: Mapping[str, Any], *, shared: bool) -> bool:
    """Whether the times of a run are those that the cell asks for."""
    repeats = len({record.repeat for record in run.time_records})
    threads = run.environment.get("threads")
    alone = shared or not run.environment.get("contended")
    replayed = bool(run.environment.get("cuda_graphs")) == bool(cell.options.cuda_graphs)
    same_way = replayed and threads == here.get("threads", threads)
    return repeats >= cell.options.repeats and alone and same_way


def _timed(run: Run, cell: Cell, rounds: Rounds, name: str) -> Run:
    """The run with its times, which were taken with all threads; `name` tells who took turns."""
    environment = run.environment | {
        "threads": torch.get_num_threads(),
        "statistics_threads": run.environment["threads"],
        "contended": False,
        "sweep": name,
    }
    run = replace(run, environment=environment, options=cell.options)
    timing = rounds.timing(cell)
    return with_times(run, timing)


class _Meter:
    """Progress in layers: one share for the statistics of a cell, one for each timed round."""

    def __init__(self, progress: Progress, cells: Sequence[Cell]) -> None:
        self._progress, self._cells, self._done, self._measured = progress, len(cells), 0, 0
        self._total = sum(_statistics_share(c) + _timing_share(c) for c in cells)

    def found(self, whole: Sequence[Cell], untimed: Sequence[Cell]) -> None:
        """Count cells that need not be measured, or need times alone."""
        self._measured += len(whole) + len(untimed)
        self._done += sum(_statistics_share(cell) for cell in [*whole, *untimed])
        self._move(sum(_timing_share(cell) for cell in whole), self._what())

    def measured(self, cell: Cell) -> None:
        """Count a cell whose statistics are done."""
        self._measured += 1
        self._move(_statistics_share(cell), self._what())

    def timed(self, cell: Cell, count: int, repeats: int) -> None:
        """Count the turn of a cell in a round of timing."""
        what = f"timing, round {count} of {max(count, repeats)}" if count else "warming up"
        self._move(cell.layers, what)

    def _what(self) -> str:
        return f"measured {self._measured} of {self._cells}"

    def _move(self, layers: int, what: str) -> None:
        self._done = min(self._done + layers, self._total)
        self._progress(what, self._done, self._total)


def _statistics_share(cell: Cell) -> int:
    return cell.layers * cell.options.seeds


def _timing_share(cell: Cell) -> int:
    return cell.layers * (cell.options.repeats + 1) if cell.options.timing else 0


SHELF_PREFIX = ".sweep-"


@dataclass(frozen=True)
class Shelf:
    """The hidden folder where one sweep keeps cells that wait for their times."""

    folder: Path

    def put(self, cell: Cell, run: Run) -> Path:
        """Keep a run on the shelf and return its folder; MeasurementError where the disk fails."""
        return store.save_as(run, self.folder, f"cell-{cell.key}")

    def drop(self, folder: Path) -> None:
        """Remove a run from the shelf; a folder elsewhere stays."""
        if folder.parent == self.folder:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, out: Path, cells: Collection[Cell]) -> None:
        """Take over what killed sweeps left of these cells; the rest stays where it is."""
        keys = {cell.key for cell in cells}
        for other in abandoned(out, SHELF_PREFIX):
            remove_abandoned(other)
            for folder in store.run_folders(other):
                if store.folder_key(folder) in keys:
                    folder.rename(_free(self.folder / folder.name))
            _remove_empty(other)


@contextmanager
def shelf_in(out: Path) -> Iterator[Shelf]:
    """Make a shelf in a folder of runs, and remove it if nothing is left on it at the end.

    A disk that is full or fails raises MeasurementError.
    """
    try:
        folder, lock = locked_folder(out, SHELF_PREFIX)
    except OSError as error:
        raise not_stored(out, error) from None
    try:
        yield Shelf(folder)
    finally:
        _remove_empty(folder)
        os.close(lock)


def _look_up(folders: Iterable[Path], cells: Collection[Cell]) -> Iterator[tuple[Cell, Run]]:
    """Yield each cell with each run that has its key; damaged folders are passed over."""
    by_key: dict[str, list[Cell]] = {}
    for cell in cells:
        by_key.setdefault(cell.key, []).append(cell)
    for folder in folders:
        for cell in by_key.get(store.folder_key(folder), ()):
            with suppress(GradflowError):
                yield cell, store.load(folder)


def _free(wanted: Path) -> Path:
    names = (wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 1000))
    return next(path for path in (wanted, *names) if not path.exists())


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
