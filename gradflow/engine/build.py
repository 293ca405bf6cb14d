"""The network of one seed of a stack: resident on its device, or built layer by layer when visited.

A rebuilt layer exists only while it is used: it is drawn anew from (spec, seed, layer) at each
visit. On CUDA the next one is drawn on a second stream while this one computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from gradflow.engine.compiled import use
from gradflow.engine.plan import Plan
from gradflow.engine.tape import Network
from gradflow.networks.inputs import input_batch
from gradflow.networks.losses import build_loss
from gradflow.networks.stack import Block, build_block, build_stack, layer_kind, redraw
from gradflow.networks.units.template import Compiled
from gradflow.specs.stack import StackSpec


class Ahead(Protocol):
    """Does work beside the pass. The pass must not touch what it writes before it has waited."""

    def owns(self, tensors: Iterable[Tensor]) -> None:
        """The work will write into these, so their memory outlives it."""

    def start(self, work: Callable[[], None]) -> Any:
        """Begin once all that was issued before is done; returns what to wait for."""

    def wait(self, done: Any) -> None:
        """What is issued from now on comes after that work."""


class CudaAhead:
    """A second stream; nothing here waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stubs

    def owns(self, tensors: Iterable[Tensor]) -> None:
        """Tell the allocator, or it could give the memory away while the work still runs."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def start(self, work: Callable[[], None]) -> torch.cuda.Event:
        """An event behind the work."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def wait(self, done: torch.cuda.Event) -> None:
        """In the stream of the pass."""
        torch.cuda.current_stream(self._device).wait_event(done)


def ahead_on(device: torch.device) -> Ahead | None:
    """None on CPU, where all cores are busy with the pass."""
    return CudaAhead(device) if device.type == "cuda" else None


class Layers(Sequence[Block], ABC):
    """Layers 1 to `depth`, at places from 0.

    Args:
        depth: how many there are.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def __len__(self) -> int:
        return self._depth

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        """The layer at this place; the layers of a slice have modules of their own."""
        layers = range(1, self._depth + 1)[index]
        return self.played(layers) if isinstance(layers, int) else list(map(self.built, layers))

    @abstractmethod
    def played(self, layer: int) -> Block:
        """The layer, perhaps by a module that is used again for others."""

    @abstractmethod
    def built(self, layer: int) -> Block:
        """The layer, by a module of its own."""


# A stack of more kinds of layer than this constructs modules again and again.
MOST_KINDS = 8


@dataclass(frozen=True)
class _Drawn:
    """A layer that was drawn before it was asked for, and what to wait for."""

    layer: int
    block: Block
    done: Any


class RebuiltBlocks(Layers):
    """The layers of a stack, of which `alive` neighbours can be used at a time.

    A layer is played by a module that played another of its kind before: one draw gives it its
    weights, and nothing else is made. Where work can be done ahead, the layer that is likely to
    come next is drawn into a module of its own while this one computes.

    Args:
        spec: as for `build_block`, like the next two.
        seed: of the weights.
        device: where they lie.
        alive: of how many neighbours the weights must hold together.
        join: compiled, in the place of the units' own; None if they are not compiled.
        ahead: draws the next layer; None if each is drawn when it is asked for.
    """

    def __init__(
        self,
        spec: StackSpec,
        seed: int,
        device: torch.device,
        alive: int = 1,
        *,
        join: Compiled | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        super().__init__(spec.depth)
        self._spec, self._seed, self._device = spec, seed, device
        self._alive, self._join = alive, join
        # Profiles are passes of their own, which belong into the stream of the others.
        self._ahead = None if spec.scheme and spec.scheme_record.profiled else ahead
        self._places = alive + (self._ahead is not None)
        self._modules: dict[Hashable, dict[int, Block]] = {}
        self._last = 0
        self._next: _Drawn | None = None

    def played(self, layer: int) -> Block:
        """The layer, good until `alive` others have been asked for."""
        block = self._taken(layer) or self._drawn(layer)
        self._look_ahead(layer)
        self._last = layer
        return block

    def _taken(self, layer: int) -> Block | None:
        """What was drawn ahead, if it is this layer; another is waited for and passed over."""
        drawn, self._next = self._next, None
        if drawn is None or self._ahead is None:
            return None
        self._ahead.wait(drawn.done)
        return drawn.block if drawn.layer == layer else None

    def _drawn(self, layer: int) -> Block:
        modules, place = self._of_kind(layer_kind(self._spec, layer)), layer % self._places
        if place in modules:
            redraw(modules[place], self._spec, self._seed, layer, self._device)
        else:
            modules[place] = self.built(layer)
            if self._ahead:
                self._ahead.owns(modules[place].parameters())
        return modules[place]

    def _look_ahead(self, layer: int) -> None:
        """Begin to draw the next layer: above, or below where the pass goes down."""
        step = -1 if self._alive == 1 and layer == self._last - 1 else 1
        if self._ahead is None or not 1 <= layer + step <= len(self):
            return
        modules = self._modules.get(layer_kind(self._spec, layer + step), {})
        block = modules.get((layer + step) % self._places)
        if block is not None:
            draw = partial(redraw, block, self._spec, self._seed, layer + step, self._device)
            self._next = _Drawn(layer + step, block, self._ahead.start(draw))

    def built(self, layer: int) -> Block:
        """The layer, by a module of its own."""
        return use(self._join, build_block(self._spec, self._seed, layer, self._device))

    def _of_kind(self, kind: Hashable) -> dict[int, Block]:
        if kind not in self._modules:
            if len(self._modules) == MOST_KINDS:
                del self._modules[next(iter(self._modules))]
            self._modules[kind] = {}
        return self._modules[kind]


def build_network(
    spec: StackSpec,
    seed: int,
    device: torch.device,
    plan: Plan | None = None,
    join: Compiled | None = None,
) -> Network:
    """One seed of a stack: resident on the device, or built as the plan says."""
    if plan and plan.rebuild:
        blocks: Sequence[Block] = RebuiltBlocks(
            spec, seed, device, plan.alive, join=join, ahead=ahead_on(device)
        )
    else:
        blocks = [use(join, block) for block in build_stack(spec, seed, device)]
    return Network(blocks, input_batch(spec, seed, device), build_loss(spec, seed, device))


def build_timed(
    spec: StackSpec, seed: int, device: torch.device, plan: Plan, join: Compiled | None = None
) -> Network:
    """The layers that are timed, as a stack of their own."""
    blocks = [use(join, build_block(spec, seed, layer, device)) for layer in plan.timed_layers]
    x, loss = input_batch(spec, seed, device), build_loss(spec, seed, device)
    return Network(blocks, x, loss, plan.timed_layers)
