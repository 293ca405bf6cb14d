"""The walk for several seeds at once: one pass, the rows of every seed.

It is `walk` with an axis of seeds in front of every tensor. Seeds do not meet: what goes back from
the sum of their losses is each one's own gradient, and each has its own power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradflow.engine.rows import CHUNK_UNITS, Activations, Collector, Packed, Row, Tables, pack
from gradflow.engine.seeds import reductions
from gradflow.engine.seeds.blocks import Together
from gradflow.engine.tape import Network, SavedBytes, Tick
from gradflow.engine.walk import Observer, observe
from gradflow.networks.inputs import input_batch
from gradflow.networks.losses import build_loss
from gradflow.networks.stack import Block
from gradflow.networks.units.template import Unit
from gradflow.specs.stack import StackSpec


@dataclass(frozen=True)
class SeedWalk:
    """What one pass over several seeds found; its last rows may still be on the device."""

    losses: Tensor
    collector: _SeedCollector

    def finish(self) -> None:
        """Put what is left into the tables; waits for the device."""
        self.collector.finish()


def seed_network(
    spec: StackSpec, seeds: Sequence[int], blocks: Sequence[Block], device: torch.device
) -> Network:
    """The network of all seeds; its blocks are `SeedBlocks`, or a list of them."""
    x = torch.stack([input_batch(spec, seed, device) for seed in seeds])
    losses = [build_loss(spec, seed, device) for seed in seeds]
    return Network(blocks, x, _Losses(losses))


def walk_seeds(
    spec: StackSpec,
    network: Network,
    tables: Mapping[int, Tables],
    *,
    spans: Sequence[int] = (),
    raw_range: bool = False,
    tick: Tick = lambda: None,
) -> SeedWalk:
    """Measure several seeds of a stack; as `walk`, but for the tables: one for each seed."""
    tokens = spec.kind.domain == "tokens"
    collector = _SeedCollector([Collector(*pair, tokens=tokens) for pair in tables.items()])
    activations = Activations(tokens=tokens, forward_sums=reductions.forward_sums)
    observer = Observer(reductions, activations, _SavedOfOne(), collector, (len(tables),))
    losses = observe(network, observer, spans, raw_range=raw_range, tick=tick)
    return SeedWalk(losses, collector)


class _Losses(nn.Module):
    """The loss of every seed, (seeds,)."""

    def __init__(self, losses: Sequence[nn.Module]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, y: Tensor) -> Tensor:
        return torch.stack([loss(part) for loss, part in zip(self.losses, y, strict=True)])


class _SavedOfOne:
    """`SavedBytes` of one seed."""

    def __init__(self) -> None:
        self._saved = SavedBytes()

    def of(self, unit: Unit, x: Tensor) -> int:
        """Bytes that one seed saves."""
        assert isinstance(unit.compiled, Together)
        return self._saved.of(unit.compiled.unit, x[0].clone())  # whose storage is its own


class _SeedCollector:
    """Takes the rows of all seeds, and gives each collector those of its own."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """The row below those that came before; each number of it is one a seed."""
        self._rows.append(row)
        if len(self._rows) > CHUNK_UNITS and row.layer:
            self._pack()
            self._rows = self._rows[-1:]  # its neighbour needs it, see `Collector.add`

    def finish(self) -> None:
        """Put what is left into the tables; waits for the device."""
        self._pack()
        self._rows = []
        for collector in self._collectors:
            collector.finish()

    def _pack(self) -> None:
        parts = _apart(pack(self._rows[::-1]), len(self._collectors))
        for collector, packed in zip(self._collectors, parts, strict=True):
            collector.take(packed)


def _apart(packed: Packed, seeds: int) -> Iterator[Packed]:
    """The rows of every seed; columns are (rows, seeds), or (rows,) where all have the same."""
    sizes = [shape.numel() for shape in packed.shapes.values()]
    pieces = torch.split(packed.numbers, sizes)
    pairs = zip(pieces, packed.shapes.values(), strict=True)
    columns = [piece.view(-1, shape[1] if len(shape) == 2 else 1) for piece, shape in pairs]
    shapes = {name: shape[:1] for name, shape in packed.shapes.items()}
    for seed in range(seeds):
        own = [column[:, seed if column.shape[1] > 1 else 0] for column in columns]
        yield replace(packed, numbers=torch.cat(own), shapes=shapes)
