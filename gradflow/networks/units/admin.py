"""Admin: shortcut weights that a forward pass at initialisation measures.

x' = LN(omega_i x + f_i(x)), omega_i^2 = 1 + sum over j < i of Var f_j, Liu et al. 2020
(arXiv:2004.08249). Var is over all elements of the batch; as in the authors' code, one pass
measures f_i with the omegas before it already in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradflow.networks.units.template import Scale, Unit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class AdminUnit(Unit):
    """x' = LN(omega x + f(x)), omega a parameter per feature that starts at one number."""

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.omega = Scale(spec, "vector", 1.0)

    def set_omega(self, value: float) -> None:
        """Let omega start at the number that the profile measured."""
        self.omega.weight.data.fill_(value)

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        assert x_skip is not None
        return self.after(self.omega(x_skip) + self.f(x_branch))


class Profile:
    """The profiling pass of one stack and seed, as far up as it was asked for.

    It takes the input batch x through the units that `draw` returns for each layer.
    """

    def __init__(self, draw: Callable[[int], Sequence[Unit]], x: Tensor) -> None:
        self._draw, self._x = draw, x
        self._square = 1.0
        self._omegas: list[tuple[float, ...]] = []

    def omegas(self, layer: int) -> tuple[float, ...]:
        """Return omega of each unit of a layer (from 1)."""
        while len(self._omegas) < layer:
            units = self._draw(len(self._omegas) + 1)
            self._omegas.append(tuple([self._pass(unit) for unit in units]))
        return self._omegas[layer - 1]

    @torch.no_grad()
    def _pass(self, unit: Unit) -> float:
        """Pass one unit forward and return its omega."""
        omega, f = math.sqrt(self._square), unit.f(self._x)
        self._square += f.double().var(correction=0).item()
        self._x = unit.after(omega * self._x + f)
        return omega
