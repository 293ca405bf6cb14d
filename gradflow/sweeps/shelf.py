"""Measured cells that wait for their times, kept over a kill of their sweep.

A sweep has one hidden folder for them, locked while it lives. What a killed sweep left is taken
over by the next that wants it; two living sweeps in one place never touch each other's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradflow.errors import GradflowError
from gradflow.runs import store
from gradflow.runs.records import Run
from gradflow.runs.staging import abandoned, locked_folder, not_stored, remove_abandoned
from gradflow.specs.grid import Cell

PREFIX = ".sweep-"


@dataclass(frozen=True)
class Shelf:
    """The hidden folder of one sweep."""

    folder: Path

    def put(self, cell: Cell, run: Run) -> Path:
        """Keep a run; returns its folder.

        Raises:
            MeasurementError: the disk is full, or failed.
        """
        return store.save_as(run, self.folder, f"cell-{cell.key}")

    def drop(self, folder: Path) -> None:
        """Forget a run that has its times; others than those on the shelf stay."""
        if folder.parent == self.folder:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, out: Path, cells: Collection[Cell]) -> None:
        """Take over what killed sweeps left of these cells; the rest waits for whoever wants it."""
        keys = {cell.key for cell in cells}
        for other in abandoned(out, PREFIX):
            remove_abandoned(other)
            for folder in store.run_folders(other):
                if store.folder_key(folder) in keys:
                    folder.rename(_free(self.folder / folder.name))
            _remove_empty(other)


@contextmanager
def shelf_in(out: Path) -> Iterator[Shelf]:
    """A shelf in a folder of runs; gone at the end if nothing is left on it.

    Raises:
        MeasurementError: the disk is full, or failed.
    """
    try:
        folder, lock = locked_folder(out, PREFIX)
    except OSError as error:
        raise not_stored(out, error) from None
    try:
        yield Shelf(folder)
    finally:
        _remove_empty(folder)
        os.close(lock)


def look_up(folders: Iterable[Path], cells: Collection[Cell]) -> Iterator[tuple[Cell, Run]]:
    """Each cell with each run that has its key; damaged folders are passed over."""
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
