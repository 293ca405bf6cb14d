"""Timed passes of several networks in turn, alone in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from gradflow.engine.environment import resolve_device
from gradflow.engine.memory import available_bytes
from gradflow.engine.timing import Clock, Timer, clock_for, collector_paused, matmul_flop_per_s
from gradflow.errors import GradflowError, first_line
from gradflow.measuring.any import timed_bytes, timer_for
from gradflow.runs.records import Timing
from gradflow.specs.grid import Cell

_Summarise = Callable[[Sequence[tuple[Any, float]], Sequence[float]], Timing | None]
# (cell that had its turn, round from 0 for the warm-up, rounds that are wanted)
_OnTurn = Callable[[Cell, int, int], None]


class Rounds:
    """Timed passes of cells in turn, round after round.

    Networks stay resident while they fit into half of the free memory; else each is built anew
    for its turn, and warmed up again. `passes` has what each cell's passes found, round by round,
    with the seconds of each; `failed` has the reason for each cell that could not be timed.
    """

    def __init__(self, cells: Sequence[Cell], clock: Clock | None = None) -> None:
        self.cells, self._clock = list(cells), clock
        self.passes: dict[Cell, list[tuple[Any, float]]] = {cell: [] for cell in cells}
        self.failed: dict[Cell, str] = {}
        self._timers: dict[Cell, Timer] = {}
        self._summaries: dict[Cell, _Summarise] = {}
        self._rates: dict[tuple[str, str], float] = {}
        self._resident = _fit_together(self.cells)

    def run(self, tick: _OnTurn = lambda *_: None) -> None:
        """Run a warm-up round, then rounds until repeats and time budget are reached."""
        repeats = max(cell.options.repeats for cell in self.cells)
        budget = max(cell.options.time_budget for cell in self.cells)
        count, spent = 0, 0.0
        with collector_paused():
            while count <= repeats or (spent < budget and len(self.failed) < len(self.cells)):
                for cell in self.cells:
                    spent += self._turn(cell, warm_up=count == 0)
                    tick(cell, count, repeats)
                count += 1
        self._timers.clear()

    def timing(self, cell: Cell) -> Timing | None:
        """Return the times of one cell; None where no unit of it could be timed."""
        found = self._summaries[cell](self.passes[cell], ())
        return found and replace(found, matmul_flop_per_s=self._matmul_rate(cell))

    def _matmul_rate(self, cell: Cell) -> float:
        """Multiplications per second of the cell's device in its dtype, measured once."""
        kind = (cell.options.device, cell.spec.dtype)
        if kind not in self._rates:
            device = resolve_device(*kind)
            clock = self._clock or clock_for(device)
            self._rates[kind] = matmul_flop_per_s(device, cell.spec.dtype, clock)
        return self._rates[kind]

    def _turn(self, cell: Cell, *, warm_up: bool) -> float:
        """One pass, noted unless it is the warm-up; returns its seconds."""
        if cell in self.failed:
            return 0.0
        try:
            device = resolve_device(cell.options.device, cell.spec.dtype)
            timer = self._timer(cell, device)
            clock = self._clock or clock_for(device)
            if not warm_up and not self._resident:
                timer.timed(clock)
            found = timer.timed(clock)
        except (GradflowError, RuntimeError, MemoryError) as error:
            self.failed[cell] = f"not timed: {first_line(error)}"
            return 0.0
        if warm_up:
            return 0.0
        self.passes[cell].append(found)
        return found[1]

    def _timer(self, cell: Cell, device: torch.device) -> Timer:
        """The timer of the cell's first seed."""
        if cell in self._timers:
            return self._timers[cell]
        if not self._resident:
            self._timers.clear()
        timer = timer_for(cell.spec, cell.options, device)
        self._timers[cell], self._summaries[cell] = timer, timer.summary
        return timer


def _fit_together(cells: Sequence[Cell]) -> bool:
    devices = {cell: resolve_device(cell.options.device, cell.spec.dtype) for cell in cells}
    needed = sum(timed_bytes(cell.spec, cell.options, device) for cell, device in devices.items())
    return needed < min(map(available_bytes, set(devices.values()))) / 2
