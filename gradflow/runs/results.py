"""Every run of a results folder at once: checked, thinned, and without torch.

`store.load` reads one run exactly, record by record. Here thousands are read, and only what a
report shows. A folder that cannot be read is named in one line and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.errors import RunFolderError, UsageError
from gradflow.runs.naming import RunName, names
from gradflow.runs.records import BrokenRows
from gradflow.runs.store import RunDescription, described, read_run_json
from gradflow.text import printable

if TYPE_CHECKING:
    import polars as pl

# Keys of texts with a word for each layer of a model.
_WORD_LISTS = ("units", "kinds")
# Layers kept of one run: of few runs many, of many runs few.
_MOST_LAYERS, _FEWEST_LAYERS, _LAYERS_IN_ALL = 120, 48, 6_000
_FOREIGN_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class StoredRun(RunDescription):
    """A run in a report; every text of its `run.json` is printable.

    Attributes:
        number: its place in the results folder, oldest first; `Results.units` refers to it.
        name: of its folder.
        path: the folder.
    """

    number: int
    name: str
    path: Path


@dataclass(frozen=True)
class Results:
    """The runs of a results folder, with their layers and losses.

    Attributes:
        runs: those that can be read, oldest first.
        units: their layers, see `frames.UNIT_COLUMNS`; means over the seeds, thinned.
        losses, heat: of the trained runs, see `frames.LOSS_COLUMNS` and `frames.HEAT_COLUMNS`.
        broken: by the number of a run, which of its rows are not finite.
        layers_kept: layers of one run that `units` holds at most, but for extremes.
        skipped: one line for each folder that was not read.
    """

    runs: tuple[StoredRun, ...]
    units: pl.DataFrame
    losses: pl.DataFrame
    heat: pl.DataFrame
    broken: Mapping[int, BrokenRows]
    layers_kept: int
    skipped: tuple[str, ...]

    @cached_property
    def names(self) -> list[RunName]:
        """The name of each run beside the others."""
        return names(self.runs)


class NothingToReadError(UsageError):
    """A results folder without a run that can be read.

    Args:
        got: the folder, and what was found there.
        remedy: what to do instead.
        skipped: one line for each folder that was not read.
    """

    def __init__(self, got: str, remedy: str, skipped: Sequence[str]) -> None:
        super().__init__("--results holds at least one run that can be read", got, remedy)
        self.skipped = tuple(skipped)


def read_results(folder: Path) -> Results:
    """Read every run in `folder`.

    Raises:
        NothingToReadError: there is no run in it that can be read.
        UsageError: no such folder.
    """
    from gradflow.runs.frames import TableFile, read_layers, read_losses  # polars, 0.4 s

    skipped: list[str] = []
    stored = list(_stored_runs(folder, skipped))
    layers = max(_FEWEST_LAYERS, min(_MOST_LAYERS, _LAYERS_IN_ALL // max(len(stored), 1)))
    tables = [TableFile(run.number, run.path / "layers.csv", run.rows["layers"]) for run in stored]
    trained = [run for run in stored if run.rows.get("steps")]
    found = read_layers(tables, layers, [run.number for run in trained])
    losses, faults = read_losses(
        [
            TableFile(run.number, run.path / "steps.csv", run.rows["steps"])
            for run in trained
            if run.number not in found.faults
        ]
    )
    faults |= found.faults
    skipped += [_skip_line(stored[i].name, fault) for i, fault in sorted(faults.items())]
    runs = tuple(run for run in stored if run.number not in faults)
    if not runs:
        raise _nothing_to_read(folder, skipped)
    return Results(
        runs=runs,
        units=found.units,
        losses=losses,
        heat=found.heat.filter(~found.heat["run"].is_in(list(faults))),
        broken=found.broken,
        layers_kept=layers,
        skipped=tuple(skipped),
    )


def _skip_line(name: str, reason: str) -> str:
    """The line that names a folder which is not read."""
    return printable(f"skipped {name}, which {reason}")


def _stored_runs(folder: Path, skipped: list[str]) -> Iterator[StoredRun]:
    number = 0
    for path in _run_folders(folder, skipped):
        try:
            yield _stored_run(number, path)
            number += 1
        except RunFolderError as error:
            skipped.append(_skip_line(path.name, str(error).removeprefix(str(path)).strip()))


def _run_folders(folder: Path, skipped: list[str]) -> list[Path]:
    """Folders with a run.json, oldest first; the others that are not hidden are named."""
    try:
        paths = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        rule, got = "--results is a folder of runs", f"{folder} ({error.strerror})"
        raise UsageError(rule, printable(got), "make one with `gradflow run`") from None
    found = [path for path in paths if _has(path, "run.json")]
    others = [path for path in paths if not _has(path, "run.json")]
    incomplete = [path for path in others if _has(path, "layers.csv")]
    foreign = [path for path in others if not _has(path, "layers.csv")]
    skipped += [_skip_line(path.name, "has no run.json") for path in incomplete]
    if foreign:
        more = f" and {len(foreign) - _FOREIGN_NAMED} more" if len(foreign) > _FOREIGN_NAMED else ""
        names = ", ".join(printable(path.name) for path in foreign[:_FOREIGN_NAMED])
        skipped.append(f"skipped what holds no run.json: {names}{more}")
    return found


def _has(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:
        return False


def _nothing_to_read(folder: Path, skipped: Sequence[str]) -> NothingToReadError:
    remedy = "make one with `gradflow run`, or give another --results"
    if (folder / "run.json").is_file():
        remedy = "give the folder that it lies in"
    what = ", of which all is skipped" if skipped else ""
    return NothingToReadError(printable(f"{folder}{what}"), remedy, skipped)


def _stored_run(number: int, path: Path) -> StoredRun:
    content = read_run_json(path)
    found = described(path, content)
    try:
        shown = _printable(content)
    except RecursionError as error:
        raise RunFolderError(f"{path} is damaged: run.json: {error}") from None
    if shown != content:
        found = described(path, shown)
    return StoredRun(number=number, name=printable(path.name), path=path, **vars(found))


def _printable(value: Any, *, words: bool = False) -> Any:
    """A value of run.json with all its texts printable; of lists of words each by itself."""
    if isinstance(value, dict):
        return {printable(k): _printable(v, words=k in _WORD_LISTS) for k, v in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, str):
        return " ".join(map(printable, value.split(" "))) if words else printable(value)
    return value
