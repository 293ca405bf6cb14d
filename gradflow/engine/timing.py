"""Seconds per unit, in passes of their own that carry no statistics.

Timed passes and bare passes (the same network, forward + backward by torch alone) take turns, so
that drift of the machine hits both alike; the sum over units is then held against the bare pass.
On CUDA the marks are events in the stream: nothing waits for the device inside a pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from gradflow.engine.flops import network_flops
from gradflow.engine.tape import Network, record_forward
from gradflow.engine.walk import loss_gradient, vjp
from gradflow.networks.initial import generator
from gradflow.runs.records import TimeRecord, Timing
from gradflow.specs.run_options import RunOptions

# Forward seconds and backward seconds of each unit in one pass, first to last.
UnitSeconds = tuple[list[float], list[float]]
_ResultT = TypeVar("_ResultT")


class Clock(Protocol):
    """Marks moments in the work, and reads the seconds between them once the work is done."""

    def mark(self) -> Any:
        """Return a mark behind all work issued so far."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Return the seconds from each mark to the next; may wait for the device."""


class CpuClock:
    """Wall clock, for work that is done when its call returns."""

    def mark(self) -> float:
        """Return the seconds of the monotonic clock."""
        return perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Return the differences of neighbouring marks."""
        return [after - before for before, after in pairwise(marks)]


class CudaClock:
    """Events in the current stream of a CUDA device; of the current device if None.

    The events are external: captured in a CUDA graph, they are recorded anew by every replay.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Return an event behind all work issued so far."""
        event = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]  # torch's stubs
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Wait for all work, then read the events."""
        torch.cuda.current_stream(self._device).synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def clock_for(device: torch.device) -> Clock:
    """Return the clock that fits the device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Repeat(Protocol):
    """Makes a piece of work repeatable without issuing it from Python again."""

    def __call__(self, work: Callable[[], _ResultT], /) -> Callable[[], _ResultT]:
        """Return a function that does the work at every call and returns its result."""


@dataclass(frozen=True)
class Timer:
    """How one network is timed.

    Attributes:
        timed: runs one timed pass; returns its times by unit, and the seconds of the whole.
        bare: runs the same pass by torch alone; returns its seconds.
        summary: returns the `Timing` of several results of `timed` and of `bare`; None where no
            unit could be timed.
    """

    timed: Callable[[Clock], tuple[Any, float]]
    bare: Callable[[Clock], float]
    summary: Callable[[Sequence[tuple[Any, float]], Sequence[float]], Timing | None]


def take_times(
    timer: Timer, options: RunOptions, clock: Clock, tick: Callable[[], None] = lambda: None
) -> Timing | None:
    """Time forward and backward of every unit.

    After one warm-up of each kind, timed and bare passes take turns until there are
    `options.repeats` of them and `options.time_budget` seconds are spent; `tick` is called after
    each pair of passes.
    """
    passes: list[tuple[Any, float]] = []
    bare: list[float] = []
    spent = 0.0
    with collector_paused():
        timer.timed(clock)
        timer.bare(clock)
        while len(passes) < options.repeats or spent < options.time_budget:
            passes.append(timer.timed(clock))
            bare.append(timer.bare(clock))
            spent += passes[-1][1] + bare[-1]
            tick()
    return timer.summary(passes, bare)


def stack_timer(network: Network, repeat: Repeat | None = None) -> Timer:
    """Return the timer of a stack; its passes leave the parameters' `.grad` at None.

    They run eagerly, unless `repeat` makes them repeatable.
    """
    units = _issued(mark_units, network, repeat)
    whole = _issued(mark_bare, network, repeat)

    def timed(clock: Clock) -> tuple[UnitSeconds, float]:
        found = _unit_seconds(*units(clock), clock)
        return found, sum(map(sum, found))

    def bare(clock: Clock) -> float:
        return clock.seconds(whole(clock))[0]

    # Not the network itself: it may have to go before the summary.
    names, flops = unit_names(network), network_flops(network)

    def summary(passes: Sequence[tuple[UnitSeconds, float]], bare: Sequence[float]) -> Timing:
        return replace(summarise_times(names, [units for units, _ in passes], bare), flops=flops)

    return Timer(timed, bare, summary)


def _issued(
    mark: Callable[[Network, Clock], _ResultT], network: Network, repeat: Repeat | None
) -> Callable[[Clock], _ResultT]:
    """Return a pass with its marks, which is made repeatable at its first call."""
    if repeat is None:
        return partial(mark, network)
    made: list[Callable[[], _ResultT]] = []

    def issue(clock: Clock) -> _ResultT:
        if not made:  # later clocks of the device read these marks as well
            made.append(repeat(partial(mark, network, clock)))
        return made[0]()

    return issue


def timed_pass(network: Network, clock: Clock) -> UnitSeconds:
    """Return forward and backward seconds of each unit in one pass."""
    return _unit_seconds(*mark_units(network, clock), clock)


def bare_pass(network: Network, clock: Clock) -> float:
    """Return the seconds of one forward + backward through the whole stack by torch alone."""
    return clock.seconds(mark_bare(network, clock))[0]


def mark_units(network: Network, clock: Clock) -> tuple[list[Any], list[Any]]:
    """Run one pass unit by unit; return marks around each forward, and around each backward."""
    tapes = []
    marks = [clock.mark()]
    for tape in record_forward(network):
        tapes.append(tape)
        marks.append(clock.mark())
    forward = marks
    _, g = loss_gradient(network.loss, tapes[-1].y)
    marks = [clock.mark()]
    while tapes:
        parts, _ = vjp(tapes.pop(), g)
        g = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        marks.append(clock.mark())
    return forward, marks


def _unit_seconds(forward: list[Any], backward: list[Any], clock: Clock) -> UnitSeconds:
    return clock.seconds(forward), clock.seconds(backward)[::-1]


def mark_bare(network: Network, clock: Clock) -> list[Any]:
    """Run one forward + backward through the stack by torch alone; return marks at its ends."""
    marks = [clock.mark()]
    y = network.x.detach().requires_grad_()
    for block in network.blocks:
        y = block(y)
    network.loss(y).backward()
    marks.append(clock.mark())
    for block in network.blocks:
        block.zero_grad()
    network.loss.zero_grad()
    return marks


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause garbage collection, which would strike single units at random."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unit_names(network: Network) -> list[tuple[int, str]]:
    """Return layer and name of each unit, first to last."""
    layers = network.layers or range(1, len(network.blocks) + 1)
    return [
        (layer, unit.name)
        for layer, block in zip(layers, network.blocks, strict=True)
        for unit in block.units
    ]


def summarise_times(
    units: Sequence[tuple[int, str]],
    passes: Sequence[UnitSeconds],
    bare: Sequence[float] = (),
    totals: Sequence[float] = (),
) -> Timing:
    """Return medians and interquartile ranges over repeated passes.

    Args:
        units: layer and name of each unit, see `unit_names`.
        passes: results of `timed_pass`, repeat by repeat.
        bare: results of `bare_pass`; empty if there are none.
        totals: seconds of the whole passes, where they are more than their units.
    """
    table = np.array(passes)  # repeats x (forward, backward) x units
    low, median, high = np.percentile(table, (25, 50, 75), axis=0)
    iqr = high - low
    total_low, total, total_high = np.percentile(totals or table.sum(axis=(1, 2)), (25, 50, 75))
    rows = np.stack((median[0], iqr[0], median[1], iqr[1]), axis=1).tolist()
    return Timing(
        units=tuple((f, fi, b, bi) for f, fi, b, bi in rows),
        repeats=tuple(_records(units, passes)),
        total_s=float(total),
        bare_s=float(np.median(bare)) if bare else None,
        bare_iqr_s=float(np.subtract(*np.percentile(bare, (75, 25)))) if bare else None,
        spread=float((total_high - total_low) / total),
    )


def _records(
    names: Sequence[tuple[int, str]], passes: Sequence[UnitSeconds]
) -> Iterator[TimeRecord]:
    for repeat, (forward, backward) in enumerate(passes):
        for (layer, unit), f, b in zip(names, forward, backward, strict=True):
            yield TimeRecord(repeat, layer, unit, f, b)


# A product that takes less than this is mostly its launch. Twice the size takes 8 times as long, so
# all products of a measurement take about a tenth of a second.
LONG_ENOUGH_S = 2e-3
SMALLEST = 256
_REPEATS = 3
_LARGEST = {"cpu": 2048, "cuda": 8192}


def matmul_flop_per_s(device: torch.device, dtype: str, clock: Clock) -> float:
    """Return the FLOP/s of a square matrix product, the median of a few.

    Their number format is `dtype`; float32 has the matmul precision that is set.
    """
    size = SMALLEST
    seconds = product_seconds(size, device, dtype, clock)
    while seconds < LONG_ENOUGH_S and size < _LARGEST[device.type]:
        size *= 2
        seconds = product_seconds(size, device, dtype, clock)
    return 2 * size**3 / seconds


def product_seconds(size: int, device: torch.device, dtype: str, clock: Clock) -> float:
    """Return the median seconds of a product of two size x size matrices, after a warm-up."""
    source = generator(device, 0, "matmul")
    wide = torch.empty(size, size, device=device).normal_(generator=source)
    a = wide.to(getattr(torch, dtype))
    out = a @ a
    marks = [clock.mark()]
    for _ in range(_REPEATS):
        torch.mm(a, a, out=out)
        marks.append(clock.mark())
    return median(clock.seconds(marks))
