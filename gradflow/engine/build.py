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

from gradflow.engine.compiled import with_join
from gradflow.engine.plan import Plan
from gradflow.engine.tape import Network
from gradflow.networks.ends import build_loss, input_batch
from gradflow.networks.stack import Block, build_block, build_stack, layer_kind, redraw
from gradflow.networks.units.template import Compiled
from gradflow.specs.stack import StackSpec


class Prefetcher(Protocol):
    """Draws weights beside the pass, which must wait before it touches what is written."""

    def owns(self, tensors: Iterable[Tensor]) -> None:
        """Declare that the work will write into these tensors, so their memory outlives it."""

    def start(self, work: Callable[[], None]) -> Any:
        """Start the work once all that was issued before is done; return a handle for `wait`."""

    def wait(self, done: Any) -> None:
        """Let everything that is issued from now on come after the work of this handle."""


class CudaPrefetcher:
    """Draws weights on a second CUDA stream; nothing here waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stubs

    def owns(self, tensors: Iterable[Tensor]) -> None:
        """Tell the allocator, or it could give the memory away while the work still runs."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def start(self, work: Callable[[], None]) -> torch.cuda.Event:
        """Issue the work on the second stream; return an event behind it."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def wait(self, done: torch.cuda.Event) -> None:
        """Make the stream of the pass wait for the event."""
        torch.cuda.current_stream(self._device).wait_event(done)


def prefetcher_on(device: torch.device) -> Prefetcher | None:
    """Return the prefetcher of a device; None on CPU, where all cores are busy with the pass."""
    return CudaPrefetcher(device) if device.type == "cuda" else None


class LazyLayers(Sequence[Block], ABC):
    """Layers 1 to `depth` as a sequence from 0, each made when it is asked for."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def __len__(self) -> int:
        return self._depth

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        """Return the layer at this place, or the layers of a slice in modules of their own."""
        layers = range(1, self._depth + 1)[index]
        if isinstance(layers, int):
            return self.in_shared_module(layers)
        return list(map(self.in_own_module, layers))

    @abstractmethod
    def in_shared_module(self, layer: int) -> Block:
        """Return the layer, in a module that other layers may use after it."""

    @abstractmethod
    def in_own_module(self, layer: int) -> Block:
        """Return the layer, in a new module that no other layer uses."""


# Modules are kept for so many kinds of layer; with more, some are made again and again.
_MOST_KINDS = 8


@dataclass(frozen=True)
class _Drawn:
    """A layer that was drawn before it was asked for, and the handle to wait for."""

    layer: int
    block: Block
    done: Any


class RebuiltBlocks(LazyLayers):
    """The layers of a stack, of which `alive` neighbours can be used at a time.

    A layer takes over the module of another layer of its kind: one draw gives it its weights, and
    nothing else is made. With a prefetcher, the layer that is likely to come next is drawn into a
    module of its own while this one computes.

    Its units compute by `join`, where they are compiled. Without a prefetcher each layer is drawn
    when it is asked for.
    """

    def __init__(
        self,
        spec: StackSpec,
        seed: int,
        device: torch.device,
        alive: int = 1,
        *,
        join: Compiled | None = None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        super().__init__(spec.depth)
        self._spec, self._seed, self._device = spec, seed, device
        self._alive, self._join = alive, join
        # Profiles are passes of their own, which belong into the stream of the others.
        self._prefetcher = None if spec.scheme and spec.scheme_record.profiled else prefetcher
        self._places = alive + (self._prefetcher is not None)
        self._modules: dict[Hashable, dict[int, Block]] = {}
        self._last = 0
        self._next: _Drawn | None = None

    def in_shared_module(self, layer: int) -> Block:
        """Return the layer, which is good until `alive` others have been asked for."""
        block = self._taken(layer) or self._drawn(layer)
        self._prefetch(layer)
        self._last = layer
        return block

    def _taken(self, layer: int) -> Block | None:
        """Return the prefetched layer if it is this one; wait for another one and drop it."""
        drawn, self._next = self._next, None
        if drawn is None or self._prefetcher is None:
            return None
        self._prefetcher.wait(drawn.done)
        return drawn.block if drawn.layer == layer else None

    def _drawn(self, layer: int) -> Block:
        modules, place = self._of_kind(layer_kind(self._spec, layer)), layer % self._places
        if place in modules:
            redraw(modules[place], self._spec, self._seed, layer, self._device)
        else:
            modules[place] = self.in_own_module(layer)
            if self._prefetcher:
                self._prefetcher.owns(modules[place].parameters())
        return modules[place]

    def _prefetch(self, layer: int) -> None:
        """Begin to draw the layer above, or the layer below where the pass goes down."""
        step = -1 if self._alive == 1 and layer == self._last - 1 else 1
        if self._prefetcher is None or not 1 <= layer + step <= len(self):
            return
        modules = self._modules.get(layer_kind(self._spec, layer + step), {})
        block = modules.get((layer + step) % self._places)
        if block is not None:
            draw = partial(redraw, block, self._spec, self._seed, layer + step, self._device)
            self._next = _Drawn(layer + step, block, self._prefetcher.start(draw))

    def in_own_module(self, layer: int) -> Block:
        """Return the layer, drawn into a new module."""
        return with_join(self._join, build_block(self._spec, self._seed, layer, self._device))

    def _of_kind(self, kind: Hashable) -> dict[int, Block]:
        if kind not in self._modules:
            if len(self._modules) == _MOST_KINDS:
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
    """Return one seed of a stack, resident on the device or rebuilt as the plan says."""
    if plan and plan.rebuild:
        blocks: Sequence[Block] = RebuiltBlocks(
            spec, seed, device, plan.alive, join=join, prefetcher=prefetcher_on(device)
        )
    else:
        blocks = [with_join(join, block) for block in build_stack(spec, seed, device)]
    return Network(blocks, input_batch(spec, seed, device), build_loss(spec, seed, device))


def build_timed(
    spec: StackSpec, seed: int, device: torch.device, plan: Plan, join: Compiled | None = None
) -> Network:
    """Return the timed layers of one seed as a network of their own."""
    blocks = [
        with_join(join, build_block(spec, seed, layer, device)) for layer in plan.timed_layers
    ]
    x, loss = input_batch(spec, seed, device), build_loss(spec, seed, device)
    return Network(blocks, x, loss, plan.timed_layers)
