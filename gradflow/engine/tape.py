"""Units after their forward pass, from the last to the first, in as much memory as is allowed.

The stream is kept at the first layer of every span, and the layers of a span are computed once
more when the backward pass comes to it; spans may be divided in turn. A span that is not divided
keeps its graphs. One span over the whole stack keeps everything and computes nothing twice; spans
of one layer keep every stream; spans of about sqrt(depth) layers keep sqrt(depth) streams (Chen et
al. 2016, arXiv:1604.06174). Whatever is computed again is computed by the same operations on the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradflow.networks.stack import Block
from gradflow.networks.units.template import Unit

# Called once for each layer that a pass computes.
Ticker = Callable[[], None]


@dataclass(frozen=True)
class Network:
    """One seed of a stack, ready to run.

    Attributes:
        blocks: layers 1 to D.
        x: y_0.
        loss: the map from y_D to the loss.
        layers: numbers of the blocks, where they are a sample of a deeper stack.
    """

    blocks: Sequence[Block]
    x: Tensor
    loss: nn.Module
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class Tape:
    """One unit after its forward pass: its leaves and its output, joined by a graph."""

    layer: int
    unit: Unit
    x_skip: Tensor | None
    x_branch: Tensor
    y: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves that stand for x: shortcut and branch, or the branch alone if plain."""
        return [self.x_branch] if self.x_skip is None else [self.x_skip, self.x_branch]


_See = Callable[[Tape], None]


def record_forward(network: Network, tick: Ticker = lambda: None) -> Iterator[Tape]:
    """Yield the tape of each unit in forward order; every unit starts from fresh leaves."""
    return _Recorder(network, tick).record(range(len(network.blocks)), network.x)


def record_backward(
    network: Network,
    spans: Sequence[int] = (),
    see: _See = lambda _: None,
    tick: Ticker = lambda: None,
) -> Iterator[Tape]:
    """Yield tapes from the last unit to the first, after a forward pass.

    Args:
        network: the stack.
        spans: number of layers of a span, of a span inside it, and so on; none keeps all graphs.
        see: called once with the tape of each unit, in forward order.
        tick: called whenever a layer was computed.
    """
    everything = range(len(network.blocks))
    return _Recorder(network, tick).unwind(everything, network.x, tuple(spans), see)


def visits(depth: int, spans: Sequence[int]) -> int:
    """Return how many layers `record_backward` computes in all, repeated ones counted again."""
    if not spans:
        return depth
    last = (depth - 1) // spans[0] * spans[0]
    inside = visits(spans[0], spans[1:]) * (last // spans[0])
    return last + inside + visits(depth - last, spans[1:])


@dataclass(frozen=True)
class _Recorder:
    """Computes parts of a network; layers count from 0 here, and x is the stream below them."""

    network: Network
    tick: Ticker

    def record(self, layers: range, x: Tensor) -> Iterator[Tape]:
        for index in layers:
            for unit in self.network.blocks[index].units:
                x_branch = x.detach().requires_grad_()
                x_skip = x.detach().requires_grad_() if unit.shortcut else None
                tape = Tape(index + 1, unit, x_skip, x_branch, unit.evaluate(x_skip, x_branch))
                yield tape
                x = tape.y
            self.tick()

    def advance(self, layers: range, x: Tensor, see: _See) -> Tensor:
        """Return the stream above the layers; nothing else is kept."""
        for tape in self.record(layers, x):
            see(tape)
            x = tape.y.detach()
        return x

    def unwind(self, layers: range, x: Tensor, spans: tuple[int, ...], see: _See) -> Iterator[Tape]:
        """Yield tapes from the last to the first; `see` gets them on their first visit."""
        if not spans:
            yield from self._keep(layers, x, see)
            return
        parts = [layers[i : i + spans[0]] for i in range(0, len(layers), spans[0])]
        streams = [x]
        for part in parts[:-1]:
            streams.append(self.advance(part, streams[-1], see))
        yield from self.unwind(parts.pop(), streams.pop(), spans[1:], see)
        while parts:
            yield from self.unwind(parts.pop(), streams.pop(), spans[1:], lambda _: None)

    def _keep(self, layers: range, x: Tensor, see: _See) -> Iterator[Tape]:
        tapes: list[Tape] = []
        for tape in self.record(layers, x):
            see(tape)
            tapes.append(tape)
        del tape  # or the last graph would outlive its use
        while tapes:
            yield tapes.pop()


class SavedBytes:
    """Bytes that autograd keeps for a unit's backward, parameters aside.

    Counted once per structure and shape of the stream, in a forward pass of its own: hooks in the
    measured pass would cost time and could hold tensors.
    """

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, unit: Unit, x: Tensor) -> int:
        """Return the bytes of the distinct storages that `unit` saves for an input like x."""
        key = (unit.structure, x.shape)
        if key not in self._known:
            self._known[key] = count_saved(unit, x)
        return self._known[key]


def count_saved(unit: Unit, x: Tensor) -> int:
    """Return the bytes of the distinct storages saved in one forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in unit.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor.detach()
        return tensor.detach()

    branch = x.detach().requires_grad_()
    skip = x.detach().requires_grad_() if unit.shortcut else None  # one leaf each, as in a pass
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit.evaluate(skip, branch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
