"""nGPT, Loshchilov et al. 2024 (arXiv:2410.01131): the normalised transformer.

All vectors along the embedding have Euclidean norm 1: the stream, each branch's output, queries
and keys of each head, and the rows of every matrix that read the stream or the columns of those
that write to it. Learned scales are stored over a constant, as in the authors' code: the value in
use is parameter * value / stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from gradflow.networks.blocks import PHI, Attention, Branch, Linear, MakeBranch
from gradflow.networks.initial import ConstantStart
from gradflow.networks.norms import unit_norm
from gradflow.networks.units.template import Unit
from gradflow.schemes import Wiring
from gradflow.schemes.deep import NGPT_ALPHA
from gradflow.specs.stack import StackSpec


class StoredScale(ConstantStart):
    """A vector whose elements are `value` at the start, as a parameter that starts at `stored`."""

    weight: Tensor

    def __init__(self, size: int, value: float, stored: float) -> None:
        super().__init__()
        self.shapes, self.starts = {"weight": (size,)}, {"weight": stored}
        self.factor = value / stored

    def forward(self) -> Tensor:
        return self.weight * self.factor


class NgptAttention(Attention):
    """W_o concat_h softmax(sqrt(d/heads) q_h k_h^T) v_h, q and k of norm 1 times s_qk.

    x: (B, T, d). No biases.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__(spec, wiring)
        d = spec.width
        self.q, self.k, self.v, self.out = (Linear(d, d, bias=False) for _ in range(4))
        self.s_qk = StoredScale(d, 1.0, 1 / math.sqrt(d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(proj(x)) for proj in (self.q, self.k, self.v))
        scale = self.s_qk().view(self.heads, 1, -1)
        q, k = scale * unit_norm(q), scale * unit_norm(k)
        sharp = math.sqrt(q.shape[-1])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=sharp)
        return self.out(mixed.transpose(1, 2).flatten(2))


class NgptFfn(Branch):
    """W_2 (u phi(v)), (u, v) = s_uv sqrt(d) W_1 x; phi is silu unless chosen. x: (B, T, d).

    W_1 has 2 `hidden` rows: the gated form of the paper.
    """

    output = "down"

    def __init__(self, spec: StackSpec, _: Wiring) -> None:
        super().__init__()
        hidden = spec.hidden
        self.up = Linear(spec.width, 2 * hidden, bias=False)
        self.down = Linear(hidden, spec.width, bias=False)
        self.s_uv = StoredScale(2 * hidden, math.sqrt(spec.width), 1.0)
        self.phi = PHI[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        u, v = (self.s_uv() * self.up(x)).chunk(2, dim=-1)
        return self.down(u * self.phi(v))


class NgptUnit(Unit):
    """h' = N(h + |alpha| (N(f(h)) - h)), N(x) = x/|x|, alpha a parameter per feature, 0.05.

    The shortcut carries both h of the sum; the branch carries f. The authors' code normalises h
    once more in the sum, where it has norm 1 already.
    """

    branches: ClassVar[Mapping[str, MakeBranch]] = {"attention": NgptAttention, "ffn": NgptFfn}

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.alpha = StoredScale(spec.width, NGPT_ALPHA, 1 / math.sqrt(spec.width))

    def settle(self, *_: int) -> None:
        """Bring the weights to norm 1 before the first step too."""
        self.constrain()

    def constrain(self) -> None:
        """Give the vectors of every matrix along the embedding norm 1."""
        for name, part in self.branch.named_children():
            if isinstance(part, Linear):
                dim = 0 if name == self.branch.output else 1
                part.weight.data.copy_(unit_norm(part.weight.data, dim))

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        assert x_skip is not None
        rate = self.alpha().abs()
        return unit_norm(x_skip + rate * (unit_norm(self.branch(x_branch)) - x_skip))
