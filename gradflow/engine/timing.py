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

# Forward and backward seconds of each unit, first to last.
Pass = tuple[list[float], list[float]]
Found = TypeVar("Found")


class Clock(Protocol):
    """Marks moments and tells the seconds between them, once the work is done."""

    def mark(self) -> Any:
        """A moment in the order of the work issued so far."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next; may wait for the device."""


class CpuClock:
    """Wall time of work that is done when the call returns."""

    def mark(self) -> float:
        """Seconds of the monotonic clock."""
        return perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Differences of neighbours."""
        return [after - before for before, after in pairwise(marks)]


class CudaClock:
    """Events in the current stream of a CUDA device, the current one if None.

    The events are external: captured in a CUDA graph, they are recorded anew by every replay.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event behind all work issued so far."""
        event = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]  # torch's stubs
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Waits for all work, then reads the events."""
        torch.cuda.current_stream(self._device).synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def clock_for(device: torch.device) -> Clock:
    """The clock that fits the device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Repeat(Protocol):
    """Makes of work that is issued once what issues it time and again."""

    def __call__(self, work: Callable[[], Found], /) -> Callable[[], Found]:
        """What does the work at every call, and returns what it found."""


@dataclass(frozen=True)
class Timer:
    """How one network is timed.

    Attributes:
        timed: one pass: what it found, and the seconds of the whole.
        bare: seconds of the same pass by torch alone.
        summary: a `Timing` of what `timed` returned, pass by pass, and `bare`; None where no unit
            could be timed.
    """

    timed: Callable[[Clock], tuple[Any, float]]
    bare: Callable[[Clock], float]
    summary: Callable[[Sequence[tuple[Any, float]], Sequence[float]], Timing | None]


def take_times(
    timer: Timer, options: RunOptions, clock: Clock, tick: Callable[[], None] = lambda: None
) -> Timing | None:
    """Time forward and backward of every unit.

    One warm-up of each kind, then timed and bare passes in turn, until there are
    `options.repeats` of them and `options.time_budget` seconds are spent.

    Args:
        timer: of the network.
        options: `repeats` and `time_budget`.
        clock: real or fake.
        tick: called after each pair of passes.
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
    """Times a stack; its parameters' `.grad` are None afterwards.

    Args:
        network: the stack.
        repeat: how its passes are issued again; None if eagerly.
    """
    units = _issued(mark_units, network, repeat)
    whole = _issued(mark_bare, network, repeat)

    def timed(clock: Clock) -> tuple[Pass, float]:
        found = _unit_seconds(units(clock), clock)
        return found, sum(map(sum, found))

    def bare(clock: Clock) -> float:
        return clock.seconds(whole(clock))[0]

    # Not the network itself: it may have to go before the summary.
    names, flops = unit_names(network), network_flops(network)

    def summary(passes: Sequence[tuple[Pass, float]], bare: Sequence[float]) -> Timing:
        return replace(summarise(names, [units for units, _ in passes], bare), flops=flops)

    return Timer(timed, bare, summary)


def _issued(
    mark: Callable[[Network, Clock], Found], network: Network, repeat: Repeat | None
) -> Callable[[Clock], Found]:
    """A pass with its marks, made repeatable when it is first asked for."""
    if repeat is None:
        return partial(mark, network)
    made: list[Callable[[], Found]] = []

    def issue(clock: Clock) -> Found:
        if not made:  # later clocks of the device read these marks as well
            made.append(repeat(partial(mark, network, clock)))
        return made[0]()

    return issue


def timed_pass(network: Network, clock: Clock) -> Pass:
    """Forward and backward seconds of each unit, first to last, in one pass."""
    return _unit_seconds(mark_units(network, clock), clock)


def bare_pass(network: Network, clock: Clock) -> float:
    """Seconds of one forward + backward through the whole stack by torch alone."""
    return clock.seconds(mark_bare(network, clock))[0]


def mark_units(network: Network, clock: Clock) -> tuple[list[Any], list[Any]]:
    """A pass, unit by unit: marks around each unit's forward, and around each one's backward."""
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


def _unit_seconds(marks: tuple[list[Any], list[Any]], clock: Clock) -> Pass:
    forward, backward = marks
    return clock.seconds(forward), clock.seconds(backward)[::-1]


def mark_bare(network: Network, clock: Clock) -> list[Any]:
    """One forward + backward through the whole stack by torch alone: marks at its ends."""
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
    """No garbage collection inside: it would strike single units at random."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unit_names(network: Network) -> list[tuple[int, str]]:
    """Layer and name of each unit, first to last."""
    layers = network.layers or range(1, len(network.blocks) + 1)
    return [
        (layer, unit.name)
        for layer, block in zip(layers, network.blocks, strict=True)
        for unit in block.units
    ]


def summarise(
    units: Sequence[tuple[int, str]],
    passes: Sequence[Pass],
    bare: Sequence[float] = (),
    totals: Sequence[float] = (),
) -> Timing:
    """Medians and interquartile ranges over repeated passes.

    Args:
        units: layer and name of each, as `unit_names` gives them.
        passes: what `timed_pass` gave, repeat by repeat.
        bare: what `bare_pass` gave, where there were any.
        totals: seconds of the whole passes, where units are a part of them only.
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


def _records(names: Sequence[tuple[int, str]], passes: Sequence[Pass]) -> Iterator[TimeRecord]:
    for repeat, (forward, backward) in enumerate(passes):
        for (layer, unit), f, b in zip(names, forward, backward, strict=True):
            yield TimeRecord(repeat, layer, unit, f, b)


# A product that takes less than this is mostly its launch; one of twice the size takes 8 times as
# long, so that all products together take about a tenth of a second.
LONG_ENOUGH_S = 2e-3
SMALLEST, REPEATS = 256, 3
LARGEST = {"cpu": 2048, "cuda": 8192}


def matmul_flop_per_s(device: torch.device, dtype: str, clock: Clock) -> float:
    """FLOP/s of a square matrix product, the median of a few.

    Args:
        device: where.
        dtype: of the matrices; float32 with the matmul precision that is set.
        clock: real or fake.
    """
    size = SMALLEST
    seconds = product_seconds(size, device, dtype, clock)
    while seconds < LONG_ENOUGH_S and size < LARGEST[device.type]:
        size *= 2
        seconds = product_seconds(size, device, dtype, clock)
    return 2 * size**3 / seconds


def product_seconds(size: int, device: torch.device, dtype: str, clock: Clock) -> float:
    """Median seconds of a product of two size x size matrices, after one that warms up."""
    source = generator(device, 0, "matmul")
    wide = torch.empty(size, size, device=device).normal_(generator=source)
    a = wide.to(getattr(torch, dtype))
    out = a @ a
    marks = [clock.mark()]
    for _ in range(REPEATS):
        torch.mm(a, a, out=out)
        marks.append(clock.mark())
    return median(clock.seconds(marks))
