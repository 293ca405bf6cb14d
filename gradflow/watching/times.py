"""Seconds of each layer's calls, forward and backward, in passes that carry no statistics.

Forward: from the layer's call to its return. Backward: from the moment that the gradient of its
output is complete to that of its input's. Layers that torch does not tell apart, as in a
checkpoint that runs them again, have no times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.engine.flops import FlopCounter
from gradflow.engine.timing import Clock, Pass, summarise
from gradflow.runs.records import Timing
from gradflow.torch_internals import in_backward
from gradflow.watching.discovery import Place, unit_name
from gradflow.watching.main_tensor import stream_of

Key = tuple[int, int]
# Forward and backward, by place and call.
Seconds = dict[Key, tuple[float, float]]


@dataclass
class _Call:
    """Marks of one call; those of backward are None until its gradients come.

    `below` is the call whose output it was given: one moment ends this one and begins that one.
    """

    key: Key
    entered: int
    x: Tensor | None = None
    below: _Call | None = None
    left: int | None = None
    from_above: int | None = None
    to_below: int | None = None


@dataclass
class Marks:
    """Every mark of one pass in order, and which of them belong to which call."""

    clock: Clock
    moments: list[Any] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    open: list[_Call] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    last: tuple[_Call, Tensor] | None = None

    def mark(self) -> int:
        """A moment; returns its number."""
        self.moments.append(self.clock.mark())
        return len(self.moments) - 1

    def enter(self, place: int, given: object) -> None:
        """A layer is called; by a checkpoint, once more."""
        if in_backward():
            return
        call = _Call((place, self.counts[place]), 0, stream_of(given))
        self.counts[place] += 1
        self.calls.append(call)
        self.open.append(call)
        if self.last is not None and call.x is self.last[1]:
            call.below = self.last[0]
        elif call.x is not None and call.x.requires_grad:
            call.x.register_hook(lambda g: self._below(call, g))  # type: ignore[no-untyped-call]  # torch's stubs
        call.entered = self.mark()

    def leave(self, place: int, output: object) -> None:
        """A layer returns."""
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

    def _above(self, call: _Call, g: Tensor | None) -> None:
        if g is not None:  # nor that of another piece of one tensor
            call.from_above = self.mark()

    def _below(self, call: _Call, g: Tensor | None) -> None:
        if g is not None:
            call.to_below = self.mark()

    def seconds(self) -> Seconds:
        """Forward and backward seconds of the calls that have both; may wait for the device."""
        steps = self.clock.seconds(self.moments)
        return {
            call.key: (sum(steps[call.entered : call.left]), sum(steps[above:below]))
            for call, above, below in self._whole()
        }

    def _whole(self) -> Iterator[tuple[_Call, int, int]]:
        end = len(self.moments) - 1
        for call in self.calls:
            below = call.to_below if call.below is None else call.below.from_above
            if below is None and call is self.calls[0]:
                below = end  # nothing below it takes a gradient: backward ends with it
            if call.left is not None and call.from_above is not None and below is not None:
                yield call, call.from_above, below


def timed_step(
    places: Sequence[Place], step: Callable[[], None], clock: Clock
) -> tuple[Seconds, float]:
    """Seconds of each call in one step, and of the whole step.

    Args:
        places: the layers.
        step: one forward and one backward pass.
        clock: that of the device.
    """
    marks = Marks(clock)
    with _installed(places, marks):
        marks.mark()
        step()
        marks.mark()
    total = sum(clock.seconds(marks.moments))
    return marks.seconds(), total


@dataclass(frozen=True)
class OperationClock:
    """A clock whose moments are the operations that were counted so far."""

    counter: FlopCounter

    def mark(self) -> int:
        """How many there were."""
        return self.counter.total

    def seconds(self, marks: Sequence[int]) -> list[float]:
        """Operations between neighbours."""
        return [after - before for before, after in pairwise(marks)]


def counted_step(places: Sequence[Place], step: Callable[[], None]) -> Seconds | None:
    """FLOPs of each call in one step, forward and backward; None where torch has no formula.

    They are counted between the very moments at which `timed_step` takes the time. None as well
    where the step cannot be counted: `torch.cond` and its like refuse to be looked at.
    """
    with suppress(Exception), FlopCounter() as counter:
        found, _ = timed_step(places, step, OperationClock(counter))
        return found if counter.is_complete else None
    torch.compiler.reset()  # what was half compiled under the counter would fail again
    return None


def bare_step(step: Callable[[], None], clock: Clock) -> float:
    """Seconds of one step without any hook."""
    marks = [clock.mark()]
    step()
    marks.append(clock.mark())
    return clock.seconds(marks)[0]


def put_together(
    units: Sequence[str],
    steps: Sequence[tuple[Seconds, float]],
    bare: Sequence[float] = (),
    flops: Seconds | None = None,
) -> Timing | None:
    """Medians over steps of the calls that have times in every one of them; None if none has.

    Args:
        units: name of each place.
        flops: what `counted_step` returned.
        steps: what `timed_step` returned, step by step.
        bare: seconds of steps without hooks.
    """
    keys = [key for key in steps[0][0] if all(key in found for found, _ in steps)]
    if not keys:
        return None
    passes: list[Pass] = [
        ([found[key][0] for key in keys], [found[key][1] for key in keys]) for found, _ in steps
    ]
    names = [(layer, unit_name(units[key[0]], key[1])) for layer, key in enumerate(keys, start=1)]
    timing = summarise(names, passes, bare, [total for _, total in steps])
    if flops is None or any(key not in flops for key in keys):
        return timing
    forward, backward = (int(sum(flops[key][side] for key in keys)) for side in (0, 1))
    return replace(timing, flops=(forward, backward))


@contextmanager
def _installed(places: Sequence[Place], marks: Marks) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for number, place in enumerate(places):
            handles += _on_layer(place.module, number, marks)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_layer(layer: nn.Module, place: int, marks: Marks) -> Iterator[RemovableHandle]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        marks.enter(place, (args, kwargs))

    def after(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 (torch gives it)
        marks.leave(place, output)

    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after)
