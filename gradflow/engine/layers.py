"""Layers of a stack that are made when they are asked for, as a sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

from gradflow.networks.stack import Block


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
