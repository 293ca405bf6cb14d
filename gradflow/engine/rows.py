"""From sums on the device to records on the host, with one transfer per chunk of rows.

An engine measures a gradient as g * 2^exponent (see `walk`). Here the two become the norm and its
logarithm: the logarithm is exact even where the norm itself leaves float64's range.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gradflow import reductions
from gradflow.networks.units.template import ParamInfo
from gradflow.reductions import Counts, Numbers, Sums, forward_sums
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import LayerRecord, ParamRecord

LOG10_2 = math.log10(2)


@dataclass(frozen=True)
class Row:
    """One unit, or the input, after both passes; all numbers are still on the device.

    Attributes:
        shape: of the unit's output; units of several streams may change it.
        sums: `stats.forward_sums` of the unit's output, `stats.gradient_sums` of the gradient
            there, and its `exponent`.
        parts: `stats.part_sums` of the gradient at the unit's input; empty without a shortcut.
        params: the unit's parameters.
        grads: for each its gradient's norm and non-finite count, in units of 2^exponent of the
            row below; None where autograd gave no gradient.
    """

    layer: int
    unit: str
    shape: torch.Size
    sums: Sums
    parts: Sums
    saved_bytes: int | None = None
    params: Sequence[ParamInfo] = ()
    grads: Sequence[tuple[Tensor | float, Tensor | float] | None] = ()


@dataclass(frozen=True)
class Packed:
    """Rows whose numbers are one tensor on the device.

    Attributes:
        rows: without their sums.
        plain: which of them are of plain units, without parts of a gain.
        numbers: float64, all columns one after the other.
        shapes: of each column.
    """

    rows: Sequence[Row]
    plain: Tensor
    numbers: Tensor
    shapes: Mapping[str, torch.Size]

    @property
    def has_below(self) -> bool:
        """Whether there are rows below the first, which then is there for its neighbour alone."""
        return self.rows[0].layer > 0


def to_records(
    seed: int, rows: Sequence[Row], *, tokens: bool, step: int = 0
) -> tuple[list[LayerRecord], list[ParamRecord]]:
    """Records of one pass; waits for the device.

    Args:
        seed: written into the records.
        rows: from the input up to the last unit.
        tokens: whether the stream has tokens: see `stats.forward_sums`.
        step: written into the records; 0 is initialisation.

    Returns:
        Layers and parameters, in the order of the rows.
    """
    return unpack(pack(rows), (seed, step), tokens=tokens)


def pack(rows: Sequence[Row]) -> Packed:
    """Rows in one tensor, which lets go of everything else that they hold on the device.

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
    packed: Packed, when: tuple[int, int], *, tokens: bool
) -> tuple[list[LayerRecord], list[ParamRecord]]:
    """Records of packed rows, less the first where there are rows below; waits for the device.

    Args:
        packed: the rows.
        when: seed and step.
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
        # A unit's parameter gradients are measured in the scale of its input, as is its VJP.
        own = [next(params) for _ in row.params]
        if i == 0 and packed.has_below:
            continue
        below = exponents[max(i - 1, 0)]
        scales = (exponents[i], below)
        layer_records.append(_layer_record(when, row, numbers, own, scales))
        param_records += _param_records(when, row, own, below)
    return layer_records, param_records


def _by_name(rows: Sequence[Row]) -> dict[str, list[Tensor | float]]:
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


def _to_host(packed: Packed) -> Numbers:
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


def _columns(host: Numbers, count: Counts, plain: Tensor) -> dict[str, list[float | None]]:
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


def _param_numbers(host: Numbers) -> Iterator[tuple[float, float, float]]:
    return zip(
        host["param_norm"].tolist(),
        host["param_grad"].tolist(),
        host["param_nonfinite"].tolist(),
        strict=True,
    )


def _layer_record(
    when: tuple[int, int],
    row: Row,
    numbers: Mapping[str, Any],
    own: list[tuple[float, float, float]],
    scales: tuple[float, float],
) -> LayerRecord:
    """A record of seed and step; `scales` are the exponents of dL/dy and of dL/dparameters."""
    (seed, step), (exponent, below) = when, scales
    grads = [grad for _, grad, count in own if count >= 0]
    grad = math.hypot(*grads) if grads else None
    return LayerRecord(
        seed=seed,
        step=step,
        layer=row.layer,
        unit=row.unit,
        act_rms=numbers["act_rms"],
        act_max_abs=numbers["act_max_abs"],
        grad_norm=scaled(numbers["grad_norm"], exponent),
        log10_grad_norm=log10(numbers["grad_norm"], exponent),
        **{name: numbers[name] for name in reductions.GAINS},
        param_norm=math.hypot(*(value for value, _, _ in own)) if own else None,
        param_grad_norm=scaled(grad, below),
        log10_param_grad_norm=log10(grad, below),
        act_cos=numbers["act_cos"],
        grad_cos=numbers["grad_cos"],
        nonfinite=int(numbers["nonfinite"]),
        zero_fraction=numbers["zero_fraction"],
        saved_bytes=row.saved_bytes,
    )


def _param_records(
    when: tuple[int, int], row: Row, own: list[tuple[float, float, float]], exponent: float
) -> Iterator[ParamRecord]:
    seed, step = when
    for info, (value, size, count) in zip(row.params, own, strict=True):
        grad = size if count >= 0 else None
        yield ParamRecord(
            seed,
            step,
            row.layer,
            row.unit,
            info.name,
            info.shape,
            info.numel,
            value,
            scaled(grad, exponent),
            log10(grad, exponent),
            int(count) if count >= 0 else None,
        )


def scaled(size: float | None, exponent: float) -> float | None:
    """size * 2^exponent; 0 or inf where that leaves float64's range."""
    if size is None or not math.isfinite(size):
        return size
    try:
        return math.ldexp(size, int(exponent))
    except OverflowError:
        return math.inf


def log10(size: float | None, exponent: float) -> float | None:
    """log10(size * 2^exponent); -inf for a size of 0."""
    if size is None or math.isnan(size):
        return size
    return math.log10(size) + exponent * LOG10_2 if size > 0 else -math.inf


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
