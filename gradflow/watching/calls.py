"""What is kept of one forward and its backward: taps, calls, and which tensor is which.

A tap is one watched tensor: the output of a layer, or the input of a layer that is not the output
of another. Its numbers are rows of a `Pool`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.torch_internals import version_of
from gradflow.watching.device_rows import Pool

RowOf = tuple[Pool, int]


@dataclass(eq=False)
class Tap:
    """One watched tensor.

    Attributes:
        shape: of the tensor; `dtype` likewise.
        format: number format of its gradient; that of autocast where it is on.
        forward: the row with its `FORWARD` numbers.
        gradients: a row of `GRADIENT` numbers for every backward that came by.
        hooked: a gradient would be seen, if one came.
        leaves: the call that returned it; `enters` are those that were given it.
    """

    shape: torch.Size
    dtype: torch.dtype
    format: torch.dtype
    forward: RowOf
    gradients: list[RowOf] = field(default_factory=list)
    hooked: bool = False
    leaves: Call | None = None
    enters: list[Call] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.forward[0].device


@dataclass(eq=False)
class Call:
    """One call of a layer: the place of the layer, and how often it had been called before.

    `crosses` are the rows with the inner products of the gradients at x and y.
    """

    place: int
    number: int
    x: Tap | None = None
    y: Tap | None = None
    crosses: list[RowOf] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int]:
        """Names the row of the results."""
        return self.place, self.number

    @property
    def stream(self) -> Tap:
        """The input, or the output where the input is no stream."""
        tap = self.x or self.y
        assert tap is not None
        return tap

    @property
    def keeps_shape(self) -> bool:
        """Whether x and y can be compared element by element."""
        return self.x is not None and self.y is not None and self.x.shape == self.y.shape


@dataclass(eq=False)
class Pass:
    """One forward, and the backward that belongs to it.

    Attributes:
        calls: in execution order, each once it has returned.
        counts: calls of each place so far.
        entered: calls that have not returned yet, the innermost last.
        known: taps by the `id` of their tensor, with a reference that says whether it lives and
            the version that was seen.
        held: gradients at the outputs of layers whose input's gradient has not come yet.
        handles: of the hooks on tensors.
        arrived: some gradient has come.
        captured: it is part of a CUDA graph, and runs whenever that is replayed.
    """

    calls: list[Call] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    entered: list[Call] = field(default_factory=list)
    known: dict[int, tuple[weakref.ref[Tensor], int, Tap]] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    arrived: bool = False
    captured: bool = False

    def know(self, x: Tensor, tap: Tap) -> None:
        """This tensor, as it is now, has this tap."""
        self.known[id(x)] = weakref.ref(x), version_of(x), tap

    def find(self, x: Tensor) -> Tap | None:
        """The tap on this very tensor, if it has not been changed in place since."""
        reference, version, tap = self.known.get(id(x), (None, 0, None))
        same = reference is not None and reference() is x and version == version_of(x)
        return tap if same else None

    def counted(self, place: int) -> int:
        """How often a place had been called before; counts this call."""
        self.counts[place] += 1
        return self.counts[place] - 1

    def returned(self, place: int) -> Call | None:
        """The innermost call of a place; calls inside it that raised are dropped."""
        while self.entered:
            call = self.entered.pop()
            if call.place == place:
                return call
        return None

    def complete(self, call: Call, y: Tap) -> Tap:
        """A call has returned y: it is one more row, and its taps know it."""
        call.y, y.leaves = y, call
        if call.x is not None:
            call.x.enters.append(call)
        self.calls.append(call)
        return y

    def only(self, kept: Collection[int]) -> bool:
        """Leave out the calls of other places; whether some are left."""
        self.calls = [call for call in self.calls if call.place in kept]
        return bool(self.calls)

    def was_replayed(self, tables: Mapping[Pool, list[list[float]]]) -> bool:
        """Whether the host has read numbers of this pass, of those that are captured."""
        taps = (call.y for call in self.calls if call.y is not None)
        return any(pool.times(tables[pool][row]) for pool, row in (tap.forward for tap in taps))

    def close(self) -> None:
        """Take the hooks off the tensors and let go of every gradient."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.known.clear()
        self.held.clear()
