"""How the state after the last unit becomes the output that the loss takes.

x: (B, n, T, d), the output (B, T, d). A final norm of the head comes after the readout.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from gradflow.networks.units.depth_mixing import DepthAttention
from gradflow.networks.units.streams import stream_norm
from gradflow.specs.stack import StackSpec


class Reduce(nn.Module):
    """A function of the streams without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class DualReadout(nn.Module):
    """p + LN(r): ResiDual, Xie et al. 2023 (arXiv:2304.14802)."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.norm = stream_norm(spec)

    def forward(self, x: Tensor) -> Tensor:
        p, r = x.unbind(1)
        return p + self.norm(r)


class SiameseReadout(nn.Module):
    """LN(LN(p) + LN(y)): SiameseNorm, Li et al. 2026 (arXiv:2602.08064)."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.norm_p, self.norm_y, self.norm = (stream_norm(spec) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        p, y = x.unbind(1)
        return self.norm(self.norm_p(p) + self.norm_y(y))


READOUTS: dict[str, Callable[[StackSpec], nn.Module]] = {
    "first": lambda _: Reduce(lambda x: x[:, 0]),
    "last": lambda _: Reduce(lambda x: x[:, -1]),
    "sum": lambda _: Reduce(lambda x: x.sum(1)),
    "mean": lambda _: Reduce(lambda x: x.mean(1)),
    "dual": DualReadout,
    "siamese": SiameseReadout,
    "depth attention": lambda spec: DepthAttention(spec.width),
}
