"""NormFormer, Shleifer et al. 2021 (arXiv:2110.09456): a learned scale for each attention head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from gradflow.networks.blocks import BRANCHES, Attention, MakeBranch
from gradflow.networks.initial import ConstantStart
from gradflow.networks.units.template import Unit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class HeadScale(ConstantStart):
    """Each head's output times a parameter of its own, 1 at the start. x: (B, T, d)."""

    weight: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.shapes, self.starts = {"weight": (heads,)}, {"weight": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        by_head = x.reshape(*x.shape[:-1], len(self.weight), -1)
        return (by_head * self.weight.unsqueeze(-1)).flatten(-2)


class HeadScaledAttention(Attention):
    """Attention with `HeadScale` before the output projection."""

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__(spec, wiring)
        self.mid: nn.Module = HeadScale(self.heads)


class NormformerUnit(Unit):
    """The template with `HeadScaledAttention`; its norms are those of the wiring."""

    branches: ClassVar[Mapping[str, MakeBranch]] = BRANCHES | {"attention": HeadScaledAttention}
