"""Units that go beyond the template in one small thing: a gate, a coin, a scale for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradflow.networks.blocks import BRANCHES, Attention, Conv3x3, Linear, MakeBranch
from gradflow.networks.initial import generator
from gradflow.networks.norms import ConstantStart
from gradflow.networks.units.template import Factor, Unit
from gradflow.schemes.wiring import Wiring
from gradflow.specs.stack import StackSpec


class HighwayUnit(Unit):
    """y = T(x) H(x) + (1 - T(x)) x, T(x) = sigmoid(W_T x + b_T), Srivastava et al. 2015.

    arXiv:1505.00387; H is the branch. b_T starts at `settings["gate_bias"]`, below zero: the unit
    begins by carrying. The carried x is the shortcut; both gates and H take the branch's x.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        images = spec.kind.domain == "images"
        self.gate = Conv3x3(spec.width) if images else Linear(spec.width, spec.width)

    def settle(self, *_: int) -> None:
        """Shift the gate's bias."""
        assert self.gate.bias is not None
        self.gate.bias.data.add_(self.wiring.settings["gate_bias"])

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        assert x_skip is not None
        t = torch.sigmoid(self.gate(x_branch))
        return t * self.f(x_branch) + (1 - t) * x_skip


class StochasticUnit(Unit):
    """x' = x + b_l f(x), b_l = 1 with probability `settings["keep"]`, else 0, Huang et al. 2016.

    arXiv:1603.09382, as in training: b_l is drawn once for each batch, from (seed, layer, step)
    alone, on any device alike. A dropped branch has gradients of exactly zero.
    """

    def settle(self, seed: int, layer: int, /) -> None:
        """Draw b_l of the first batch."""
        self.begin(seed, layer, 0)

    def begin(self, seed: int, layer: int, step: int, /) -> None:
        """Draw b_l of a step's batch."""
        purpose = f"stochastic depth, step {step}" if step else "stochastic depth"
        source = generator(torch.device("cpu"), seed, purpose, layer)
        kept = torch.rand((), generator=source).item() < self.wiring.settings["keep"]
        self.scale = Factor(float(kept))


class PbRelaxUnit(Unit):
    """The template, every norm N(x) taken of 8 x / max|x|: PB-relax of CogView.

    Ding et al. 2021 (arXiv:2105.13290): keeps half precision from overflow. max|x| is over the
    whole tensor and no gradient goes through it. Norms do not see the factor but for their eps,
    which then no longer dampens branches of small output, as those under N(0, 0.02) are.
    """

    def f(self, x: Tensor) -> Tensor:
        inner = self.branch(self.before(relaxed(x)))
        return self.scale(self.branch_norm(relaxed(inner)))


def relaxed(x: Tensor) -> Tensor:
    """8 x / max|x|."""
    return x / (x.detach().abs().max() / 8)


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
    """The template with HeadScale in attention, Shleifer et al. 2021 (arXiv:2110.09456)."""

    branches: ClassVar[Mapping[str, MakeBranch]] = BRANCHES | {"attention": HeadScaledAttention}
