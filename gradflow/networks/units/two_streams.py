"""Schemes of two streams, of which at least one is normalised after the addition.

Axes: B batch, n = 2 streams, T tokens, d width. The state between two units is one tensor
(B, n, T, d); the input of the stack, and a state of one stream, are (B, T, d).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.networks.norms import stream_norm
from gradflow.networks.units.template import StreamUnit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class B2tUnit(StreamUnit):
    """h = LN(x + attn(x)); x' = LN(x + h + ffn(h)), Takase et al. 2023 (arXiv:2206.00330).

    The state between attention and ffn is (h, x), after the ffn x' alone. Skip: x and h as they
    are added; branch: x into the attention, h into the ffn. Both pass the norm.
    """

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        if x_skip.ndim == 3:
            return torch.stack((self.after(x_skip + self.f(x_branch)), x_skip), 1)
        h, x = x_skip.unbind(1)
        return self.after(x + h + self.f(x_branch[:, 0]))


class DualUnit(StreamUnit):
    """p' = LN(p + f(p)), r' = r + f(p), p_0 = r_0 = x.

    ResiDual, Xie et al. 2023 (arXiv:2304.14802). State (p, r). Skip: p and r as they are added
    to; branch: p through f into both.
    """

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        p, r = self.state(x_skip, 2).unbind(1)
        f = self.f(self.state(x_branch, 2)[:, 0])
        return torch.stack((self.after(p + f), r + f), 1)


class DualReadout(nn.Module):
    """p + LN(r): the output of ResiDual, (B, 2, T, d) to (B, T, d)."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.norm = stream_norm(spec)

    def forward(self, x: Tensor) -> Tensor:
        p, r = x.unbind(1)
        return p + self.norm(r)


class SiameseUnit(StreamUnit):
    """q = LN(p), z = f(LN(q + LN(y))), p' = q + z / c, y' = y + z; p_0 = y_0 = x.

    SiameseNorm, Li et al. 2026 (arXiv:2602.08064), as in the authors' DeiT: three norms to a
    unit, c = sqrt(2 block) (`settings["divisor"]`). State (p, y). Skip: LN(p) and y as they are
    added to; branch: both through f.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.norm_p, self.norm_y = stream_norm(spec), stream_norm(spec)
        self.divisor = float(wiring.settings["divisor"])

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        p, y = self.state(x_skip, 2).unbind(1)
        p_in, y_in = self.state(x_branch, 2).unbind(1)
        z = self.f(self.norm_p(p_in) + self.norm_y(y_in))
        return torch.stack((self.norm_p(p) + z / self.divisor, y + z), 1)


class SiameseReadout(nn.Module):
    """LN(LN(p) + LN(y)): the output of SiameseNorm, (B, 2, T, d) to (B, T, d)."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.norm_p, self.norm_y, self.norm = (stream_norm(spec) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        p, y = x.unbind(1)
        return self.norm(self.norm_p(p) + self.norm_y(y))
