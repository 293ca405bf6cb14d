"""The recorder: it keeps calls, taps and numbers of every forward and backward pass of a step.

A tap is one watched tensor: the output of a layer, or the input of a layer that is not the output
of another. Its numbers are rows of a `Pool`. A step may have several passes, each a forward with
the backward that belongs to it: gradient accumulation, or one loss over two calls of the model.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.torch_internals import in_backward, in_transform, version_of
from gradflow.watching import device_rows
from gradflow.watching.device_rows import (
    GraphPool,
    Pool,
    measure_cross,
    measure_forward,
    measure_gradient,
)
from gradflow.watching.discovery import WatchedLayer, stream_of

# Where a row of numbers lies: its pool, and its number there.
RowAddress = tuple[Pool, int]
# Names a row of the results: the index of the layer, and how often it had been called before.
CallKey = tuple[int, int]
_HALVES = (torch.float16, torch.bfloat16)
# Passes without a gradient that are kept: a loss may still come that spans them all.
_MOST_PENDING = 64


@dataclass(eq=False)
class Tap:
    """One watched tensor.

    Attributes:
        format: number format of its gradient; that of autocast where it is on.
        forward: the row of its `FORWARD_NUMBERS`.
        gradients: a row of `GRADIENT_NUMBERS` for every gradient that came.
        hooked: whether a gradient would be seen, if one came.
        leaves: the call that returned the tensor.
        enters: the calls that were given the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    format: torch.dtype
    forward: RowAddress
    gradients: list[RowAddress] = field(default_factory=list)
    hooked: bool = False
    leaves: LayerCall | None = None
    enters: list[LayerCall] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """The device on which the tensor lies."""
        return self.forward[0].device


@dataclass(eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        place: index of the layer.
        number: how often the layer had been called before.
        x: tap on the input; None where the layer is given no stream.
        y: tap on the output; None before the layer returns.
        crosses: rows with the inner products of the gradients at x and y.
    """

    place: int
    number: int
    x: Tap | None = None
    y: Tap | None = None
    crosses: list[RowAddress] = field(default_factory=list)

    @property
    def key(self) -> CallKey:
        """Layer and number of the call."""
        return self.place, self.number

    @property
    def stream(self) -> Tap:
        """Tap on the input, or on the output where the input is no stream."""
        tap = self.x or self.y
        assert tap is not None
        return tap

    @property
    def keeps_shape(self) -> bool:
        """Whether x and y can be compared element by element."""
        return self.x is not None and self.y is not None and self.x.shape == self.y.shape


@dataclass(eq=False)
class WatchedPass:
    """One forward pass, and the backward pass that belongs to it.

    Attributes:
        calls: in execution order, each once it has returned.
        counts: how often each layer has been called so far, by its index.
        entered: calls that have not returned yet, the innermost last.
        known: taps by the `id` of their tensor, with a reference that says whether the tensor lives
            and the version that was seen.
        held: gradients at the outputs of layers whose input's gradient has not come yet.
        handles: what removes the hooks on tensors.
        arrived: whether some gradient has come.
        captured: whether the pass is part of a CUDA graph, and runs whenever that is replayed.
    """

    calls: list[LayerCall] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    entered: list[LayerCall] = field(default_factory=list)
    known: dict[int, tuple[weakref.ref[Tensor], int, Tap]] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    arrived: bool = False
    captured: bool = False

    def know(self, x: Tensor, tap: Tap) -> None:
        """Remember the tap of a tensor as it is now."""
        self.known[id(x)] = weakref.ref(x), version_of(x), tap

    def find(self, x: Tensor) -> Tap | None:
        """Return the tap on a tensor, if the tensor has not been changed in place since."""
        reference, version, tap = self.known.get(id(x), (None, 0, None))
        same = reference is not None and reference() is x and version == version_of(x)
        return tap if same else None

    def counted(self, place: int) -> int:
        """Return how often a layer had been called before, and count this call."""
        self.counts[place] += 1
        return self.counts[place] - 1

    def returned(self, place: int) -> LayerCall | None:
        """Return the innermost open call of a layer; calls inside it that raised are dropped."""
        while self.entered:
            call = self.entered.pop()
            if call.place == place:
                return call
        return None

    def complete(self, call: LayerCall, y: Tap) -> Tap:
        """Note that a call has returned y: it is one more row, and its taps know it."""
        call.y, y.leaves = y, call
        if call.x is not None:
            call.x.enters.append(call)
        self.calls.append(call)
        return y

    def only(self, kept: Collection[int]) -> bool:
        """Keep the calls of these layers alone; return whether there are any."""
        self.calls = [call for call in self.calls if call.place in kept]
        return bool(self.calls)

    def called_again(self) -> set[int]:
        """Return the layers that ran more than once, on an x with the shape of y as in recurrences.

        They are named by their indices.
        """
        return {call.place for call in self.calls if call.number and call.keeps_shape}

    def was_replayed(self, tables: Mapping[Pool, list[list[float]]]) -> bool:
        """Return whether the graph that holds this pass ran, by its rows on the host."""
        taps = (call.y for call in self.calls if call.y is not None)
        return any(pool.times(tables[pool][row]) for pool, row in (tap.forward for tap in taps))

    def close(self) -> None:
        """Take the hooks off the tensors and let go of every gradient."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.known.clear()
        self.held.clear()


class Recorder:
    """Sees every watched tensor; knows neither steps nor parameters.

    Attributes:
        passes: all passes of this step, oldest first.
        active: whether this step is measured.
        paused: whether the model runs without gradients, as in an evaluation.
        muted: whether what runs is left out.
        ran: whether a layer has been called since the step began, measured or not.
        kept: indices of the layers that count.
        captured: passes that are part of CUDA graphs, and write to the `graph_pools`.
    """

    def __init__(self, layers: Sequence[WatchedLayer]) -> None:
        self.layers = layers
        self.pools: dict[torch.device, Pool] = {}
        self.passes: list[WatchedPass] = []
        self.active = True
        self.paused = self.muted = False
        self.ran = False
        self.kept: Collection[int] = range(len(layers))
        self.captured: list[WatchedPass] = []
        self.graph_pools: dict[torch.device, GraphPool] = {}

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """Allocate the memory that graphs write to: nothing can be while one is captured."""
        for device in set(devices):
            if device.type in device_rows.CAPTURABLE:
                self.graph_pools[device] = GraphPool(device, len(self.layers))

    def begin(self) -> None:
        """Begin a new pass, as the model is called, unless a checkpoint calls it again."""
        if in_backward():
            return
        self.paused = not torch.is_grad_enabled()
        if not self.watches():
            return
        pending = [p for p in self.passes if not p.arrived]
        if len(pending) >= _MOST_PENDING:
            pending[0].close()
            self.passes.remove(pending[0])
        self.passes.append(WatchedPass(captured=device_rows.is_capturing()))

    def end(self) -> None:
        """Note that the model has returned."""
        self.paused = False

    def watches(self) -> bool:
        """Return whether a call of a layer is measured, and note that the step has begun."""
        if self.paused or self.muted or in_backward() or in_transform():
            return False
        self.ran = True
        return self.active or device_rows.is_capturing()

    def current(self) -> WatchedPass:
        """Return the pass that runs; without the model's own call, backward passes part them."""
        if not self.passes or self.passes[-1].arrived:
            self.passes.append(WatchedPass(captured=device_rows.is_capturing()))
        return self.passes[-1]

    def enter(self, place: int, given: object) -> None:
        """Measure the input of a layer that is about to run."""
        if not self.watches() or place not in self.kept:
            return
        current = self.current()
        call = LayerCall(place, current.counted(place))
        current.entered.append(call)
        x = stream_of(given)
        if x is not None and x.numel():
            call.x = current.find(x) or self.tap(current, x)
            self._hook(current, call.x, x)

    def leave(self, place: int, output: object) -> None:
        """Measure the output that a layer has returned."""
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

    def gradient(self, owner: WatchedPass, tap: Tap, g: Tensor | None) -> None:
        """Measure the gradient g of a watched tensor, whose pass is the owner.

        None stands for a sibling's gradient, as a hook on a piece of a tensor, by `chunk` for
        example, is called for every piece.
        """
        if g is None or owner not in self.passes or not (self.active or owner.captured):
            return
        with torch.no_grad():
            owner.arrived = True
            pool, row = self._row(owner, g.device)
            half = tap.format in _HALVES
            smallest = torch.finfo(tap.format).smallest_normal if half else None
            wide = measure_gradient(pool, row, g.detach(), smallest)
            tap.gradients.append((pool, row))
            self._pair(owner, tap, wide)

    def tap(self, current: WatchedPass, x: Tensor) -> Tap:
        """Measure a tensor, and remember its tap."""
        pool, row = self._row(current, x.device)
        with torch.no_grad():
            measure_forward(pool, row, x.detach())
        tap = Tap(x.shape, x.dtype, _format(x), (pool, row))
        current.know(x, tap)
        return tap

    def close(self) -> list[WatchedPass]:
        """End the step; return the passes in which a gradient came, or the last if none did.

        Captured passes are kept for later steps: they have not run yet.
        """
        self.captured += [one for one in self.passes if one.captured and one.calls]
        passes = [one for one in self.passes if one.calls and not one.captured]
        for one in self.passes:
            one.close()
        self.passes, self.ran = [], False
        return [one for one in passes if one.arrived] or passes[-1:]

    def release(self) -> None:
        """Give the rows of the step back, once their numbers have been read."""
        for pool in (*self.pools.values(), *self.graph_pools.values()):
            pool.release()

    def _row(self, owner: WatchedPass, device: torch.device) -> RowAddress:
        if owner.captured:
            own = self.graph_pools[device]
            return own, own.take()
        if device not in self.pools:
            self.pools[device] = Pool(device)
        pool = self.pools[device]
        return pool, pool.take()

    def _hook(self, current: WatchedPass, tap: Tap, x: Tensor) -> None:
        """Hook the tensor, not the module: hooks on tensors survive in-place operations."""
        if x.requires_grad and not tap.hooked:
            tap.hooked = True
            hook = partial(self.gradient, current, tap)
            current.handles.append(x.register_hook(hook))  # type: ignore[no-untyped-call]  # torch's stubs

    def _recomputed(self, current: WatchedPass, place: int, output: object) -> None:
        """Hook a layer that a checkpoint has run again, if its first run had no graph."""
        taps = (call.y for call in reversed(current.calls) if call.place == place)
        tap = next((tap for tap in taps if tap is not None and not tap.hooked), None)
        if tap is not None and (y := stream_of(output, tap.shape)) is not None:
            self._hook(current, tap, y)

    def _pair(self, owner: WatchedPass, tap: Tap, wide: Tensor) -> None:
        """Measure <dL/dx, dL/dy> of the layers whose x or y has this gradient."""
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
    if x.dtype in _HALVES:
        return x.dtype
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.real.dtype if x.is_complex() else x.dtype
