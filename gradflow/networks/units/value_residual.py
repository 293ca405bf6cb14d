"""ResFormer, Zhou et al. 2024 (arXiv:2410.17897): the first layer's values in every attention."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.networks.blocks import Attention
from gradflow.networks.units.template import StreamUnit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class ValueResidualUnit(StreamUnit):
    """x' = x + f(LN(x)) with attention on V_l <- w V_1 + (1 - w) V_l, w = 1/2.

    V_l = W_v LN(x) before the heads are split, V_1 the values of the first attention. State
    (x, V_1). Skip: x as it is added to, and V_1 as it is handed on; branch: x through f, and V_1
    through the attention.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.weight = float(wiring.settings["weight"])

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        if self.is_first:
            normed = self.before(x_branch)
            values = self.attention.v(normed)
            return torch.stack((x_skip + self.attention.attend(normed, values), values), 1)
        x, first_values = x_skip.unbind(1)
        return torch.stack((x + self._f(x_branch), first_values), 1)

    def _f(self, state: Tensor) -> Tensor:
        x, first_values = state.unbind(1)
        if self.name != "attention":
            return self.f(x)
        normed = self.before(x)
        own = self.attention.v(normed)
        values = self.weight * first_values + (1 - self.weight) * own
        return self.attention.attend(normed, values)

    @property
    def attention(self) -> Attention:
        """Return the branch of a unit whose branch is attention."""
        assert isinstance(self.branch, Attention)
        return self.branch
