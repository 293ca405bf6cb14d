"""The walk for several seeds at once: one pass, the rows of every seed.

Every tensor has an axis of seeds in front. Seeds do not mix: the gradient of the sum of all losses
has each seed's own gradient as its rows, and each seed has its own power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gradflow.engine.rows import (
    CHUNK_UNITS,
    Activations,
    Collector,
    Packed,
    RecordTables,
    UnitRow,
    pack,
)
from gradflow.engine.seeds.blocks import VmappedJoin
from gradflow.engine.tape import Network, SavedBytes, Ticker
from gradflow.engine.walk import Observer, observe
from gradflow.networks.ends import build_loss, input_batch
from gradflow.networks.stack import Block
from gradflow.networks.units.template import Unit
from gradflow.reductions import SeedReductions
from gradflow.specs.stack import StackSpec


@dataclass(frozen=True)
class SeedWalk:
    """The losses (seeds,) of one pass over all seeds; last rows may still be on the device."""

    losses: Tensor
    collector: _SeedCollector

    def finish(self) -> None:
        """Put all rows that are left into the tables; waits for the device."""
        self.collector.finish()


def seed_network(
    spec: StackSpec, seeds: Sequence[int], blocks: Sequence[Block], device: torch.device
) -> Network:
    """Return the network of all seeds from its blocks: `SeedBlocks`, or a list of them."""
    x = torch.stack([input_batch(spec, seed, device) for seed in seeds])
    losses = [build_loss(spec, seed, device) for seed in seeds]
    return Network(blocks, x, _Losses(losses))


def walk_seeds(
    spec: StackSpec,
    network: Network,
    tables: Mapping[int, RecordTables],
    *,
    spans: Sequence[int] = (),
    raw_range: bool = False,
    tick: Ticker = lambda: None,
) -> SeedWalk:
    """Measure several seeds of a stack in one pass.

    Args:
        spec: the stack.
        network: the network of all seeds.
        tables: tables of each seed, by seed.
        spans: which streams are kept, see `tape.record_backward`.
        raw_range: leave the cotangent as the number format has it.
        tick: called once for each layer that is computed, forward or back.
    """
    tokens = spec.kind.domain == "tokens"
    collector = _SeedCollector([Collector(*pair, tokens=tokens) for pair in tables.items()])
    stats = SeedReductions()
    activations = Activations(tokens=tokens, forward_sums=stats.forward_sums)
    saved = partial(_saved_of_one, SavedBytes())
    observer = Observer(stats, activations, saved, collector.add, (len(tables),))
    losses = observe(network, observer, spans, raw_range=raw_range, tick=tick)
    return SeedWalk(losses, collector)


class _Losses(nn.Module):
    """The loss of every seed, (seeds,)."""

    def __init__(self, losses: Sequence[nn.Module]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, y: Tensor) -> Tensor:
        return torch.stack([loss(part) for loss, part in zip(self.losses, y, strict=True)])


def _saved_of_one(saved: SavedBytes, unit: Unit, x: Tensor) -> int:
    """Return the bytes that autograd keeps of the unit for one of the seeds."""
    assert isinstance(unit.compiled, VmappedJoin)
    return saved.of(unit.compiled.unit, x[0].clone())  # whose storage is its own


class _SeedCollector:
    """Takes rows with one number for each seed, and splits them between the seeds' collectors."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors
        self._rows: list[UnitRow] = []

    def add(self, row: UnitRow) -> None:
        """Take the next row down; each of its numbers is a tensor (seeds,)."""
        self._rows.append(row)
        if len(self._rows) > CHUNK_UNITS and row.layer:
            self._pack()
            self._rows = self._rows[-1:]  # its neighbour needs it, see `Collector.add`

    def finish(self) -> None:
        """Put all rows that are left into the tables; waits for the device."""
        self._pack()
        self._rows = []
        for collector in self._collectors:
            collector.finish()

    def _pack(self) -> None:
        parts = _split(pack(self._rows[::-1]), len(self._collectors))
        for collector, packed in zip(self._collectors, parts, strict=True):
            collector.take(packed)


def _split(packed: Packed, seeds: int) -> Iterator[Packed]:
    """Yield the rows of every seed; columns are (rows, seeds), or (rows,) where seeds agree."""
    sizes = [shape.numel() for shape in packed.shapes.values()]
    pieces = torch.split(packed.numbers, sizes)
    pairs = zip(pieces, packed.shapes.values(), strict=True)
    columns = [piece.view(-1, shape[1] if len(shape) == 2 else 1) for piece, shape in pairs]
    shapes = {name: shape[:1] for name, shape in packed.shapes.items()}
    for seed in range(seeds):
        own = [column[:, seed if column.shape[1] > 1 else 0] for column in columns]
        yield replace(packed, numbers=torch.cat(own), shapes=shapes)
