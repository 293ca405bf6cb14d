"""Sees every watched tensor of a training step.

A step may have several passes, each a forward with the backward that belongs to it: gradient
accumulation, or one loss over two calls of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from gradflow.torch_internals import in_backward, in_transform
from gradflow.watching import graph_pool
from gradflow.watching.calls import Call, Pass, RowOf, Tap
from gradflow.watching.device_rows import Pool, measure_cross, measure_forward, measure_gradient
from gradflow.watching.discovery import Place
from gradflow.watching.graph_pool import GraphPool
from gradflow.watching.main_tensor import stream_of

HALVES = (torch.float16, torch.bfloat16)
# Passes without a gradient that are kept: a loss may still come that spans them all.
MOST_PENDING = 64


class Recorder:
    """Sees every watched tensor; knows neither steps nor parameters.

    Attributes:
        passes: of this step, oldest first.
        active: whether this step is measured.
        paused: the model runs without gradients, as in an evaluation.
        muted: what runs is left out.
        ran: a layer has been called since the step began, measured or not.
        kept: the places that count.
        captured: passes that are part of CUDA graphs, and write to the `graph_pools`.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.pools: dict[torch.device, Pool] = {}
        self.passes: list[Pass] = []
        self.active = True
        self.paused = self.muted = False
        self.ran = False
        self.kept: Collection[int] = range(len(places))
        self.captured: list[Pass] = []
        self.graph_pools: dict[torch.device, GraphPool] = {}

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """Lay out the memory that graphs write to: none can be had while one is captured."""
        for device in set(devices):
            if device.type in graph_pool.KINDS:
                self.graph_pools[device] = GraphPool(device, len(self.places))

    def begin(self) -> None:
        """The model is called: a new pass, unless a checkpoint calls it again."""
        if in_backward():
            return
        self.paused = not torch.is_grad_enabled()
        if not self.watches():
            return
        pending = [p for p in self.passes if not p.arrived]
        if len(pending) >= MOST_PENDING:
            pending[0].close()
            self.passes.remove(pending[0])
        self.passes.append(Pass(captured=graph_pool.is_capturing()))

    def end(self) -> None:
        """The model has returned."""
        self.paused = False

    def watches(self) -> bool:
        """Whether a call is to be measured; a call of a layer also says that a step has begun."""
        if self.paused or self.muted or in_backward() or in_transform():
            return False
        self.ran = True
        return self.active or graph_pool.is_capturing()

    def current(self) -> Pass:
        """The pass that runs; without the model's own call, one begins after each backward."""
        if not self.passes or self.passes[-1].arrived:
            self.passes.append(Pass(captured=graph_pool.is_capturing()))
        return self.passes[-1]

    def enter(self, place: int, given: object) -> None:
        """A layer is about to run on what it is given."""
        if not self.watches() or place not in self.kept:
            return
        current = self.current()
        call = Call(place, current.counted(place))
        current.entered.append(call)
        x = stream_of(given)
        if x is not None and x.numel():
            call.x = current.find(x) or self.tap(current, x)
            self._hook(current, call.x, x)

    def leave(self, place: int, output: object) -> None:
        """A layer has returned its output."""
        if not self.passes or place not in self.kept or in_transform():
            return
        current = self.passes[-1]
        if not self.active and not current.captured:
            return
        if in_backward():
            self._recomputed(current, place, output)
        elif call := current.returned(place):
            y = stream_of(output, call.x.shape if call.x else None)
            if y is not None and y.numel():
                self._hook(current, current.complete(call, self.tap(current, y)), y)

    def gradient(self, owner: Pass, tap: Tap, g: Tensor | None) -> None:
        """The gradient of a watched tensor has come; None is that of one of its siblings.

        A hook on a piece, as of `chunk`, is called for every piece.
        """
        if g is None or owner not in self.passes or not (self.active or owner.captured):
            return
        with torch.no_grad():
            owner.arrived = True
            pool, row = self._row(owner, g.device)
            half = tap.format in HALVES
            smallest = torch.finfo(tap.format).smallest_normal if half else None
            wide = measure_gradient(pool, row, g.detach(), smallest)
            tap.gradients.append((pool, row))
            self._pair(owner, tap, wide)

    def tap(self, current: Pass, x: Tensor) -> Tap:
        """Measure a tensor, and know it again."""
        pool, row = self._row(current, x.device)
        with torch.no_grad():
            measure_forward(pool, row, x.detach())
        tap = Tap(x.shape, x.dtype, _format(x), (pool, row))
        current.know(x, tap)
        return tap

    def close(self) -> list[Pass]:
        """End the step; the passes in which a gradient came, or the last if none did.

        Those that are captured are kept: they have not run yet.
        """
        self.captured += [one for one in self.passes if one.captured and one.calls]
        passes = [one for one in self.passes if one.calls and not one.captured]
        for one in self.passes:
            one.close()
        self.passes, self.ran = [], False
        return [one for one in passes if one.arrived] or passes[-1:]

    def release(self) -> None:
        """The numbers of the step have been read: its rows can be written again."""
        for pool in (*self.pools.values(), *self.graph_pools.values()):
            pool.release()

    def _row(self, owner: Pass, device: torch.device) -> RowOf:
        if owner.captured:
            graph_pool = self.graph_pools[device]
            return graph_pool, graph_pool.take()
        if device not in self.pools:
            self.pools[device] = Pool(device)
        pool = self.pools[device]
        return pool, pool.take()

    def _hook(self, current: Pass, tap: Tap, x: Tensor) -> None:
        """A hook on the tensor, not on the module: those survive in-place operations."""
        if x.requires_grad and not tap.hooked:
            tap.hooked = True
            hook = partial(self.gradient, current, tap)
            current.handles.append(x.register_hook(hook))  # type: ignore[no-untyped-call]  # torch's stubs

    def _recomputed(self, current: Pass, place: int, output: object) -> None:
        """A checkpoint has run a layer again: hook it if its first run had no graph."""
        waiting = (c for c in reversed(current.calls) if c.place == place and c.y is not None)
        call = next((c for c in waiting if c.y is not None and not c.y.hooked), None)
        if call is not None and call.y is not None:
            y = stream_of(output, call.y.shape)
            if y is not None:
                self._hook(current, call.y, y)

    def _pair(self, owner: Pass, tap: Tap, wide: Tensor) -> None:
        """<dL/dx, dL/dy> of the layers that this gradient belongs to."""
        for call in tap.enters:
            if (above := owner.held.pop(id(call), None)) is not None:
                pool, row = self._row(owner, wide.device)
                measure_cross(pool, row, wide, above.to(wide.device))
                call.crosses.append((pool, row))
        owner_call = tap.leaves
        if owner_call and owner_call.keeps_shape and owner_call.x and owner_call.x.hooked:
            owner.held[id(owner_call)] = wide


def _format(x: Tensor) -> torch.dtype:
    """The number format in which the gradient of x is computed, or computed with."""
    if x.dtype in HALVES:
        return x.dtype
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.real.dtype if x.is_complex() else x.dtype
