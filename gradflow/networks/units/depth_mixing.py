"""Schemes whose units see the outputs of all units before: the state grows with depth.

Axes: B batch, k streams so far, T tokens, d width. A state of k streams takes k times the memory
of one stream, so the memory of a whole stack grows with the square of its depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.networks.initial import ConstantStart
from gradflow.networks.units.template import KIND_EPS, StreamUnit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class DepthAttention(ConstantStart):
    """h = sum_i softmax_i(w . RMSNorm(v_i)) v_i over the streams v_i, token by token.

    Kimi Team 2026 (arXiv:2603.15031), Eqs. 2 to 4: keys are normalised, values are not. The query
    w starts at 0, so h is the mean. The readout of the scheme is such a module too.
    x: (B, k, T, d), h: (B, T, d).
    """

    query: Tensor
    weight: Tensor

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.shapes = {"query": (spec.width,), "weight": (spec.width,)}
        self.starts = {"query": 0.0, "weight": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        # w . RMSNorm(v) without the normalised copy of the state, which autograd would keep.
        scale = torch.rsqrt(x.square().mean(-1) + KIND_EPS)
        shares = torch.softmax(scale * (x @ (self.query * self.weight)), 1)
        return (shares.unsqueeze(-1) * x).sum(1)


class DepthAttentionUnit(StreamUnit):
    """v_l = f(LN(h_l)), h_l the attention over v_0 ... v_(l-1); v_0 is the input.

    State (v_0, ..., v_l). Skip: the state as it is handed on; branch: the state through h_l and f.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.depth_attention = DepthAttention(spec)

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        v = self.f(self.depth_attention(self.state(x_branch, 1)))
        return torch.cat((self.state(x_skip, 1), v.unsqueeze(1)), 1)


class DepthAverage(ConstantStart):
    """alpha_0 ... alpha_i, which start as (0, ..., 0, 1): the last alone."""

    weight: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.shapes = {"weight": (n,)}
        self.starts = {"weight": torch.eye(n)[-1]}

    def forward(self, earlier: Tensor, last: Tensor) -> Tensor:
        """Return sum_j alpha_j X_j, the last X given apart."""
        weights = self.weight[:-1, None, None]
        return (weights * earlier).sum(1) + self.weight[-1] * last


class DenseUnit(StreamUnit):
    """Pre-norm blocks; after block i, Y_i = sum_(j <= i) alpha_ij X_j goes on to the next.

    DenseFormer, Pagliardini et al. 2024 (arXiv:2402.02622): X_i is what block i computes from
    Y_(i-1), and X_0 = Y_0 the input. State (X_0, ..., X_(i-1), h) within block i,
    (X_0, ..., X_i, Y_i) after it. Skip: all of it, and h + ...; branch: h through f.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        averaged = int(wiring.settings["averaged"])
        self.average = DepthAverage(averaged) if averaged else None

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        state = self.state(x_skip, 2)
        earlier, h = state[:, :-1], state[:, -1]
        h = h + self.f(self.state(x_branch, 2)[:, -1])
        new = [h] if self.average is None else [h, self.average(earlier, h)]
        return torch.cat((earlier, torch.stack(new, 1)), 1)
