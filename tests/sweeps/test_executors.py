"""Executors: the same numbers from each, errors in one line, deaths survived, nothing left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from executor_cells import NO_GPU, OPTIONS, TOO_LARGE, in_bytes, tiny

from gradflow.errors import MeasurementError, UsageError
from gradflow.specs.grid import Cell
from gradflow.sweeps import cells, processes
from gradflow.sweeps.cells import CellResult, Serial, make_executor
from gradflow.sweeps.processes import Processes

CELLS = [
    tiny(),
    NO_GPU,
    tiny(block="conv", image_size=4),
    TOO_LARGE,
    tiny(3, block="transformer", heads=2, seq_len=4, batch_size=2),
    tiny(3, norm="post", norm_kind="batchnorm", dtype="bfloat16"),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[Cell, CellResult]]:
    """The same cells by both executors of this machine."""
    return {
        "serial": {outcome.cell: outcome for outcome in Serial().outcomes(CELLS)},
        "processes": {outcome.cell: outcome for outcome in Processes(2).outcomes(CELLS)},
    }


def test_all_executors_write_the_same_bytes(
    outcomes: dict[str, dict[Cell, CellResult]], tmp_path: Path
) -> None:
    measured = [cell for cell, outcome in outcomes["serial"].items() if outcome.run]
    assert len(measured) == 4
    for cell in measured:
        serial, processes = (in_bytes(outcomes[name][cell], tmp_path) for name in outcomes)
        assert serial == processes


@pytest.mark.parametrize("name", ["serial", "processes"])
def test_errors_of_a_cell_are_one_line_and_the_others_are_kept(
    outcomes: dict[str, dict[Cell, CellResult]], name: str
) -> None:
    found = outcomes[name]
    assert list(found) == CELLS if name == "serial" else set(found) == set(CELLS)
    for cell, start in ((NO_GPU, "--device cuda"), (TOO_LARGE, "out of memory")):
        assert found[cell].run is None
        assert found[cell].error.startswith(start)
        assert "\n" not in found[cell].error


@pytest.mark.parametrize("name", ["serial", "processes"])
def test_a_run_keeps_the_options_of_its_cell(
    outcomes: dict[str, dict[Cell, CellResult]], name: str
) -> None:
    run = outcomes[name][CELLS[0]].run
    assert run
    assert (run.spec, run.options) == (CELLS[0].spec, CELLS[0].options)
    assert run.environment["threads"] == 1


@pytest.mark.slow
def test_the_command_line_is_that_of_the_parent(
    outcomes: dict[str, dict[Cell, CellResult]],
) -> None:
    runs = [outcomes[name][CELLS[0]].run for name in outcomes]
    assert runs[0]
    assert runs[1]
    assert runs[0].environment["argv"] == runs[1].environment["argv"]


# --- in this process ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UsageError("a rule", 1, "a remedy"), "a rule; got 1; a remedy"),
        (MeasurementError("out of memory"), "out of memory"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (MemoryError(), "MemoryError: no reason given"),
        (AssertionError("\n  indented\n"), "AssertionError: indented"),
    ],
)
def test_any_error_becomes_an_outcome(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cells, "measure_any", fail)
    (outcome,) = Serial().outcomes([tiny()])
    assert (outcome.run, outcome.error) == (None, text)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_not_caught(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cells, "measure_any", fail)
    with pytest.raises(error):
        list(Serial().outcomes([tiny()]))


def test_one_thread_while_a_cell_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    measure = cells.measure_any

    def spy(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return measure(*args)

    monkeypatch.setattr(cells, "measure_any", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(Serial().outcomes([tiny()]))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


# --- workers that die -----------------------------------------------------------------------


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [c for c in children if "spawn_main" in " ".join(_command_line(c))]


def _command_line(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return ()


@contextmanager
def killing(victims: int, how: Callable[[psutil.Process], None]) -> Iterator[None]:
    """Kill so many worker processes, each as soon as it is there."""

    def hunt() -> None:
        killed: set[int] = set()
        while len(killed) < victims and not over.wait(0.002):
            for worker in workers():
                if worker.pid not in killed:
                    killed.add(worker.pid)
                    how(worker)

    over = threading.Event()
    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield
    finally:
        over.set()
        hunter.join()


def kill(worker: psutil.Process) -> None:
    worker.send_signal(signal.SIGKILL)


def test_a_cell_is_tried_again_then_reported_and_the_others_are_kept() -> None:
    with killing(3, kill):
        found = list(Processes(1).outcomes([tiny(2), tiny(3), tiny(4)]))
    assert [outcome.cell for outcome in found] == [tiny(2), tiny(3), tiny(4)]
    assert found[0].run is None
    assert found[0].error.startswith("its worker process died 2 times (SIGKILL); too little memory")
    assert found[1].run  # at its second attempt
    assert found[2].run


def test_interrupts_do_not_reach_workers_and_none_is_left_at_the_end() -> None:
    """Ctrl-C goes to the whole group; a worker, importing or not, must not print a traceback."""
    sweep = Processes(1).outcomes([tiny(depth) for depth in range(2, 8)])
    with killing(1, lambda worker: worker.send_signal(signal.SIGINT)):
        assert next(sweep).run
    (worker,) = workers()
    worker.send_signal(signal.SIGINT)
    assert all(outcome.run for _, outcome in zip(range(3), sweep, strict=False))
    assert workers() == [worker]
    sweep.close()
    assert not workers()


def test_no_worker_for_no_cell() -> None:
    assert list(Processes().outcomes([])) == []


def test_the_signal_mask_is_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with processes._interrupts_blocked():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# --- choosing one ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cells", "kind"),
    [
        ("serial", 5, Serial),
        ("processes", 1, Processes),
        ("auto", 1, Serial),
        ("auto", 2, Processes),
    ],
)
def test_executors_by_name(name: str, cells: int, kind: type) -> None:
    assert isinstance(make_executor(name, cells), kind)


@pytest.mark.parametrize(
    ("name", "workers", "address", "says"),
    [
        ("threads", None, None, "use auto, serial, processes, ray"),
        ("serial", 2, None, "--workers"),
        ("ray", 2, None, "--workers"),
        ("processes", None, "auto", "--address"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, workers: int | None, address: str | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        make_executor(name, 2, workers, address)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'gradflow-bench\[ray\]'"):
        make_executor("ray", 2)


def test_workers_are_as_many_as_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert processes._share([tiny()]) == 3


def test_workers_are_one_per_gpu_where_cells_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    on_gpu = replace(tiny(), options=replace(OPTIONS, device="auto"))
    assert processes._share([tiny(), on_gpu]) == 4
