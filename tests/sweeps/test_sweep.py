"""A sweep measures what is missing, once, times all in turn, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock

from gradflow.engine import compiled, timing
from gradflow.errors import MeasurementError, UsageError
from gradflow.measuring.stack import measure
from gradflow.runs import store
from gradflow.runs.records import Run
from gradflow.runs.staging import STAGING
from gradflow.specs.grid import Cell, expand
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.sweeps import rounds
from gradflow.sweeps.cells import CellResult, Serial
from gradflow.sweeps.sweep import SHELF_PREFIX, Sweep, shelf_in, sweep

LISTS: dict[str, list[Any]] = {
    "block": ["mlp"],
    "width": [4],
    "batch_size": [2],
    "depth": [1, 2, 3],
    "device": ["cpu"],
    "repeats": [2],
    "time_budget": [1e-9],
}


def cells(**lists: list[Any]) -> tuple[Cell, ...]:
    return expand(LISTS | lists).cells


@dataclass
class Counting(Serial):
    """Measures here and counts; `failing` cells have an error; stops before cell `stop`."""

    shared: bool = False
    stop: int | None = None
    failing: tuple[Cell, ...] = ()
    measured: list[Cell] = field(default_factory=list)

    def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
        for cell in cells:
            if len(self.measured) == self.stop:
                raise KeyboardInterrupt
            self.measured.append(cell)
            (outcome,) = super().outcomes([cell])
            yield (
                CellResult(cell, error="it failed") if cell in self.failing else self.sent(outcome)
            )

    def sent(self, outcome: CellResult) -> CellResult:
        """As a cluster would send it: timed there, beside others."""
        if not self.shared or outcome.run is None:
            return outcome
        run = measure(outcome.cell.spec, outcome.cell.options)
        return replace(outcome, run=replace(run, environment=run.environment | {"contended": True}))


def run_sweep(
    out: Path, wanted: Sequence[Cell] | None = None, executor: Counting | None = None, **how: Any
) -> tuple[Sweep, Counting]:
    executor = executor or Counting()
    how = {"clock": FakeClock([1.0])} | how
    return sweep(cells() if wanted is None else wanted, out, executor, **how), executor


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


def waits_for_times(out: Path) -> list[Path]:
    return sorted(out.glob(f"{SHELF_PREFIX}*/cell-*"))


# --- the first time ---------------------------------------------------------------------------


def test_every_cell_is_measured_timed_and_stored(tmp_path: Path) -> None:
    done, executor = run_sweep(tmp_path)
    assert executor.measured == list(cells())
    assert list(done.runs) == list(cells())
    assert not (done.failures)
    assert not (done.reused)
    assert not (done.resumed)
    assert len(store.run_folders(tmp_path)) == 3
    assert hidden(tmp_path) == []
    for cell, run in done.runs.items():
        assert run.path
        stored = store.load(run.path)
        assert (stored.spec, stored.options) == (cell.spec, cell.options)
        assert len(stored.time_records) == 2 * cell.spec.depth
        assert stored.summary.forward_s_per_layer == 1.0
        assert stored.param_records


def test_cells_of_one_sweep_took_turns_and_say_so(tmp_path: Path) -> None:
    first, _ = run_sweep(tmp_path / "a")
    second, _ = run_sweep(tmp_path / "b")
    names = [{run.environment["sweep"] for run in done.runs.values()} for done in (first, second)]
    assert len(names[0]) == len(names[1]) == 1
    assert names[0] != names[1]


def test_without_timing_each_result_is_at_its_place_as_it_comes(tmp_path: Path) -> None:
    seen = []

    class Watching(Counting):
        def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
            for outcome in super().outcomes(cells):
                yield outcome
                seen.append(len(store.run_folders(tmp_path)))

    run_sweep(tmp_path, cells(timing=[False]), Watching())
    assert seen == [1, 2, 3]
    assert hidden(tmp_path) == []


def test_statistics_are_on_the_shelf_as_they_come(tmp_path: Path) -> None:
    seen = []

    class Watching(Counting):
        def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
            for outcome in super().outcomes(cells):
                yield outcome
                seen.append(len(waits_for_times(tmp_path)))

    run_sweep(tmp_path, executor=Watching())
    assert seen == [1, 2, 3]


def test_cells_that_share_a_key_do_not_share_a_place(tmp_path: Path) -> None:
    wanted = cells(depth=[1], vanishing=[2.0, 3.0])
    done, executor = run_sweep(tmp_path, wanted)
    assert len(executor.measured) == len(done.runs) == len(store.run_folders(tmp_path)) == 2
    again, executor = run_sweep(tmp_path, wanted)
    assert executor.measured == []
    assert [run.options.vanishing for run in again.runs.values()] == [2.0, 3.0]


def test_progress_rises_to_its_end(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    run_sweep(tmp_path, progress=lambda *step: steps.append(step))
    done = [step[1] for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1][2] == sum(depth * (1 + 3) for depth in (1, 2, 3))
    assert {what for what, _, _ in steps} >= {"measured 3 of 3", "warming up"}
    assert steps[-1][0] == "timing, round 2 of 2"


# --- again -------------------------------------------------------------------------------------


def test_the_same_again_measures_nothing(tmp_path: Path) -> None:
    first, _ = run_sweep(tmp_path)
    again, executor = run_sweep(tmp_path, clock=NEVER)
    assert executor.measured == []
    assert again.reused == list(cells())
    assert [run.path for run in again.runs.values()] == [run.path for run in first.runs.values()]


class _Never:
    def mark(self) -> None:
        raise AssertionError("nothing is to be timed")

    seconds = mark


NEVER: Any = _Never()


def test_fresh_measures_all_anew_and_keeps_the_old(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    _, executor = run_sweep(tmp_path, fresh=True)
    assert len(executor.measured) == 3
    assert len(store.run_folders(tmp_path)) == 6


def test_the_newest_of_two_is_taken(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    fresh, _ = run_sweep(tmp_path, fresh=True)
    again, _ = run_sweep(tmp_path)
    assert [run.path for run in again.runs.values()] == [run.path for run in fresh.runs.values()]


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    run_sweep(tmp_path, cells(depth=[2]))
    done, executor = run_sweep(tmp_path)
    assert [cell.spec.depth for cell in executor.measured] == [1, 3]
    assert list(done.runs) == list(cells())


def stored_run(out: Path, **options: Any) -> Run:
    """What `gradflow run` leaves of the cell of depth 1."""
    chosen = {"device": "cpu", "repeats": 2, "time_budget": 1e-9} | options
    return store.save(measure(cells()[0].spec, RunOptions(**chosen)), out)


def test_a_run_of_gradflow_run_stands_for_its_cell(tmp_path: Path) -> None:
    run = stored_run(tmp_path, repeats=5)
    done, executor = run_sweep(tmp_path, cells(depth=[1]))
    assert executor.measured == []
    assert [found.path for found in done.runs.values()] == [run.path]


@pytest.mark.parametrize(
    "options",
    [{"seeds": 2}, {"seed": 1}, {"raw_range": True}, {"vanishing": 2.0}, {"exploding": 2.0}],
)
def test_a_run_of_other_options_does_not(tmp_path: Path, options: dict[str, Any]) -> None:
    stored_run(tmp_path, **options)
    _, executor = run_sweep(tmp_path, cells(depth=[1]))
    assert len(executor.measured) == 1


def test_a_compiled_run_stands_for_no_eager_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    run = stored_run(tmp_path, compile=True)
    done, executor = run_sweep(tmp_path, cells(depth=[1]))
    assert len(executor.measured) == 1
    done, executor = run_sweep(tmp_path, cells(depth=[1], compile=[True]))
    assert executor.measured == []
    assert [found.path for found in done.runs.values()] == [run.path]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch", "1.0"),
        ("device_name", "another"),
        ("gradflow", "0.0.1"),
        ("matmul_precision", "medium"),
        ("device", "cuda"),
        ("dtype", "float16"),
    ],
)
def test_a_run_of_another_environment_does_not(tmp_path: Path, key: str, value: str) -> None:
    change_environment(stored_run(tmp_path), **{key: value})
    _, executor = run_sweep(tmp_path, cells(depth=[1]))
    assert len(executor.measured) == 1


def change_environment(run: Run, **changes: Any) -> None:
    assert run.path
    file = run.path / "run.json"
    about = json.loads(file.read_text())
    about["environment"] |= changes
    file.write_text(json.dumps(about))


# --- statistics without times -------------------------------------------------------------------

UNTIMED: list[tuple[str, Callable[[Path], Any]]] = [
    ("no times", lambda out: stored_run(out, timing=False)),
    ("too few repeats", lambda out: stored_run(out, repeats=1)),
    ("other threads", lambda out: change_environment(stored_run(out), threads=99)),
    ("contended", lambda out: change_environment(stored_run(out), contended=True)),
]


@pytest.mark.parametrize(("_", "store_one"), UNTIMED, ids=[name for name, _ in UNTIMED])
def test_where_the_times_are_no_answer_only_they_are_taken(
    tmp_path: Path, _: str, store_one: Callable[[Path], Any]
) -> None:
    store_one(tmp_path)
    (old,) = store.run_folders(tmp_path)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    done, executor = run_sweep(tmp_path, cells(depth=[1]))
    (run,) = done.runs.values()
    assert (executor.measured, done.resumed) == ([], list(cells(depth=[1])))
    assert len({record.repeat for record in run.time_records}) == 2
    assert run.environment["threads"] == 1
    assert not run.environment["contended"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert len(store.run_folders(tmp_path)) == 2
    assert hidden(tmp_path) == []


def test_times_that_were_not_asked_for_do_not_matter(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    done, executor = run_sweep(tmp_path, cells(timing=[False]))
    assert (executor.measured, len(done.reused)) == ([], 3)


# --- stopped ------------------------------------------------------------------------------------


def stopped(out: Path, executor: Counting | None = None, **how: Any) -> None:
    with suppress(KeyboardInterrupt):
        run_sweep(out, executor=executor, **how)
        pytest.fail("it was not stopped")


def test_stopped_while_measuring_it_goes_on(tmp_path: Path) -> None:
    stopped(tmp_path, Counting(stop=2))
    assert len(waits_for_times(tmp_path)) == 2
    assert store.run_folders(tmp_path) == []
    done, executor = run_sweep(tmp_path)
    assert executor.measured == [cells()[2]]
    assert done.resumed == list(cells()[:2])
    assert len(store.run_folders(tmp_path)) == len(done.runs) == 3
    assert hidden(tmp_path) == []


class Stopping(FakeClock):
    def mark(self) -> float:
        raise KeyboardInterrupt


def test_stopped_while_timing_it_goes_on(tmp_path: Path) -> None:
    stopped(tmp_path, clock=Stopping([1.0]))
    done, executor = run_sweep(tmp_path)
    assert executor.measured == []
    assert all(run.time_records for run in done.runs.values())
    assert hidden(tmp_path) == []


def test_the_numbers_are_those_that_were_measured_before_the_stop(tmp_path: Path) -> None:
    stopped(tmp_path, clock=Stopping([1.0]))
    before = {
        store.load(path).spec: store.load(path).environment["duration_s"]
        for path in waits_for_times(tmp_path)
    }
    done, _ = run_sweep(tmp_path)
    after = {run.spec: run.environment["duration_s"] for run in done.runs.values()}
    assert after == before


def test_stopped_while_timing_and_then_wanted_without(tmp_path: Path) -> None:
    stopped(tmp_path, clock=Stopping([1.0]))
    done, executor = run_sweep(tmp_path, cells(timing=[False]), clock=NEVER)
    assert executor.measured == []
    assert len(store.run_folders(tmp_path)) == len(done.reused) == 3
    assert hidden(tmp_path) == []


def test_what_other_sweeps_left_waits_for_them(tmp_path: Path) -> None:
    stopped(tmp_path, clock=Stopping([1.0]))
    run_sweep(tmp_path, cells(depth=[7]))
    assert len(waits_for_times(tmp_path)) == 3
    _, executor = run_sweep(tmp_path)
    assert executor.measured == []
    assert hidden(tmp_path) == []


def test_what_was_left_and_is_no_answer_any_more_goes(tmp_path: Path) -> None:
    stopped(tmp_path, clock=Stopping([1.0]))
    for path in waits_for_times(tmp_path):
        change_environment(store.load(path), torch="1.0")
    _, executor = run_sweep(tmp_path)
    assert len(executor.measured) == 3
    assert hidden(tmp_path) == []


def test_debris_of_a_killed_save_goes(tmp_path: Path) -> None:
    stopped(tmp_path, Counting(stop=2))
    (shelf,) = tmp_path.glob(f"{SHELF_PREFIX}*")
    for place in (tmp_path, shelf):
        (place / f"{STAGING}killed").mkdir()
        (place / f"{STAGING}killed" / "layers.csv").write_text("half")
    damaged, _ = waits_for_times(tmp_path)
    (damaged / "layers.csv").write_text("")
    _, executor = run_sweep(tmp_path)
    assert len(executor.measured) == 2
    assert hidden(tmp_path) == []


def test_debris_goes_also_where_nothing_is_measured(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    (tmp_path / f"{STAGING}killed").mkdir()
    run_sweep(tmp_path)
    assert hidden(tmp_path) == []


def test_two_living_sweeps_leave_each_other_alone(tmp_path: Path) -> None:
    with shelf_in(tmp_path) as other:
        (outcome,) = Serial().outcomes(cells()[:1])
        assert outcome.run
        theirs = other.put(outcome.cell, outcome.run)
        done, executor = run_sweep(tmp_path)
        assert len(executor.measured) == len(done.runs) == 3
        assert store.load(theirs).spec == cells()[0].spec
        other.drop(theirs)
    assert hidden(tmp_path) == []


def test_a_shelf_drops_only_what_is_its_own(tmp_path: Path) -> None:
    run = stored_run(tmp_path)
    assert run.path
    with shelf_in(tmp_path) as shelf:
        shelf.drop(run.path)
    assert run.path.is_dir()


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_cell_that_fails_is_reported_and_the_others_are_kept(tmp_path: Path) -> None:
    one, two, three = cells()
    done, _ = run_sweep(tmp_path, executor=Counting(failing=(two,)))
    assert done.failures == [(two, "it failed")]
    assert list(done.runs) == [one, three]


def test_a_cell_that_fails_in_timing_is_stored_without_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_units = timing.mark_units

    def fail(network: Any, clock: Any) -> Any:
        if len(network.blocks) == 2:
            raise RuntimeError("out of memory\nand a page of text")
        return mark_units(network, clock)

    monkeypatch.setattr(timing, "mark_units", fail)
    one, two, three = cells()
    done, _ = run_sweep(tmp_path)
    assert done.failures == [(two, "not timed: out of memory")]
    assert [bool(done.runs[cell].time_records) for cell in (one, two, three)] == [1, 0, 1]
    assert hidden(tmp_path) == []
    monkeypatch.undo()
    done, executor = run_sweep(tmp_path)
    assert (executor.measured, done.resumed, done.failures) == ([], [two], [])


def test_a_full_disk_ends_the_sweep_and_what_was_stored_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_as, left = store.save_as, [2]

    def fill_up(*args: Any) -> Path:
        if not left[0]:
            raise MeasurementError("disk full")
        left[0] -= 1
        return save_as(*args)

    monkeypatch.setattr(store, "save_as", fill_up)
    with pytest.raises(MeasurementError, match="disk full"):
        run_sweep(tmp_path)
    monkeypatch.undo()
    _, executor = run_sweep(tmp_path)
    assert executor.measured == [cells()[2]]


def test_a_disk_without_room_for_the_shelf_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradflow.sweeps.sweep.locked_folder", full)
    with pytest.raises(MeasurementError, match="disk full"):
        run_sweep(tmp_path)


def test_statistics_that_vanish_are_a_failure_of_their_cell(tmp_path: Path) -> None:
    class Deleting(FakeClock):
        def mark(self) -> float:
            if waits_for_times(tmp_path):
                shutil.rmtree(waits_for_times(tmp_path)[0])
            return super().mark()

    done, _ = run_sweep(tmp_path, clock=Deleting([1.0]))
    assert len(done.failures) == 3
    assert all(reason.startswith("its statistics are gone") for _, reason in done.failures)


def test_a_damaged_run_is_measured_again_and_left_as_it_is(tmp_path: Path) -> None:
    run = stored_run(tmp_path)
    assert run.path
    (run.path / "layers.csv").write_text("nothing\n")
    _, executor = run_sweep(tmp_path, cells(depth=[1]))
    assert len(executor.measured) == 1
    assert (run.path / "layers.csv").read_text() == "nothing\n"


def test_a_device_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    executor = Counting()
    with pytest.raises(UsageError, match="--device cuda"):
        run_sweep(tmp_path, cells(device=["cpu", "cuda:77"]), executor)
    assert executor.measured == []


# --- a cluster ----------------------------------------------------------------------------------


def test_what_a_cluster_timed_is_stored_as_it_comes_and_not_timed_here(tmp_path: Path) -> None:
    done, _ = run_sweep(tmp_path, executor=Counting(shared=True), clock=NEVER)
    assert all(run.environment["contended"] and run.time_records for run in done.runs.values())
    again, executor = run_sweep(tmp_path, executor=Counting(shared=True), clock=NEVER)
    assert (executor.measured, len(again.reused)) == ([], 3)


def test_times_of_a_cluster_are_no_answer_here_but_its_statistics_are(tmp_path: Path) -> None:
    run_sweep(tmp_path, executor=Counting(shared=True))
    done, executor = run_sweep(tmp_path)
    assert (executor.measured, len(done.resumed)) == ([], 3)


def test_a_cluster_does_not_touch_what_waits_for_times(tmp_path: Path) -> None:
    stopped(tmp_path, clock=Stopping([1.0]))
    run_sweep(tmp_path, executor=Counting(shared=True))
    assert len(waits_for_times(tmp_path)) == 3


# --- rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "warm"), [(2**40, 0), (0, 1)], ids=["resident", "rebuilt"])
def test_cells_take_turns(monkeypatch: pytest.MonkeyPatch, free: int, warm: int) -> None:
    turns: list[int] = []
    mark_units = timing.mark_units

    def spy(network: Any, clock: Any) -> Any:
        turns.append(len(network.blocks))
        return mark_units(network, clock)

    monkeypatch.setattr(timing, "mark_units", spy)
    monkeypatch.setattr(rounds, "available_bytes", lambda _: free)
    taken = rounds.Rounds(cells(), FakeClock([1.0]))
    taken.run()
    once = [depth for depth in (1, 2, 3) for _ in range(1 + warm)]
    assert turns == [1, 2, 3] + 2 * once
    assert [len(taken.passes[cell]) for cell in cells()] == [2, 2, 2]


def test_rounds_go_on_until_the_time_budget_is_spent() -> None:
    # A pass of depth d has 2 d steps of a second: a round takes 12.
    taken = rounds.Rounds(cells(time_budget=[50.0]), FakeClock([1.0]))
    taken.run()
    assert {len(passes) for passes in taken.passes.values()} == {5}


def test_rounds_end_where_no_cell_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(rounds, "timer_for", fail)
    taken = rounds.Rounds(cells(time_budget=[50.0]), FakeClock([1.0]))
    taken.run()
    assert set(taken.failed.values()) == {"not timed: no reason given"}


def test_networks_are_those_of_the_first_seed() -> None:
    taken = rounds.Rounds(cells(seed=[5], depth=[1]), FakeClock([1.0]))
    taken.run()
    found = taken.timing(cells(seed=[5], depth=[1])[0])
    assert found is not None
    assert {(row.layer, row.unit) for row in found.repeats} == {(1, "mlp")}


def test_a_spec_is_what_its_cell_says() -> None:
    assert cells()[0].spec == StackSpec(depth=1, block="mlp", width=4, batch_size=2)
