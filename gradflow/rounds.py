"""Timed passes of several networks in turn, alone in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gradflow.environment import resolve_device
from gradflow.errors import GradflowError
from gradflow.executors import first_line
from gradflow.grid import Cell
from gradflow.measurement import build_timed
from gradflow.memory import available_bytes, footprint, make_plan, resident_bytes
from gradflow.tape import Network
from gradflow.timing import Clock, Pass, clock_for, collector_paused, timed_pass, unit_names

# (cell that had its turn, round from 0 for the warm-up, rounds that are wanted)
Tick = Callable[[Cell, int, int], None]


class Rounds:
    """One pass of every cell in turn, round after round.

    Networks stay resident while they fit into half of the free memory; else each is built anew
    for its turn, and warmed up again.

    Attributes:
        passes: seconds of each cell, round by round.
        units: layer and name of each cell's units.
        failed: cells that could not be timed, with the reason.
    """

    def __init__(self, cells: Sequence[Cell], clock: Clock | None = None) -> None:
        self.cells, self._clock = list(cells), clock
        self.passes: dict[Cell, list[Pass]] = {cell: [] for cell in cells}
        self.units: dict[Cell, list[tuple[int, str]]] = {}
        self.failed: dict[Cell, str] = {}
        self._networks: dict[Cell, Network] = {}
        self._resident = _fit_together(self.cells)

    def run(self, tick: Tick = lambda *_: None) -> None:
        """A warm-up round, then rounds until repeats and time budget are reached."""
        repeats = max(cell.options.repeats for cell in self.cells)
        budget = max(cell.options.time_budget for cell in self.cells)
        count, spent = 0, 0.0
        with collector_paused():
            while count <= repeats or (spent < budget and len(self.failed) < len(self.cells)):
                for cell in self.cells:
                    spent += self._turn(cell, warm_up=count == 0)
                    tick(cell, count, repeats)
                count += 1
        self._networks.clear()

    def _turn(self, cell: Cell, *, warm_up: bool) -> float:
        """One pass, noted unless it is the warm-up; returns its seconds."""
        if cell in self.failed:
            return 0.0
        try:
            network = self._network(cell)
            clock = self._clock or clock_for(network.x.device)
            if not warm_up and not self._resident:
                timed_pass(network, clock)
            seconds = timed_pass(network, clock)
        except (GradflowError, RuntimeError, MemoryError) as error:
            self.failed[cell] = f"not timed: {first_line(error)}"
            return 0.0
        if warm_up:
            return 0.0
        self.passes[cell].append(seconds)
        return sum(map(sum, seconds))

    def _network(self, cell: Cell) -> Network:
        """The cell's first seed, on its device."""
        if cell in self._networks:
            return self._networks[cell]
        if not self._resident:
            self._networks.clear()
        device = resolve_device(cell.options.device, cell.spec.dtype)
        plan = make_plan(cell.spec, cell.options, device)
        network = build_timed(cell.spec, cell.options.seed, device, plan)
        self._networks[cell] = network
        self.units[cell] = unit_names(network)
        return network


def _fit_together(cells: Sequence[Cell]) -> bool:
    devices = [resolve_device(cell.options.device, cell.spec.dtype) for cell in cells]
    sizes = [_timed_bytes(cell, device) for cell, device in zip(cells, devices, strict=True)]
    return sum(sizes) < min(map(available_bytes, set(devices))) / 2


def _timed_bytes(cell: Cell, device: torch.device) -> int:
    plan = make_plan(cell.spec, cell.options, device)
    return resident_bytes(footprint(cell.spec, cell.options.seed, device), plan.timed)
