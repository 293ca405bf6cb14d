"""Schemes that carry more than one stream between their units: two streams, or values kept aside.

Axes: B batch, n streams, T tokens, d width. The state between two units is one tensor
(B, n, T, d); the input of the stack, and a state of one stream, are (B, T, d). Everywhere x_branch
is what passes the branch f, and x_skip is what goes around it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.networks.blocks import Attention
from gradflow.networks.norms import norm_of_kind
from gradflow.networks.units.template import Unit
from gradflow.schemes.wiring import Wiring
from gradflow.specs.stack import StackSpec

# Of the norms that wirings have of their own; `--norm-eps` is that of the units'.
EPS = 1e-5


class StreamUnit(Unit):
    """A unit whose stream is a state of several streams.

    The first unit of a stack (`settings["first"]`) makes the state from the input.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.is_first = bool(wiring.settings.get("first"))

    def state(self, x: Tensor, copies: int) -> Tensor:
        """(B, n, T, d): x itself, or copies of the stack's input (B, T, d)."""
        return x.unsqueeze(1).expand(-1, copies, -1, -1) if self.is_first else x

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """The next state; these units always have a shortcut."""
        assert x_skip is not None
        return self.step(x_skip, x_branch)

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        """The next state from the two uses of this one."""
        raise NotImplementedError  # the interface: each wiring has its own

    def forward(self, x: Tensor) -> Tensor:
        # Both uses are gathered in views of their own before they are added: see `Unit.forward`.
        return self.evaluate(x.view_as(x), x.view_as(x))


def stream_norm(spec: StackSpec) -> nn.Module:
    """A norm of the stack's kind for one stream (B, T, d)."""
    kind = str(spec.norm_kind or spec.domain.norm_kind)
    return norm_of_kind(spec, kind, spec.width)


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


class ValueResidualUnit(StreamUnit):
    """x' = x + f(LN(x)) with attention on V_l <- w V_1 + (1 - w) V_l, w = 1/2.

    ResFormer, Zhou et al. 2024 (arXiv:2410.17897). V_l = W_v LN(x) before the heads are split;
    V_1 is that of the first attention. State (x, V_1). Skip: x as it is added to, and V_1 as it
    is handed on; branch: x through f, and V_1 through the attention.
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
        """The branch, where it is attention."""
        assert isinstance(self.branch, Attention)
        return self.branch
