"""Every run of a results folder at once: checked, thinned, and without torch.

`store.load` reads one run exactly, record by record. Here thousands are read, and only what a
report shows. A folder that cannot be read is named in one line and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.errors import RunFolderError, UsageError
from gradflow.runs.consistency import Broken, contradiction, same_network
from gradflow.runs.store import plain, read_about
from gradflow.runs.summary import Summary
from gradflow.specs.fields import expect, expect_items, typed
from gradflow.specs.model_spec import Spec, spec_from_json
from gradflow.specs.run_options import RunOptions
from gradflow.text import printable

if TYPE_CHECKING:
    import polars as pl

# Whole numbers beyond this are no sizes of anything, and do not survive JSON in a browser.
LARGEST_WHOLE = 2**53
# Texts with a word for each layer of a model.
LISTS = ("units", "kinds")
# Layers kept of one run: of few runs many, of many runs few.
MOST_LAYERS, FEWEST_LAYERS, LAYERS_IN_ALL = 120, 48, 6_000
FOREIGN_NAMED = 10


@dataclass(frozen=True)
class StoredRun:
    """`run.json` of one folder, checked: every text is printable, every number finite.

    Attributes:
        number: its place in the results folder, oldest first; `Results.units` refers to it.
        name: of its folder.
        rows, step_rows: that its layers.csv and steps.csv must have.
    """

    number: int
    name: str
    path: Path
    spec: Spec
    options: RunOptions
    summary: Summary
    environment: dict[str, Any]
    warnings: tuple[str, ...]
    rows: int
    step_rows: int


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        runs: those that can be read, oldest first.
        units: their layers, see `profiles.COLUMNS`; means over the seeds, thinned.
        layers_kept: layers of one run that `units` holds at most, but for extremes.
        skipped: one line for each folder that was not read.
        notes: one line for each thing that does not fit together, see `consistency`.
        losses, heat: of the trained runs, see `trajectories.LOSSES` and `trajectories.HEAT`.
    """

    runs: tuple[StoredRun, ...]
    units: pl.DataFrame
    layers_kept: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    losses: pl.DataFrame
    heat: pl.DataFrame


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
    from gradflow.runs.profiles import read_units  # polars, 0.4 s
    from gradflow.runs.trajectories import read_heat, read_losses

    skipped: list[str] = []
    stored = list(_stored_runs(folder, skipped))
    layers = max(FEWEST_LAYERS, min(MOST_LAYERS, LAYERS_IN_ALL // max(len(stored), 1)))
    units, faults, broken = read_units(
        [(run.path / "layers.csv", run.rows) for run in stored], layers
    )
    trained = [run for run in stored if run.step_rows and run.number not in faults]
    losses, more = read_losses([(r.number, r.path / "steps.csv", r.step_rows) for r in trained])
    faults |= more
    skipped += [skip_line(stored[i].name, fault) for i, fault in sorted(faults.items())]
    runs = tuple(run for run in stored if run.number not in faults)
    if not runs:
        raise _nothing_to_read(folder, skipped)
    heat = read_heat([(r.number, r.path / "layers.csv") for r in trained if r.number not in more])
    return Results(runs, units, layers, tuple(skipped), tuple(_notes(runs, broken)), losses, heat)


def _notes(runs: Sequence[StoredRun], broken: Mapping[int, Broken]) -> Iterator[str]:
    for run in runs:
        lines = contradiction(run.name, run.summary.verdict, broken.get(run.number))
        yield from map(printable, lines)
    yield from map(printable, same_network([(run.name, run) for run in runs]))


def skip_line(name: str, reason: str) -> str:
    """The line that names a folder which is not read."""
    return printable(f"skipped {name}, which {reason}")


def _stored_runs(folder: Path, skipped: list[str]) -> Iterator[StoredRun]:
    number = 0
    for path in _run_folders(folder, skipped):
        try:
            yield _stored_run(number, path)
            number += 1
        except RunFolderError as error:
            skipped.append(skip_line(path.name, str(error).removeprefix(str(path)).strip()))


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
    skipped += [skip_line(path.name, "has no run.json") for path in incomplete]
    if foreign:
        more = f" and {len(foreign) - FOREIGN_NAMED} more" if len(foreign) > FOREIGN_NAMED else ""
        names = ", ".join(printable(path.name) for path in foreign[:FOREIGN_NAMED])
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
    try:
        about = _cleaned(plain(read_about(path)))
        return StoredRun(
            number=number,
            name=printable(path.name),
            path=path,
            spec=spec_from_json(about["spec"]),
            options=RunOptions.from_json(typed(RunOptions, about["options"])),
            summary=Summary(**typed(Summary, about["summary"])),
            environment=expect("environment", about["environment"], dict),
            warnings=tuple(expect_items("warnings", about["warnings"], str)),
            rows=expect("rows", expect("rows", about["rows"], dict)["layers"], int),
            step_rows=expect("rows", about["rows"].get("steps", 0), int),
        )
    except KeyError as error:
        raise RunFolderError(f"{path} is damaged: run.json lacks {error}") from None
    except (TypeError, ValueError, RecursionError, UsageError) as error:
        raise RunFolderError(f"{path} is damaged: run.json: {error}") from None


def _cleaned(value: Any, *, whole: bool = False) -> Any:
    if isinstance(value, dict):
        return {printable(key): _cleaned(item, whole=key in LISTS) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, str):
        return " ".join(map(printable, value.split(" "))) if whole else printable(value)
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise ValueError("holds a number that is too large")
    return value
