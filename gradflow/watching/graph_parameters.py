"""Numbers of parameters that CUDA graphs write, at one place for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COLUMNS = ("norm", "grad", "nonfinite", "used", "update")
MISSING = -1.0


class GraphedParameters:
    """A row of `COLUMNS` for each parameter on a device that can be captured.

    Attributes:
        seen: the ids of parameters whose gradient some graph has measured.
        steps: some graph has an optimizer's step in it.
    """

    def __init__(self, parameters: Iterable[Tensor], kinds: Sequence[str]) -> None:
        self.seen: set[int] = set()
        self.steps = False
        self._rows: dict[int, Tensor] = {}
        self._tables: list[Tensor] = []
        devices: dict[torch.device, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.device.type in kinds:
                devices.setdefault(parameter.device, []).append(parameter)
        for device, own in devices.items():
            shape = len(own), len(COLUMNS)
            table = torch.full(shape, MISSING, dtype=torch.float64, device=device)
            self._tables.append(table)
            self._rows |= {id(p): row for p, row in zip(own, table.unbind(0), strict=True)}

    def put(self, parameter: Tensor, name: str, value: Tensor | float) -> None:
        """Write a number where it stays, in a graph that is being captured."""
        cell = self._rows[id(parameter)][COLUMNS.index(name)]
        if isinstance(value, Tensor):
            cell.copy_(value)
        else:
            cell.fill_(value)

    def over(self, rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Rows of `COLUMNS` with what graphs have written where nothing else has."""
        if not (self.seen or self.steps):
            return rows
        written = torch.stack([self._rows[id(p)] for p in parameters])
        found = torch.where(rows == MISSING, written, rows)
        grad, used = found[:, COLUMNS.index("grad")], found[:, COLUMNS.index("used")]
        found[:, COLUMNS.index("used")] = torch.where(used == MISSING, grad, used)
        return found

    def release(self) -> None:
        """What has been read counts no more."""
        if self.seen or self.steps:
            for table in self._tables:
                table.fill_(MISSING)
