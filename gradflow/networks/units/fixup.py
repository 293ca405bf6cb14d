"""Fixup, Zhang, Dauphin & Ma 2019 (arXiv:1901.09321): residual branches without norms.

A scalar bias (0) stands before each linear map and each activation, a scalar multiplier (1) ends
the branch, and the maps have no biases of their own. Which matrices start at zero and by how much
the others shrink are gains of the wiring.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from gradflow.networks.blocks import Attention, Branch, Ffn, MakeBranch, ResNet
from gradflow.networks.initial import ConstantStart, Matrix
from gradflow.networks.units.template import Unit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class Shift(ConstantStart):
    """x + b, b one number, 0 at the start."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shapes, self.starts = {"bias": (1,)}, {"bias": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _bare(branch: Branch) -> None:
    """Take the biases from the linear maps."""
    for part in branch.children():
        if isinstance(part, Matrix):
            part.shapes.pop("bias", None)


class FixupFfn(Ffn):
    """f(x) = W_2 (phi(W_1 (x + b_1) + b_2) + b_3). x: (B, T, d)."""

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__(spec, wiring)
        _bare(self)
        self.shift1, self.shift2, self.shift3 = Shift(), Shift(), Shift()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.shift3(self.phi(self.shift2(self.up(self.shift1(x))))))


class FixupAttention(Attention):
    """Attention of x + b_1, with b_2 before the output projection. x: (B, T, d)."""

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__(spec, wiring)
        _bare(self)
        self.shift1, self.mid = Shift(), Shift()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shift1(x))


class FixupResNet(ResNet):
    """f(x) = conv2(phi(conv1(phi(x + b_1) + b_2) + b_3) + b_4), pre-activation. x: (B, C, H, W)."""

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__(spec, wiring)
        _bare(self)
        self.shift1, self.shift2 = Shift(), Shift()
        self.shift3, self.shift4 = Shift(), Shift()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.shift2(self.phi(self.shift1(x))))
        return self.conv2(self.shift4(self.phi(self.shift3(hidden))))


class FixupUnit(Unit):
    """x' = x + s f(x), s a parameter that starts at 1; the branches have scalar biases."""

    branches: ClassVar[Mapping[str, MakeBranch]] = {
        "attention": FixupAttention,
        "ffn": FixupFfn,
        "resnet": FixupResNet,
    }
