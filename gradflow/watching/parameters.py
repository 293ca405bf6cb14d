"""Parameters of the watched layers through a step: gradients as they come, clipped, and the update.

A gradient is measured when backward has written it (after every micro-batch, so the last one
counts), and again when the optimizer is about to use it if it has been changed since, as clipping
and unscaling do. Changes through `.data` or a view of another tensor are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from gradflow.stats import count_nonfinite, norm
from gradflow.watching.discovery import Place

COLUMNS = ("norm", "grad", "nonfinite", "used", "update")
MISSING = -1.0


@dataclass(frozen=True)
class Owned:
    """A parameter, and the innermost watched layer that it belongs to."""

    place: int
    name: str
    parameter: nn.Parameter


def owned_parameters(places: Sequence[Place]) -> list[Owned]:
    """Every parameter of the layers once: tied ones belong to the first that has them."""
    depth = {id(p.module): i for i, p in enumerate(places)}
    found: dict[int, Owned] = {}
    for place, layer in enumerate(places):
        for name, parameter in layer.module.named_parameters():
            if is_lazy(parameter) or id(parameter) in found:
                continue
            if _innermost(layer.module, name, depth) == place:
                found[id(parameter)] = Owned(place, name, parameter)
    return sorted(found.values(), key=lambda owned: owned.place)


def _innermost(module: nn.Module, name: str, places: dict[int, int]) -> int:
    inner = places[id(module)]
    for part in name.split(".")[:-1]:
        module = module._modules[part]  # type: ignore[assignment]
        inner = places.get(id(module), inner)
    return inner


class ParameterWatch:
    """Norms of parameters, gradients and updates of one step, in float64 on their devices.

    Attributes:
        owned: the parameters.
        active: whether this step is measured.
        tables: for each device a tensor (parameters there, `COLUMNS`); NaN-free `MISSING` where
            a gradient or an update has not been seen.
    """

    def __init__(self, owned: Sequence[Owned]) -> None:
        self.owned = owned
        self.active = True
        self.tables: dict[torch.device, Tensor] = {}
        self._cells: list[tuple[Tensor, ...]] = []
        self._seen: list[tuple[int, int] | None] = []
        self._copies: list[Tensor] = []
        self._prepare()

    def _prepare(self) -> None:
        counts: dict[torch.device, int] = {}
        for one in self.owned:
            device = one.parameter.device
            counts[device] = counts.get(device, 0) + 1
        for device, count in counts.items():
            size = (count, len(COLUMNS))
            self.tables[device] = torch.full(size, MISSING, dtype=torch.float64, device=device)
        rows = {device: iter(table.unbind(0)) for device, table in self.tables.items()}
        self._cells = [next(rows[one.parameter.device]).unbind(0) for one in self.owned]
        self._seen = [None] * len(self.owned)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hooks that see each gradient once it has been written."""
        for i, one in enumerate(self.owned):
            if one.parameter.requires_grad:
                hook = partial(self._accumulated, i)
                yield one.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _accumulated(self, i: int, parameter: Tensor) -> None:
        if self.active and parameter.grad is not None:
            with torch.no_grad():
                self._measure(i, parameter.grad)

    def _measure(self, i: int, grad: Tensor) -> None:
        values = _values(grad)
        size = norm(values)
        _, cell, nonfinite, used, _ = self._cells[i]
        cell.copy_(size)
        used.copy_(size)
        nonfinite.fill_(count_nonfinite(values, size))
        self._seen[i] = _state(grad)

    @torch.no_grad()
    def before_step(self) -> None:
        """The optimizer is about to step: gradients as it uses them, and the weights."""
        if not self.active:
            return
        self._copies = self._copies or [torch.empty_like(one.parameter) for one in self.owned]
        for i, one in enumerate(self.owned):
            self._copies[i].copy_(one.parameter)
            self._cells[i][0].copy_(norm(_values(one.parameter)))
            grad = one.parameter.grad
            if grad is None or self._seen[i] == _state(grad):
                continue
            if self._seen[i] is None:
                self._measure(i, grad)
            else:
                self._cells[i][3].copy_(norm(_values(grad)))

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizer has stepped."""
        if self.active and self._copies:
            for copy, one, cells in zip(self._copies, self.owned, self._cells, strict=True):
                cells[4].copy_(norm(_values(copy.sub_(one.parameter))))

    @torch.no_grad()
    def read(self) -> list[Tensor]:
        """The tables, one for each device, with the norms of the weights if no step was made."""
        for one, cells in zip(self.owned, self._cells, strict=True):
            if not self._copies:
                cells[0].copy_(norm(_values(one.parameter)))
        return list(self.tables.values())

    def in_order(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """The tables of `read` on the host, as one with a row for each of `owned`."""
        rows = {device: iter(table) for device, table in zip(self.tables, tables, strict=True)}
        found = [next(rows[one.parameter.device]) for one in self.owned]
        return np.array(found).reshape(-1, len(COLUMNS))

    def reset(self) -> None:
        """A new step begins."""
        self._seen = [None] * len(self.owned)
        for table in self.tables.values():
            table.fill_(MISSING)


def _values(x: Tensor) -> Tensor:
    """All numbers of a parameter or gradient as real ones; of a sparse one those it stores."""
    x = x.detach()
    if x.is_sparse:
        x = x.coalesce().values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _state(grad: Tensor) -> tuple[int, int]:
    """Changes when the gradient is replaced or written to."""
    return id(grad), grad._version
