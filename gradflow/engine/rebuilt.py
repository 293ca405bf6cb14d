"""Layers that exist only while they are used: built anew from (spec, seed, layer) at each visit."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gradflow.engine.ahead import Ahead
from gradflow.engine.compiled import use
from gradflow.engine.layers import Layers
from gradflow.networks.stack import Block, build_block, layer_kind, redraw
from gradflow.networks.units.template import Compiled
from gradflow.specs.stack import StackSpec

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
