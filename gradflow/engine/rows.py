"""Rows of a pass: numbers on the device become records in tables on the host, chunk by chunk.

An engine measures a gradient as g * 2^exponent (see `walk`). Here the two become the norm and its
logarithm: the logarithm is exact even where the norm itself leaves float64's range.

On CPU a chunk goes to the tables at once. On CUDA nothing may wait for the device inside a pass,
so chunks stay there, packed into one tensor each, until the pass is over.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradflow import reductions
from gradflow.networks.units.template import ParamInfo
from gradflow.reductions import Counts, ReducedSums, StatVectors
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import LayerRecord, ParamRecord

CHUNK_UNITS = 32
_LOG10_2 = math.log10(2)


@dataclass(frozen=True)
class UnitRow:
    """One unit, or the input, after both passes; all numbers are still on the device.

    Attributes:
        layer: number of the layer; 0 is the input.
        unit: name of the unit.
        shape: shape of the unit's output; units of several streams may change it.
        sums: `forward_sums` of the unit's output, `gradient_sums` of the gradient there, and its
            `exponent`.
        parts: `part_sums` of the gradient at the unit's input; empty without a shortcut.
        saved_bytes: what autograd keeps for the unit's backward.
        params: the unit's parameters.
        grads: norm and non-finite count of the gradient of each parameter, in units of 2^exponent
            of the row below; None where autograd gave no gradient.
    """

    layer: int
    unit: str
    shape: torch.Size
    sums: ReducedSums
    parts: ReducedSums
    saved_bytes: int | None = None
    params: Sequence[ParamInfo] = ()
    grads: Sequence[tuple[Tensor | float, Tensor | float] | None] = ()


@dataclass(frozen=True)
class Packed:
    """Neighbouring rows from the lowest up, whose numbers are one tensor on the device.

    Attributes:
        rows: the rows without their numbers.
        plain: bool (rows,), true for rows of plain units, whose gain has no parts.
        numbers: float64, all columns one after the other.
        shapes: shape of each column.
    """

    rows: Sequence[UnitRow]
    plain: Tensor
    numbers: Tensor
    shapes: Mapping[str, torch.Size]

    @property
    def overlaps(self) -> bool:
        """Whether the first row is also in the chunk below, and here only as a neighbour."""
        return self.rows[0].layer > 0


class SeedStep(NamedTuple):
    """The seed and the training step that rows belong to; step 0 is initialisation."""

    seed: int
    step: int = 0


class _ParamNumbers(NamedTuple):
    """Norm of a parameter, norm of its gradient, and the gradient's non-finite count.

    The count is negative where autograd gave no gradient.
    """

    norm: float
    grad: float
    nonfinite: float


def pack(rows: Sequence[UnitRow]) -> Packed:
    """Put the numbers of rows into one tensor; nothing else stays on the device.

    Args:
        rows: neighbours from the lowest up.
    """
    columns = _by_name(rows)
    tensors = (v for values in columns.values() for v in values if isinstance(v, Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    stacks = {name: _stack(values, device) for name, values in columns.items()}
    shapes = {name: stack.shape for name, stack in stacks.items()}
    bare = [replace(row, sums={}, parts={}, grads=()) for row in rows]
    plain = torch.tensor([not row.parts for row in rows])
    return Packed(bare, plain, torch.cat([stack.flatten() for stack in stacks.values()]), shapes)


def unpack(
    packed: Packed, when: SeedStep, *, tokens: bool
) -> tuple[list[LayerRecord], list[ParamRecord]]:
    """Return the records of packed rows, without the first where it is in the chunk below.

    Waits for the device.

    Args:
        packed: the rows.
        when: seed and step of all rows.
        tokens: whether the stream has tokens.
    """
    host = _to_host(packed)
    params = _param_numbers(host)
    exponents = host["exponent"].tolist()
    count = reductions.counts([row.shape for row in packed.rows], tokens=tokens)
    columns = _columns(host, count, packed.plain)
    layer_records: list[LayerRecord] = []
    param_records: list[ParamRecord] = []
    for i, row in enumerate(packed.rows):
        numbers = {name: values[i] for name, values in columns.items()}
        own = [next(params) for _ in row.params]
        if i == 0 and packed.overlaps:
            continue
        # A unit's parameter gradients are measured in the scale of its input, as is its VJP.
        below = exponents[max(i - 1, 0)]
        scaled = {
            "grad_norm": (numbers["grad_norm"], exponents[i]),
            "param_grad_norm": (_gradient_norm(own), below),
        }
        layer_records.append(_layer_record(when, row, numbers, own, scaled))
        param_records += _param_records(when, row, own, below)
    return layer_records, param_records


def _by_name(rows: Sequence[UnitRow]) -> dict[str, list[Tensor | float]]:
    units = rows[1:]
    grads = [(math.nan, -1.0) if g is None else g for row in rows for g in row.grads]
    return {
        **{name: [row.sums[name] for row in rows] for name in rows[0].sums},
        # Plain units have no parts; what stands in their place is not read.
        **{name: [row.parts.get(name, math.nan) for row in units] for name in reductions.PART_SUMS},
        "param_norm": [param.norm for row in rows for param in row.params],
        "param_grad": [size for size, _ in grads],
        "param_nonfinite": [count for _, count in grads],
    }


def _to_host(packed: Packed) -> StatVectors:
    """All columns, brought over in one transfer."""
    sizes = [shape.numel() for shape in packed.shapes.values()]
    pieces = torch.split(packed.numbers.cpu(), sizes)
    return {n: p.view(s) for (n, s), p in zip(packed.shapes.items(), pieces, strict=True)}


def _stack(values: list[Tensor | float], device: torch.device) -> Tensor:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors and len(tensors) == len(values):
        return torch.stack(tensors).double()
    if not tensors and device.type == "cpu":
        return torch.tensor(values, dtype=torch.float64)
    wide = (_wide(value, device) for value in values)
    return torch.stack(torch.broadcast_tensors(*wide))  # type: ignore[no-untyped-call]  # torch's stubs


def _wide(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.double()
    # Filled where it is: a copy from the host would wait for the device.
    return torch.full((), value, dtype=torch.float64, device=device)


def _columns(host: StatVectors, count: Counts, plain: Tensor) -> dict[str, list[float | None]]:
    """The measured columns of all rows; None where a row has no such number."""
    size, exponent = host["grad_norm"], host["exponent"]
    # dL/dx in the scale of dL/dy: gains are ratios of neighbours.
    scale = torch.ldexp(torch.ones_like(size[1:]), (exponent[:-1] - exponent[1:]).int())
    gains = reductions.part_stats(
        {n: host[n] for n in reductions.PART_SUMS}, size[:-1] * scale, size[1:]
    )
    gains |= {n: gains[n] * scale for n in ("skip_gain", "branch_gain")}
    gains["skip_gain"][plain[1:]] = 0.0
    gains["branch_gain"] = torch.where(plain[1:], gains["gain"], gains["branch_gain"])
    measured = reductions.forward_stats(host, count) | reductions.gradient_stats(host, count)
    columns = {name: values.tolist() for name, values in measured.items()}
    columns |= {name: [None, *values.tolist()] for name, values in gains.items()}
    missing = {
        "act_cos": count.vectors < 2,
        "grad_cos": count.samples < 2,
        "skip_branch_cos": plain,
    }
    for name, mask in missing.items():
        columns[name] = [
            None if gone else value
            for value, gone in zip(columns[name], mask.tolist(), strict=True)
        ]
    return columns


def _param_numbers(host: StatVectors) -> Iterator[_ParamNumbers]:
    names = ("param_norm", "param_grad", "param_nonfinite")
    return map(_ParamNumbers, *(host[name].tolist() for name in names))


def _gradient_norm(own: Sequence[_ParamNumbers]) -> float | None:
    """Norm of the gradients of all parameters of a unit; None where there is none."""
    grads = [one.grad for one in own if one.nonfinite >= 0]
    return math.hypot(*grads) if grads else None


def _layer_record(
    when: SeedStep,
    row: UnitRow,
    numbers: Mapping[str, Any],
    own: Sequence[_ParamNumbers],
    scaled: Mapping[str, tuple[float | None, float]],
) -> LayerRecord:
    """The record of a row; `scaled` has the norms that become size * 2^exponent by column."""
    columns: dict[str, Any] = dict(numbers)
    for name, pair in scaled.items():
        columns |= {name: scaled_size(*pair), f"log10_{name}": log10(*pair)}
    return LayerRecord(
        seed=when.seed,
        step=when.step,
        layer=row.layer,
        unit=row.unit,
        **columns | {"nonfinite": int(numbers["nonfinite"])},
        param_norm=math.hypot(*(one.norm for one in own)) if own else None,
        saved_bytes=row.saved_bytes,
    )


def _param_records(
    when: SeedStep, row: UnitRow, own: Sequence[_ParamNumbers], exponent: float
) -> Iterator[ParamRecord]:
    for info, numbers in zip(row.params, own, strict=True):
        has_grad = numbers.nonfinite >= 0
        grad = numbers.grad if has_grad else None
        yield ParamRecord(
            *when,
            row.layer,
            row.unit,
            info.name,
            info.shape,
            info.numel,
            numbers.norm,
            scaled_size(grad, exponent),
            log10(grad, exponent),
            int(numbers.nonfinite) if has_grad else None,
        )


def scaled_size(size: float | None, exponent: float) -> float | None:
    """Return size * 2^exponent; 0 or inf where that leaves float64's range."""
    if size is None or not math.isfinite(size):
        return size
    try:
        return math.ldexp(size, int(exponent))
    except OverflowError:
        return math.inf


def log10(size: float | None, exponent: float) -> float | None:
    """Return log10(size * 2^exponent); -inf for a size of 0."""
    if size is None or math.isnan(size):
        return size
    return math.log10(size) + exponent * _LOG10_2 if size > 0 else -math.inf


@dataclass(frozen=True)
class RecordTables:
    """The two tables that the records of a measurement go to."""

    layers: Spool[LayerRecord] = field(default_factory=lambda: Spool(LayerRecord))
    params: Spool[ParamRecord] = field(default_factory=lambda: Spool(ParamRecord))

    def extend(self, other: RecordTables) -> None:
        """Append the records of other tables to these."""
        self.layers.extend(other.layers)
        self.params.extend(other.params)


def new_tables(scratch: Path | None) -> RecordTables:
    """Return empty tables; records that do not fit into memory go to files in the folder."""
    return RecordTables(Spool(LayerRecord, scratch), Spool(ParamRecord, scratch))


class ForwardSums(Protocol):
    """Computes `reductions.forward_sums`, of one seed or of several at once."""

    def __call__(self, y: Tensor, *, tokens: bool) -> ReducedSums: ...


class Activations:
    """The forward sums of every unit: pushed from the input up, popped from the last unit down.

    Args:
        tokens: whether cosines are taken between tokens, see `reductions.forward_sums`.
        forward_sums: computes the sums.
    """

    def __init__(
        self, *, tokens: bool, forward_sums: ForwardSums = reductions.forward_sums
    ) -> None:
        self._tokens, self._forward_sums = tokens, forward_sums
        self._stacks: dict[str, _Stack] = {}

    def push(self, y: Tensor) -> None:
        """Keep the sums of the next unit's output."""
        for name, value in self._forward_sums(y, tokens=self._tokens).items():
            self._stacks.setdefault(name, _Stack()).push(torch.as_tensor(value))

    def pop(self) -> ReducedSums:
        """Return the sums of the last unit that was not popped yet."""
        return {name: stack.pop() for name, stack in self._stacks.items()}


class _Stack:
    """The numbers of one column, last in, first out; on CUDA they stay on the device.

    On CPU they are one array: many small tensors would break up the heap.
    """

    def __init__(self) -> None:
        self._on_host = array("d")
        self._on_device: list[Tensor] = []

    def push(self, value: Tensor) -> None:
        if value.ndim == 0 and reductions.is_at_hand(value):
            self._on_host.append(value.item())
        else:
            self._on_device.append(value)

    def pop(self) -> Tensor | float:
        return self._on_device.pop() if self._on_device else self._on_host.pop()


def _at_hand(row: UnitRow) -> UnitRow:
    """On CPU, the row with floats for tensors: small tensors would break up the heap."""
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
        seed: seed that the records have.
        tables: tables that the records go to.
        tokens: whether the stream has tokens.
        step: training step that the records have.
    """

    def __init__(self, seed: int, tables: RecordTables, *, tokens: bool, step: int = 0) -> None:
        self._when, self._tokens, self._tables = SeedStep(seed, step), tokens, tables
        self._first = (tables.layers.chunks, tables.params.chunks)
        self._rows: list[UnitRow] = []
        self._packed: list[Packed] = []
        self._is_finished = False

    def add(self, row: UnitRow) -> None:
        """Take the next row down."""
        self._rows.append(_at_hand(row))
        if len(self._rows) > CHUNK_UNITS and row.layer:
            self.take(pack(self._rows[::-1]))
            # The gain of a unit needs the row below, so the lowest begins the next chunk.
            self._rows = self._rows[-1:]

    def finish(self) -> None:
        """Put all rows that are left into the tables; waits for the device."""
        if not self._is_finished:
            if self._rows:
                self.take(pack(self._rows[::-1]))
            self._store()
            self._tables.layers.turn(self._first[0])
            self._tables.params.turn(self._first[1])
            self._is_finished = True

    def take(self, packed: Packed) -> None:
        """Take the next rows down, which are packed already."""
        self._packed.append(packed)
        if reductions.is_at_hand(packed.numbers):
            self._store()

    def _store(self) -> None:
        for packed in self._packed:
            layers, params = unpack(packed, self._when, tokens=self._tokens)
            self._tables.layers.add_chunk(layers)
            self._tables.params.add_chunk(params)
        self._packed = []
