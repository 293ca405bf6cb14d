"""The normalisations of a unit, and the functions of each element that stand in for them.

Axes: B batch, T tokens, d width, C channels. Parameters hold no values until `initial.fill` gives
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.networks.initial import ConstantStart
from gradflow.schemes import Wiring
from gradflow.specs.block_kinds import GROUPS, POINTWISE
from gradflow.specs.stack import StackSpec


class Norm(ConstantStart):
    """A normalisation with an affine map after it, 1 and 0 at the start.

    layernorm: over the features of a token or vector, over C x H x W of an image (Ba et al. 2016,
    arXiv:1607.06450). rmsnorm: x / sqrt(mean x^2 + eps), no shift (Zhang & Sennrich 2019,
    arXiv:1910.07467). batchnorm: per feature over all else, always with the statistics of the
    batch, because that is the network whose gradient is asked for (Ioffe & Szegedy 2015,
    arXiv:1502.03167). groupnorm: as layernorm in groups of features (Wu & He 2018,
    arXiv:1803.08494).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, kind: str, domain: str, width: int, eps: float) -> None:
        super().__init__()
        names = ("weight",) if kind == "rmsnorm" else ("weight", "bias")
        self.shapes = dict.fromkeys(names, (width,))
        self.starts = {"weight": 1.0, "bias": 0.0}
        self.bias = None
        self.kind, self.eps = kind, eps
        self.apply_norm = NORMALISE[kind, domain]

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_norm(x, self.weight, self.bias, self.eps)


class Pointwise(ConstantStart):
    """A function of each element in the place of a norm.

    dyt: weight tanh(alpha x) + bias, Zhu et al. 2025 (arXiv:2503.10622). derf: weight
    erf(alpha x + shift) + bias, Chen et al. 2025 (arXiv:2512.10938). alpha and shift are one
    number each; weight and bias are per feature (channel), 1 and 0 at the start.
    """

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    shift: Tensor | None

    def __init__(self, kind: str, domain: str, width: int, alpha: float) -> None:
        super().__init__()
        shift = {"shift": (1,)} if kind == "derf" else {}
        self.shapes = {"alpha": (1,), **shift, "weight": (width,), "bias": (width,)}
        self.starts = {"alpha": alpha, "shift": 0.0, "weight": 1.0, "bias": 0.0}
        self.shift = None
        self.kind = kind
        self.squash = torch.tanh if kind == "dyt" else torch.erf
        self.per_feature = (-1, 1, 1) if domain == "images" else (-1,)

    def forward(self, x: Tensor) -> Tensor:
        z = self.alpha * x if self.shift is None else self.alpha * x + self.shift
        weight, bias = self.weight.view(self.per_feature), self.bias.view(self.per_feature)
        return weight * self.squash(z) + bias


# x, weight, bias, eps
Normalise = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


HALF = (torch.bfloat16, torch.float16)


def _is_narrow(x: Tensor) -> bool:
    """Tell whether torch would add up in half precision: on CPU, unless the map is float32.

    There statistics of batchnorm, and the gradients of the affine maps, would be off by percents.
    """
    return x.dtype in HALF and x.device.type == "cpu"


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the affine map, in float32 where that makes all sums float32."""
    if _is_narrow(x):
        return weight.float(), None if bias is None else bias.float()
    return weight, bias


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    # Its gradient of the affine map takes the format of x for the sum.
    wide = x.float() if _is_narrow(x) else x
    return F.layer_norm(wide, x.shape[-1:], *_affine(x, weight, bias), eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, _: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, *_affine(x, weight, bias), training=True, eps=eps)


def _token_batch_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _batch_norm(x.flatten(0, 1), weight, bias, eps).view(x.shape)


def _group_norm(groups: int) -> Normalise:
    return lambda x, weight, bias, eps: F.group_norm(x, groups, *_affine(x, weight, bias), eps)


NORMALISE: dict[tuple[str, str], Normalise] = {
    ("layernorm", "vectors"): _layer_norm,
    ("layernorm", "tokens"): _layer_norm,
    ("layernorm", "images"): _group_norm(1),
    ("rmsnorm", "vectors"): _rms_norm,
    ("rmsnorm", "tokens"): _rms_norm,
    ("batchnorm", "vectors"): _batch_norm,
    ("batchnorm", "tokens"): _token_batch_norm,
    ("batchnorm", "images"): _batch_norm,
    ("groupnorm", "vectors"): _group_norm(GROUPS),
    ("groupnorm", "images"): _group_norm(GROUPS),
}


def unit_norm(x: Tensor, dim: int = -1) -> Tensor:
    """Return x / |x|_2; in half precision the norm is float32, or its rounding would scale x."""
    wide = torch.float32 if x.dtype in HALF else None
    return (x / torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)).to(x.dtype)


def make_norm(spec: StackSpec, wiring: Wiring, *places: str, width: int | None = None) -> nn.Module:
    """Return the normalisation at a place of a unit, or the identity where it has none.

    Of several places (`wiring.NORM_PLACES`) the first at which the unit normalises counts. Its kind
    is the stack's, unless the wiring has another; `width` counts features other than the stream's.
    """
    place = next((p for p in places if p in wiring.norms), None)
    if place is None:
        return nn.Identity()
    kind = wiring.kinds.get(place, str(spec.norm_kind or spec.domain.norm_kind))
    return norm_of_kind(spec, kind, width or spec.width, wiring.alpha)


def norm_of_kind(spec: StackSpec, kind: str, width: int, alpha: float = 0.5) -> nn.Module:
    """Return a normalisation by its name, for the stream of the spec."""
    if kind in POINTWISE:
        return Pointwise(kind, spec.kind.domain, width, alpha)
    return Norm(kind, spec.kind.domain, width, spec.norm_eps)


def stream_norm(spec: StackSpec) -> nn.Module:
    """Return a norm of the stack's own kind for one stream."""
    return norm_of_kind(spec, str(spec.norm_kind or spec.domain.norm_kind), spec.width)
