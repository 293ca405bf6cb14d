"""Layers that exist only while they are used: built anew from (spec, seed, layer) at each visit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import overload

import torch

from gradflow.engine.compiled import use
from gradflow.networks.residual import Compiled
from gradflow.networks.stack import Block, build_block, layer_kind, redraw
from gradflow.specs.spec import StackSpec

# A stack of more kinds of layer than this constructs modules again and again.
MOST_KINDS = 8


class RebuiltBlocks(Sequence[Block]):
    """The layers of a stack, of which `alive` neighbours can be used at a time.

    A layer is played by a module that played another of its kind before: one draw gives it its
    weights, and nothing else is made.

    Args:
        spec: as for `build_block`, like the next two.
        seed: of the weights.
        device: where they lie.
        alive: of how many neighbours the weights must hold together.
        join: compiled, in the place of the units' own; None if they are not compiled.
    """

    def __init__(
        self,
        spec: StackSpec,
        seed: int,
        device: torch.device,
        alive: int = 1,
        join: Compiled | None = None,
    ) -> None:
        self._spec, self._seed, self._device = spec, seed, device
        self._alive, self._join = alive, join
        self._modules: dict[Hashable, dict[int, Block]] = {}

    def __len__(self) -> int:
        return self._spec.depth

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        """The layer at this place, from 0; good until `alive` others have been asked for.

        The layers of a slice have modules of their own.
        """
        layers = range(1, len(self) + 1)[index]
        if isinstance(layers, range):
            return [self._built(each) for each in layers]
        return self._played(layers)

    def _played(self, layer: int) -> Block:
        modules, place = self._of_kind(layer_kind(self._spec, layer)), layer % self._alive
        if place in modules:
            redraw(modules[place], self._spec, self._seed, layer, self._device)
        else:
            modules[place] = self._built(layer)
        return modules[place]

    def _built(self, layer: int) -> Block:
        return use(self._join, build_block(self._spec, self._seed, layer, self._device))

    def _of_kind(self, kind: Hashable) -> dict[int, Block]:
        if kind not in self._modules:
            if len(self._modules) == MOST_KINDS:
                del self._modules[next(iter(self._modules))]
            self._modules[kind] = {}
        return self._modules[kind]
