"""Highway networks, Srivastava et al. 2015 (arXiv:1505.00387): a learned gate between f and x."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.networks.blocks import Conv3x3, Linear
from gradflow.networks.units.template import Unit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class HighwayUnit(Unit):
    """y = T(x) H(x) + (1 - T(x)) x, T(x) = sigmoid(W_T x + b_T), H the branch.

    b_T starts at `settings["gate_bias"]`, below zero: the unit begins by carrying. The shortcut is
    the x that is carried; both gates and H take the branch's x.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        images = spec.kind.domain == "images"
        self.gate = Conv3x3(spec.width) if images else Linear(spec.width, spec.width)

    def settle(self, *_: int) -> None:
        """Shift the gate's bias by `settings["gate_bias"]`."""
        assert self.gate.bias is not None
        self.gate.bias.data.add_(self.wiring.settings["gate_bias"])

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        assert x_skip is not None
        t = torch.sigmoid(self.gate(x_branch))
        return t * self.f(x_branch) + (1 - t) * x_skip
