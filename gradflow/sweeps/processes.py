"""Cells measured side by side in spawned processes, one per core or one per GPU.

A worker gets a cell through its pipe and sends the outcome back. A pipe that closes is a death:
the parent sees that of a worker and gives its cell to another; a worker sees that of the parent,
even by kill -9, and ends after its cell.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

import torch

from gradflow.specs.grid import Cell
from gradflow.sweeps.cells import CellResult, local_environment, measure_cell

# A cell whose worker died is tried this often before it is reported.
_ATTEMPTS = 2


@dataclass
class _Worker:
    """A worker process; `cell` is what it works on, `index` tells which GPU it uses."""

    index: int
    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None


class Processes:
    """An executor of spawned worker processes.

    Args:
        workers: their number; by default one per core, or one per GPU where cells use those.
    """

    shared = False
    environment = staticmethod(local_environment)

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def outcomes(self, cells: Sequence[Cell]) -> Generator[CellResult]:
        """Measure side by side; no worker outlives the generator."""
        waiting, deaths = deque(cells), Counter[Cell]()
        pool: list[_Worker] = []
        try:
            for index in range(min(self.workers or _share(cells), len(cells))):
                pool.append(_started(index))
                _hand_out(pool[-1], waiting)
            while busy := {worker.pipe: worker for worker in pool if worker.cell}:
                for pipe in wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]  # it waits for what it was given
                    outcome = _collect(worker) or _bury(worker, waiting, deaths)
                    if not worker.process.is_alive() and waiting:
                        pool[worker.index] = worker = _started(worker.index)
                    _hand_out(worker, waiting)
                    if outcome:
                        yield outcome
        finally:
            for worker in pool:
                _stop(worker)


def _share(cells: Sequence[Cell]) -> int:
    gpus = max(_gpus(cell) for cell in cells) if cells else 0
    return gpus or len(os.sched_getaffinity(0))


def _gpus(cell: Cell) -> int:
    """How many GPUs a cell may choose from; 0 where it names its device."""
    return torch.cuda.device_count() if cell.options.device in ("auto", "cuda") else 0


def _started(index: int) -> _Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, index), daemon=True)
    with _interrupts_blocked():
        process.start()
    theirs.close()
    return _Worker(index, process, ours)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C reaches all processes of the terminal; those started here never notice.

    The parent decides what ends. A handler in the worker would come too late, in the middle of
    its imports; a blocked signal is inherited from the first instruction.
    """
    resource_tracker.ensure_running()  # its own start would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _interrupts_deferred():
            yield
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Another thread may take the signal, which Python then answers here: at the end, not inside.

    A worker whose parent breaks off its start would complain on the terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[tuple[int, FrameType | None]] = []
    answer = signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, answer)
    if seen and callable(answer):
        answer(*seen[0])


def _hand_out(worker: _Worker, waiting: deque[Cell]) -> None:
    worker.cell = waiting.popleft() if waiting else None
    if worker.cell:
        try:
            worker.pipe.send(worker.cell)
        except OSError:
            return  # it died meanwhile: `_collect` finds that out


def _collect(worker: _Worker) -> CellResult | None:
    """The outcome, or None where the worker has died."""
    try:
        outcome = worker.pipe.recv()
    except (EOFError, OSError):
        return None
    assert isinstance(outcome, CellResult)
    return outcome


def _bury(worker: _Worker, waiting: deque[Cell], deaths: Counter[Cell]) -> CellResult | None:
    """A dead worker's cell goes back to the queue, or is given up."""
    cell = worker.cell
    assert cell is not None
    _stop(worker)
    deaths[cell] += 1
    if deaths[cell] < _ATTEMPTS:
        waiting.appendleft(cell)
        return None
    return CellResult(cell, error=_obituary(worker.process.exitcode or 0, _ATTEMPTS))


def _obituary(exitcode: int, times: int) -> str:
    how = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    text = f"its worker process died {times} times ({how})"
    if exitcode == -signal.SIGKILL:
        text += "; too little memory is the usual cause: use fewer --workers, or a smaller stack"
    return text


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.terminate()
    worker.process.join()


def _work(pipe: Connection, index: int) -> None:
    """A worker's life: cells in, outcomes out, until the other end closes."""
    while True:
        try:
            cell = pipe.recv()
            gpus = _gpus(cell)
            pipe.send(measure_cell(cell, device=f"cuda:{index % gpus}" if gpus else None))
        except (EOFError, OSError):
            return
