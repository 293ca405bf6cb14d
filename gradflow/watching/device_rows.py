"""Statistics of one tensor into one row of a preallocated float64 buffer on its device.

The sums are those of `gradflow.reductions`; here they are written where they stay until
the step ends, with few operations and without waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.reductions import forward_sums, gradient_sums, mean_cosine

# What a row holds, by the place in it.
FORWARD = ("y_sq", "y_cos", "y_max")
GRADIENT = ("g_sq", "nonzero", "nonfinite", "g_cos", "g_max", "small")
WIDTH = max(len(FORWARD), len(GRADIENT))
CHUNK = 256


class Pool:
    """Rows of float64 on one device, taken one by one and all given back at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.chunks: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.taken = 0

    def take(self) -> int:
        """The number of a row that nobody else writes to."""
        if self.taken == len(self.rows):
            chunk = torch.full((CHUNK, WIDTH), torch.nan, dtype=torch.float64, device=self.device)
            self.chunks.append(chunk)
            self.rows += chunk.unbind(0)
        self.taken += 1
        return self.taken - 1

    def write(self, number: int, values: list[Tensor]) -> None:
        """Put values into a row, from its start."""
        self.rows[number][: len(values)].copy_(torch.stack(values))

    def table(self) -> Tensor:
        """All rows that were taken, still on the device; shape (rows, WIDTH)."""
        used = self.chunks[: -(-self.taken // CHUNK)]
        return torch.cat(used)[: self.taken] if used else torch.empty(0, WIDTH).double()

    def release(self) -> None:
        """Give all rows back."""
        self.taken = 0

    def times(self, row: list[float]) -> float:  # noqa: ARG002 (others look at it)
        """How many tensors a row on the host stands for."""
        return 1.0


def real(x: Tensor) -> Tensor:
    """x with a batch axis; complex numbers are pairs of real ones."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(-2)
    return x if x.ndim > 1 else x.reshape(1, -1)


def measure_forward(pool: Pool, number: int, y: Tensor) -> None:
    """Write the `FORWARD` numbers of y.

    Args:
        pool: where to.
        number: the row.
        y: (batch, tokens, features) counts as tokens; other shapes are (batch, ...).
    """
    y, tokens = real(y), y.ndim == 3
    sums = forward_sums(y, tokens=tokens)
    size, length = torch.as_tensor(sums["y_norm"]), torch.as_tensor(sums["y_length"])
    groups, vectors = (y.shape[:-2].numel(), y.shape[-2]) if tokens else (1, y.shape[0])
    cosine = _cosine(length.square() / groups, vectors)
    largest = torch.maximum(-torch.as_tensor(sums["low"]), torch.as_tensor(sums["high"]))
    pool.write(number, [size.square(), cosine, largest])


def measure_gradient(pool: Pool, number: int, g: Tensor, smallest: float | None) -> Tensor:
    """Write the `GRADIENT` numbers of a gradient.

    Args:
        pool: where to.
        number: the row.
        g: the gradient.
        smallest: the smallest normal number of its half-precision format; None for wide formats.

    Returns:
        The gradient in float64, a copy of its own.
    """
    g = real(g)
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
    """Write the inner product of two gradients of one shape."""
    pool.write(number, [torch.dot(below.reshape(-1), above.reshape(-1))])


def _cosine(square: Tensor, count: int) -> Tensor:
    """`mean_cosine` of `count` vectors; NaN where there are no pairs."""
    if count < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=square.device)
    return mean_cosine(square, count)
