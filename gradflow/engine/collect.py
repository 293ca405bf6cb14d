"""What a pass leaves behind, finished in chunks of units while the pass goes on.

On CPU a chunk goes to the tables at once. On CUDA nothing may wait for the device inside a pass,
so chunks stay there, packed into one tensor each, until the pass is over.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gradflow import reductions
from gradflow.engine.rows import Packed, Row, pack, unpack
from gradflow.reductions import Sums, forward_sums
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import LayerRecord, ParamRecord

CHUNK_UNITS = 32


class ForwardSums(Protocol):
    """`stats.forward_sums`, or its like for several seeds."""

    def __call__(self, y: Tensor, *, tokens: bool) -> Sums: ...


@dataclass(frozen=True)
class Tables:
    """Where the rows of a measurement go."""

    layers: Spool[LayerRecord] = field(default_factory=lambda: Spool(LayerRecord))
    params: Spool[ParamRecord] = field(default_factory=lambda: Spool(ParamRecord))


def new_tables(scratch: Path | None) -> Tables:
    """Empty ones; what does not fit into memory goes to the folder."""
    return Tables(Spool(LayerRecord, scratch), Spool(ParamRecord, scratch))


class Activations:
    """The forward sums of every unit: seen from the input up, given back from the last down.

    Args:
        tokens: as for `stats.forward_sums`.
        forward_sums: that function, or another in its place.
    """

    def __init__(self, *, tokens: bool, forward_sums: ForwardSums = forward_sums) -> None:
        self._tokens, self._forward_sums = tokens, forward_sums
        self._stacks: dict[str, _Stack] = {}

    def see(self, y: Tensor) -> None:
        """The next unit's output."""
        for name, value in self._forward_sums(y, tokens=self._tokens).items():
            self._stacks.setdefault(name, _Stack()).push(torch.as_tensor(value))

    def pop(self) -> Sums:
        """The sums of the last unit that was not given back yet."""
        return {name: stack.pop() for name, stack in self._stacks.items()}


class _Stack:
    """Numbers of one column, last in, first out; on CUDA they stay there.

    On CPU they are one array: many small tensors would break up the heap.
    """

    def __init__(self) -> None:
        self._here = array("d")
        self._there: list[Tensor] = []

    def push(self, value: Tensor) -> None:
        if value.ndim == 0 and reductions.is_at_hand(value):
            self._here.append(value.item())
        else:
            self._there.append(value)

    def pop(self) -> Tensor | float:
        return self._there.pop() if self._there else self._here.pop()


def _at_hand(row: Row) -> Row:
    """On CPU the numbers as numbers: small tensors that live on would break up the heap."""
    if any(isinstance(v, Tensor) and not reductions.is_at_hand(v) for v in row.sums.values()):
        return row
    return replace(
        row,
        sums={name: float(value) for name, value in row.sums.items()},
        parts={name: float(value) for name, value in row.parts.items()},
        params=[info.at_hand for info in row.params],
        grads=[None if g is None else (float(g[0]), float(g[1])) for g in row.grads],
    )


class Collector:
    """Takes the rows of one pass from the last unit down, and puts them into tables in order.

    Args:
        seed: written into the records.
        tokens: whether the stream has tokens.
        tables: where they go.
        step: written into the records.
    """

    def __init__(self, seed: int, tables: Tables, *, tokens: bool, step: int = 0) -> None:
        self._when, self._tokens, self._tables = (seed, step), tokens, tables
        self._first = (tables.layers.chunks, tables.params.chunks)
        self._rows: list[Row] = []
        self._packed: list[Packed] = []
        self._is_finished = False

    def add(self, row: Row) -> None:
        """The row below those that came before."""
        self._rows.append(_at_hand(row))
        if len(self._rows) > CHUNK_UNITS and row.layer:
            self.take(pack(self._rows[::-1]))
            # The gain of a unit needs the row below, so the lowest begins the next chunk.
            self._rows = self._rows[-1:]

    def finish(self) -> None:
        """Put what is left into the tables; waits for the device."""
        if not self._is_finished:
            if self._rows:
                self.take(pack(self._rows[::-1]))
            self._store()
            self._tables.layers.turn(self._first[0])
            self._tables.params.turn(self._first[1])
            self._is_finished = True

    def take(self, packed: Packed) -> None:
        """The rows below those that came before, packed."""
        self._packed.append(packed)
        if reductions.is_at_hand(packed.numbers):
            self._store()

    def _store(self) -> None:
        for packed in self._packed:
            layers, params = unpack(packed, self._when, tokens=self._tokens)
            self._tables.layers.add_chunk(layers)
            self._tables.params.add_chunk(params)
        self._packed = []
