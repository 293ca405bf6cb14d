"""Seconds of each layer's calls, forward and backward, in passes that carry no statistics.

A forward lasts from the layer's call to its return, a backward from the moment at which the
gradient of its output is complete to the same moment of its input. Layers that torch does not tell
apart, as in a checkpoint that runs them again, have no times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.engine.flops import FlopCounter
from gradflow.engine.timing import Clock, UnitSeconds, summarise_times
from gradflow.runs.records import Timing
from gradflow.torch_internals import in_backward
from gradflow.watching.discovery import WatchedLayer, stream_of, unit_name
from gradflow.watching.recorder import CallKey

# Seconds, or FLOPs, forward and backward, by call.
CallTimes = dict[CallKey, tuple[float, float]]


@dataclass
class _MarkedCall:
    """Numbers of the marks of one call; the marks of backward are None until its gradients come.

    `below` is the call whose output this call was given: one mark ends its backward and begins
    that of `below`.
    """

    key: CallKey
    entered: int
    x: Tensor | None = None
    below: _MarkedCall | None = None
    left: int | None = None
    from_above: int | None = None
    to_below: int | None = None


@dataclass
class _Marks:
    """Every mark of one pass in order, and which of them belong to which call."""

    clock: Clock
    moments: list[Any] = field(default_factory=list)
    calls: list[_MarkedCall] = field(default_factory=list)
    open: list[_MarkedCall] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    last: tuple[_MarkedCall, Tensor] | None = None

    def mark(self) -> int:
        """Mark this moment; return the number of the mark."""
        self.moments.append(self.clock.mark())
        return len(self.moments) - 1

    def enter(self, place: int, given: object) -> None:
        """Mark the call of a layer."""
        if in_backward():  # a checkpoint calls it once more
            return
        call = _MarkedCall((place, self.counts[place]), 0, stream_of(given))
        self.counts[place] += 1
        self.calls.append(call)
        self.open.append(call)
        if self.last is not None and call.x is self.last[1]:
            call.below = self.last[0]
        elif call.x is not None and call.x.requires_grad:
            call.x.register_hook(lambda g: self._below(call, g))  # type: ignore[no-untyped-call]  # torch's stubs
        call.entered = self.mark()

    def leave(self, place: int, output: object) -> None:
        """Mark the return of a layer."""
        if in_backward():
            return
        now = self.mark()
        if not self.open or self.open[-1].key[0] != place:
            return
        call = self.open.pop()
        call.left = now
        y = stream_of(output, call.x.shape if call.x is not None else None)
        call.x = None
        if y is not None and y.requires_grad:
            self.last = call, y
            y.register_hook(lambda g: self._above(call, g))  # type: ignore[no-untyped-call]  # torch's stubs

    def _above(self, call: _MarkedCall, g: Tensor | None) -> None:
        if g is not None:  # nor that of another piece of one tensor
            call.from_above = self.mark()

    def _below(self, call: _MarkedCall, g: Tensor | None) -> None:
        if g is not None:
            call.to_below = self.mark()

    def seconds(self) -> CallTimes:
        """Return forward and backward seconds of the calls that have both; waits for the device."""
        steps = self.clock.seconds(self.moments)
        return {
            call.key: (sum(steps[call.entered : call.left]), sum(steps[above:below]))
            for call, above, below in self._whole()
        }

    def _whole(self) -> Iterator[tuple[_MarkedCall, int, int]]:
        end = len(self.moments) - 1
        for call in self.calls:
            below = call.to_below if call.below is None else call.below.from_above
            if below is None and call is self.calls[0]:
                below = end  # nothing below it takes a gradient: backward ends with it
            if call.left is not None and call.from_above is not None and below is not None:
                yield call, call.from_above, below


def timed_step(
    layers: Sequence[WatchedLayer], step: Callable[[], None], clock: Clock
) -> tuple[CallTimes, float]:
    """Return the seconds of each call in one step, and of the whole step.

    The step is one forward and one backward pass.
    """
    marks = _Marks(clock)
    with _installed(layers, marks):
        marks.mark()
        step()
        marks.mark()
    total = sum(clock.seconds(marks.moments))
    return marks.seconds(), total


@dataclass(frozen=True)
class OperationClock:
    """A clock that counts floating-point operations in place of seconds."""

    counter: FlopCounter

    def mark(self) -> int:
        """Return how many operations there were so far."""
        return self.counter.total

    def seconds(self, marks: Sequence[int]) -> list[float]:
        """Return the operations between neighbouring marks."""
        return [after - before for before, after in pairwise(marks)]


def counted_step(layers: Sequence[WatchedLayer], step: Callable[[], None]) -> CallTimes | None:
    """Return the FLOPs of each call in one step; None where torch has no formula for an operation.

    They are counted between the very marks at which `timed_step` takes the time. None as well
    where the step cannot be counted: `torch.cond` and its like refuse to be looked at.
    """
    with suppress(Exception), FlopCounter() as counter:
        flops, _ = timed_step(layers, step, OperationClock(counter))
        return flops if counter.is_complete else None
    torch.compiler.reset()  # what was half compiled under the counter would fail again
    return None


def bare_step(step: Callable[[], None], clock: Clock) -> float:
    """Return the seconds of one step without any hook."""
    marks = [clock.mark()]
    step()
    marks.append(clock.mark())
    return clock.seconds(marks)[0]


def layer_timing(
    units: Sequence[str],
    steps: Sequence[tuple[CallTimes, float]],
    bare: Sequence[float] = (),
    flops: CallTimes | None = None,
) -> Timing | None:
    """Return medians over steps of the calls that every step has times of; None if there is none.

    `units` has the name of each layer; steps, bare steps and FLOPs are the results of `timed_step`,
    `bare_step` and `counted_step`.
    """
    keys = [key for key in steps[0][0] if all(key in seconds for seconds, _ in steps)]
    if not keys:
        return None
    passes: list[UnitSeconds] = [
        ([seconds[key][0] for key in keys], [seconds[key][1] for key in keys])
        for seconds, _ in steps
    ]
    names = [(layer, unit_name(units[key[0]], key[1])) for layer, key in enumerate(keys, start=1)]
    timing = summarise_times(names, passes, bare, [total for _, total in steps])
    if flops is None or any(key not in flops for key in keys):
        return timing
    forward, backward = (int(sum(flops[key][side] for key in keys)) for side in (0, 1))
    return replace(timing, flops=(forward, backward))


@contextmanager
def _installed(layers: Sequence[WatchedLayer], marks: _Marks) -> Iterator[None]:
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            for handle in _on_layer(layer.module, place, marks):
                stack.callback(handle.remove)
        yield


def _on_layer(layer: nn.Module, place: int, marks: _Marks) -> Iterator[RemovableHandle]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        marks.enter(place, (args, kwargs))

    def after(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 (torch gives it)
        marks.leave(place, output)

    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after)
