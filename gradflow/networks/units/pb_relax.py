"""PB-relax of CogView, Ding et al. 2021 (arXiv:2105.13290): norms that keep from overflow."""

from __future__ import annotations

from torch import Tensor

from gradflow.networks.units.template import Unit


class PbRelaxUnit(Unit):
    """The template, every norm N(x) taken of 8 x / max|x|: half precision does not overflow.

    max|x| is over the whole tensor, and no gradient goes through it. Norms do not see the factor
    but for their eps, which then no longer dampens branches of small output, as weights of
    N(0, 0.02) make them.
    """

    def f(self, x: Tensor) -> Tensor:
        inner = self.branch(self.before(_relaxed(x)))
        return self.scale(self.branch_norm(_relaxed(inner)))


def _relaxed(x: Tensor) -> Tensor:
    """Return 8 x / max|x|, the maximum without a gradient."""
    return x / (x.detach().abs().max() / 8)
