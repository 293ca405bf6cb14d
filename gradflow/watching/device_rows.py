"""Statistics of tensors as rows of float64 on their device, which wait there until a step ends.

The sums are those of `gradflow.reductions`; here they are written where they stay, with few
operations and without waiting for the device.

While a CUDA graph is captured the hooks run as always, but their kernels only become part of it.
They write to memory that was there before and never moves; every replay writes there anew, and the
host reads it when the step ends. Until then replays add up, as micro-batches do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from gradflow.errors import UsageError
from gradflow.reductions import forward_sums, gradient_sums, mean_cosine

# The numbers of a row, by their position in it: of an activation, or of a gradient.
FORWARD_NUMBERS = ("y_sq", "y_cos", "y_max")
GRADIENT_NUMBERS = ("g_sq", "nonzero", "nonfinite", "g_cos", "g_max", "small")
# The numbers of a parameter, by their position in its row.
PARAMETER_NUMBERS = ("norm", "grad", "nonfinite", "used", "update")
# Stands in a parameter's row for a number that has not been seen.
MISSING = -1.0
_WIDTH = max(len(FORWARD_NUMBERS), len(GRADIENT_NUMBERS))
_CHUNK = 256
# Kinds of device whose work can be captured as a graph.
CAPTURABLE = ("cuda",)
# Rows for one layer in all graphs: a call has up to five.
ROWS_PER_LAYER = 64
_FORWARD_MAX, _GRADIENT_MAX = FORWARD_NUMBERS.index("y_max"), GRADIENT_NUMBERS.index("g_max")


def is_capturing() -> bool:
    """Return whether work that is launched now becomes part of a CUDA graph and does not run."""
    # Asked about its stream, a build for CUDA raises where there is no driver.
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's stubs
    return begun and torch.cuda.is_current_stream_capturing()


class Pool:
    """Rows of float64 on one device, taken one by one and all given back at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.chunks: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.taken = self.room = 0

    def take(self) -> int:
        """Return the number of a row that nobody else writes to."""
        if self.taken == self.room:
            self._grow()
        self.taken += 1
        return self.taken - 1

    def _grow(self) -> None:
        chunk = torch.full((_CHUNK, _WIDTH), torch.nan, dtype=torch.float64, device=self.device)
        self.chunks.append(chunk)
        self.rows += chunk.unbind(0)
        self.room += _CHUNK

    def write(self, number: int, values: list[Tensor]) -> None:
        """Put values into a row, from its start."""
        self.rows[number][: len(values)].copy_(torch.stack(values))

    def table(self) -> Tensor:
        """Return all rows that were taken, still on the device; shape (rows, row length)."""
        used = self.chunks[: -(-self.taken // _CHUNK)]
        return torch.cat(used)[: self.taken] if used else torch.empty(0, _WIDTH).double()

    def release(self) -> None:
        """Give all rows back to be taken anew."""
        self.taken = 0

    def times(self, row: list[float]) -> float:  # noqa: ARG002 (graphs look at it)
        """Return how many tensors a row on the host stands for."""
        return 1.0


class GraphPool(Pool):
    """Rows that replays add to, with the number of replays in the last column; none is given back.

    Their number is `ROWS_PER_LAYER` for each watched layer.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        super().__init__(device)
        rows = ROWS_PER_LAYER * (layers + 4)
        self.sums = torch.zeros(rows, _WIDTH + 1, dtype=torch.float64, device=device)
        self.room = rows
        self.one = torch.ones(1, dtype=torch.float64, device=device)

    def _grow(self) -> None:
        rule = f"graphs that are captured under watch have {self.taken} rows"
        raise UsageError(rule, "more calls of layers", "watch fewer layers with layers=")

    def write(self, number: int, values: list[Tensor]) -> None:
        """Add values to a row; in the columns of maxima keep the largest."""
        row, count = self.sums[number], len(values)
        new = torch.stack(values)
        if count > 1:  # an inner product has a row of its own
            column = _FORWARD_MAX if count == len(FORWARD_NUMBERS) else _GRADIENT_MAX
            torch.maximum(row[column], new[column], out=row[column])
            for part in (slice(0, column), slice(column + 1, count)):
                row[part].add_(new[part])
        else:
            row[:1].add_(new)
        row[_WIDTH:].add_(self.one)

    def table(self) -> Tensor:
        """Return all rows that were taken; shape (rows, row length + 1)."""
        return self.sums[: self.taken]

    def release(self) -> None:
        """Set every number to zero, once the host has read them."""
        self.sums.zero_()

    def times(self, row: list[float]) -> float:
        """Return how often a row was written to since the host last read it."""
        return row[_WIDTH]


class GraphParameters:
    """A row of `PARAMETER_NUMBERS` for each parameter on a device whose work can be captured.

    Attributes:
        seen: the ids of parameters whose gradient some graph has measured.
        steps: whether some graph has an optimizer's step in it.
    """

    def __init__(self, parameters: Iterable[Tensor], kinds: Sequence[str]) -> None:
        self.seen: set[int] = set()
        self.steps = False
        self._rows: dict[int, Tensor] = {}
        self._tables: list[Tensor] = []
        for device, group in groupby(parameters, key=attrgetter("device")):
            if device.type in kinds:
                own = list(group)
                shape = len(own), len(PARAMETER_NUMBERS)
                table = torch.full(shape, MISSING, dtype=torch.float64, device=device)
                self._tables.append(table)
                self._rows |= {id(p): row for p, row in zip(own, table.unbind(0), strict=True)}

    def put(self, parameter: Tensor, name: str, value: Tensor | float) -> None:
        """Write a number of a parameter where it stays, in a graph that is being captured."""
        cell = self._rows[id(parameter)][PARAMETER_NUMBERS.index(name)]
        if isinstance(value, Tensor):
            cell.copy_(value)
        else:
            cell.fill_(value)

    def over(self, rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return rows of parameters, what graphs have written in place of missing numbers."""
        if not (self.seen or self.steps):
            return rows
        written = torch.stack([self._rows[id(p)] for p in parameters])
        filled = torch.where(rows == MISSING, written, rows)
        grad, used = (filled[:, PARAMETER_NUMBERS.index(name)] for name in ("grad", "used"))
        used.copy_(torch.where(used == MISSING, grad, used))
        return filled

    def release(self) -> None:
        """Mark every number as missing, once the host has read them."""
        if self.seen or self.steps:
            for table in self._tables:
                table.fill_(MISSING)


def measure_forward(pool: Pool, number: int, y: Tensor) -> None:
    """Write the `FORWARD_NUMBERS` of an activation y into the row `number` of a pool.

    A y of shape (batch, tokens, features) counts as tokens; other shapes are (batch, ...).
    """
    y, tokens = _real(y), y.ndim == 3
    sums = forward_sums(y, tokens=tokens)
    size, length = torch.as_tensor(sums["y_norm"]), torch.as_tensor(sums["y_length"])
    groups, vectors = (y.shape[:-2].numel(), y.shape[-2]) if tokens else (1, y.shape[0])
    cosine = _cosine(length.square() / groups, vectors)
    largest = torch.maximum(-torch.as_tensor(sums["low"]), torch.as_tensor(sums["high"]))
    pool.write(number, [size.square(), cosine, largest])


def measure_gradient(pool: Pool, number: int, g: Tensor, smallest: float | None) -> Tensor:
    """Write the `GRADIENT_NUMBERS` of a gradient into a row; return it in float64, as a copy.

    `smallest` is the smallest normal number of its half-precision format; None for wide formats.
    """
    g = _real(g)
    wide = g.to(torch.float64, copy=True)
    sums = gradient_sums(wide)
    size, nonzero = torch.as_tensor(sums["grad_norm"]), torch.as_tensor(sums["nonzero"])
    nonfinite = torch.as_tensor(sums["nonfinite"], device=wide.device)
    low, high = torch.aminmax(g)
    cosine = _cosine(torch.as_tensor(sums["g_length"]).square(), wide.shape[0])
    values = [size.square(), nonzero, nonfinite, cosine, torch.maximum(-low, high)]
    if smallest is not None:
        # All zeros are below it, too; those are not counted.
        below = torch.count_nonzero(wide.abs() < smallest)
        values.append(below - wide.numel() + nonzero)
    pool.write(number, values)
    return wide


def measure_cross(pool: Pool, number: int, below: Tensor, above: Tensor) -> None:
    """Write the inner product of two gradients of one shape into a row."""
    pool.write(number, [torch.dot(below.reshape(-1), above.reshape(-1))])


def _real(x: Tensor) -> Tensor:
    """x with a batch axis; complex numbers are pairs of real ones."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(-2)
    return x if x.ndim > 1 else x.reshape(1, -1)


def _cosine(square: Tensor, count: int) -> Tensor:
    """`mean_cosine` of `count` vectors; NaN where there are no pairs."""
    if count < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=square.device)
    return mean_cosine(square, count)
