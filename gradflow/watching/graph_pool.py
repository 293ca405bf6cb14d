"""CUDA graphs: what is captured once and replayed without Python.

While a graph is captured the hooks run as always, but their kernels only become part of it. They
write to memory that was there before and never moves; every replay writes there anew, and the host
reads it when the step ends. Until then replays add up, as micro-batches do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.errors import UsageError
from gradflow.watching.device_rows import FORWARD, GRADIENT, WIDTH, Pool

# Devices whose work can be captured.
KINDS = ("cuda",)
# Rows for one layer in all graphs: a call has up to five.
ROWS_PER_LAYER = 64
LARGEST = sorted({FORWARD.index("y_max"), GRADIENT.index("g_max")})


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph and does not run."""
    # Asked about its stream, a build for CUDA raises where there is no driver.
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's stubs
    return begun and torch.cuda.is_current_stream_capturing()


class GraphPool(Pool):
    """Rows that replays add to, with the number of replays in the last column; none is given back.

    Args:
        device: where.
        layers: how many are watched.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        super().__init__(device)
        rows = ROWS_PER_LAYER * (layers + 4)
        self.sums = torch.zeros(rows, WIDTH + 1, dtype=torch.float64, device=device)
        self.one = torch.ones(1, dtype=torch.float64, device=device)

    def take(self) -> int:
        """The number of a row that nobody else writes to.

        Raises:
            UsageError: there is none left.
        """
        if self.taken == len(self.sums):
            rule = f"graphs that are captured under watch have {self.taken} rows"
            raise UsageError(rule, "more calls of layers", "watch fewer layers with layers=")
        self.taken += 1
        return self.taken - 1

    def write(self, number: int, values: list[Tensor]) -> None:
        """Add values to a row, but keep the largest where that is what the column holds."""
        row, count = self.sums[number], len(values)
        new = torch.stack(values)
        if count > 1:  # an inner product has a column of its own
            column = LARGEST[0] if count == len(FORWARD) else LARGEST[1]
            torch.maximum(row[column], new[column], out=row[column])
            for part in (slice(0, column), slice(column + 1, count)):
                row[part].add_(new[part])
        else:
            row[:1].add_(new)
        row[WIDTH:].add_(self.one)

    def table(self) -> Tensor:
        """All rows that were taken; shape (rows, WIDTH + 1)."""
        return self.sums[: self.taken]

    def release(self) -> None:
        """What has been read counts no more."""
        self.sums.zero_()

    def times(self, row: list[float]) -> float:
        """How often a row was written to since it was read."""
        return row[WIDTH]
