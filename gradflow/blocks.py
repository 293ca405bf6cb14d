"""The branches f of the units y = x + f(norm(x)), and the norms.

Axes: B batch, T tokens, d width, C channels, H x W pixels. Streams are (B, d), (B, T, d) or
(B, C, H, W). A branch states which of its linear maps feed the activation and which is its output
projection; `initial` needs both. Its parameters hold no values until `initial.fill` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.spec import GROUPS, POINTWISE, StackSpec
from gradflow.wiring import Wiring

EPS = 1e-5


class ConstantStart(nn.Module):
    """Parameters that start at constants, `starts`, and hold nothing before, as those of `Linear`.

    A start is one number for all elements, or one for each.
    """

    shapes: Mapping[str, tuple[int, ...]]
    starts: Mapping[str, float | Tensor]


class Linear(nn.Module):
    """y = x W^T + b. The parameters hold nothing until `initial.fill` gives them values.

    `nn.Linear` would draw from torch's global generator, and spend more on it than on the pass.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.shapes = {"weight": (fan_out, fan_in)} | ({"bias": (fan_out,)} if bias else {})
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv3x3(nn.Module):
    """3x3 convolution that keeps width and image size, zero padding; empty as `Linear` is."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.shapes = {"weight": (width, width, 3, 3)} | ({"bias": (width,)} if bias else {})
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "erf": torch.erf,
    "linear": lambda x: x,
}


class Branch(nn.Module):
    """What a unit computes; made from the spec and the unit's wiring.

    Attributes:
        feeds_activation: names of the linear maps whose output goes into the activation.
        output: name of the output projection, where the branch has two matrices or more.
        norms_inside: the branch places the norms itself; the unit adds none.
    """

    feeds_activation: tuple[str, ...] = ()
    output: str | None = None
    norms_inside = False


class Mlp(Branch):
    """f(x) = phi(Wx + b), the dense layer of classical feed-forward nets. x: (B, d)."""

    feeds_activation = ("linear",)

    def __init__(self, spec: StackSpec, _: Wiring) -> None:
        super().__init__()
        self.linear = Linear(spec.width, spec.width)
        self.phi = PHI[str(spec.activation)]

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(self.linear(x))


class Conv(Branch):
    """f(x) = phi(conv3x3(x) + b), zero padding. x: (B, C, H, W)."""

    feeds_activation = ("conv",)

    def __init__(self, spec: StackSpec, _: Wiring) -> None:
        super().__init__()
        self.conv = Conv3x3(spec.width)
        self.phi = PHI[str(spec.activation)]

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(self.conv(x))


class ResNet(Branch):
    """The two-convolution basic block. x: (B, C, H, W).

    post: f = norm(conv(phi(norm(conv(x))))), and phi after the addition, He et al. 2015
    (arXiv:1512.03385). pre: f = conv(phi(norm(conv(phi(norm(x)))))), He et al. 2016
    (arXiv:1603.05027). none: as pre, without norms, so that f = 0 is the identity. Every
    convolution feeds an activation: its own, the one after the addition, or the next block's.
    """

    feeds_activation = ("conv1", "conv2")
    output = "conv2"
    norms_inside = True

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__()
        bias = not wiring.norms  # a norm's own shift takes the place of the bias
        self.conv1 = Conv3x3(spec.width, bias=bias)
        self.conv2 = Conv3x3(spec.width, bias=bias)
        norms = (make_norm(spec, wiring, *wiring.norms) for _ in range(2))
        self.norm1, self.norm2 = norms
        self.phi = PHI[str(spec.activation)]
        self.activation_last = "out" in wiring.norms

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_last:
            return self.norm2(self.conv2(self.phi(self.norm1(self.conv1(x)))))
        return self.conv2(self.phi(self.norm2(self.conv1(self.phi(self.norm1(x))))))


class Attention(Branch):
    """Multi-head self-attention, Vaswani et al. 2017 (arXiv:1706.03762). x: (B, T, d).

    f(x) = W_o M(concat_h softmax(q_h k_h^T / sqrt(d / heads)) v_h) + b_o through torch's fused
    kernel, M the norm in the middle, where there is one; queries, keys and values are normalised
    per head where the wiring says so. The keys have no bias: softmax does not change when all
    logits of a row move together, so its gradient would be zero.
    """

    output = "out"

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__()
        self.q = Linear(spec.width, spec.width)
        self.k = Linear(spec.width, spec.width, bias=False)
        self.v = Linear(spec.width, spec.width)
        self.out = Linear(spec.width, spec.width)
        self.heads, self.causal = int(spec.heads or 1), bool(spec.causal)
        self.q_norm = make_norm(spec, wiring, "query-key", heads=self.heads)
        self.k_norm = make_norm(spec, wiring, "query-key", heads=self.heads)
        self.v_norm = make_norm(spec, wiring, "value", heads=self.heads)
        self.mid = make_norm(spec, wiring, "mid")

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.v(x))

    def attend(self, x: Tensor, values: Tensor) -> Tensor:
        """f with these values (B, T, d) in the place of the projection of x."""
        q, k, v = (self._split(part) for part in (self.q(x), self.k(x), values))
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(self.mid(mixed.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, heads, T, d / heads)."""
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, self.heads, -1).transpose(1, 2)


class Ffn(Branch):
    """f(x) = W_2 M(phi(W_1 x + b_1)) + b_2, hidden width `ffn_mult` d. x: (B, T, d)."""

    feeds_activation = ("up",)
    output = "down"

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__()
        hidden = spec.width * int(spec.ffn_mult or 1)
        self.up = Linear(spec.width, hidden)
        self.down = Linear(hidden, spec.width)
        self.phi = PHI[str(spec.activation)]
        self.mid = make_norm(spec, wiring, "mid", width=hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(self.phi(self.up(x))))


BRANCHES: dict[str, type[Branch]] = {
    "mlp": Mlp,
    "conv": Conv,
    "resnet": ResNet,
    "attention": Attention,
    "ffn": Ffn,
}


class Norm(ConstantStart):
    """A normalisation with an affine map after it, 1 and 0 at the start; empty as `Linear` is.

    layernorm: over the features of a token or vector, over C x H x W of an image (Ba et al. 2016,
    arXiv:1607.06450). rmsnorm: x / sqrt(mean x^2 + eps), no shift (Zhang & Sennrich 2019,
    arXiv:1910.07467). batchnorm: per feature over all else, always with the statistics of the
    batch, because that is the network whose gradient is asked for (Ioffe & Szegedy 2015,
    arXiv:1502.03167). groupnorm: as layernorm in groups of features (Wu & He 2018,
    arXiv:1803.08494). eps is 1e-5 throughout.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, kind: str, domain: str, width: int) -> None:
        super().__init__()
        self.shapes = {"weight": (width,)} | ({"bias": (width,)} if kind != "rmsnorm" else {})
        self.starts = {"weight": 1.0, "bias": 0.0}
        self.bias = None
        self.kind = kind
        self.apply_norm = NORMALISE[kind, domain]

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_norm(x, self.weight, self.bias)


class Pointwise(ConstantStart):
    """A function of each element in the place of a norm; empty as `Linear` is.

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


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _rms_norm(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)


def _token_batch_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _batch_norm(x.flatten(0, 1), weight, bias).view(x.shape)


def _group_norm(groups: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda x, weight, bias: F.group_norm(x, groups, weight, bias, EPS)


NORMALISE: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
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


def make_norm(
    spec: StackSpec, wiring: Wiring, *places: str, width: int | None = None, heads: int = 1
) -> nn.Module:
    """The normalisation at a place of a unit, or the identity where it has none.

    Args:
        spec: the kind, where the wiring has none of its own for the place.
        wiring: where the unit normalises.
        places: of `wiring.NORM_PLACES`; the first that the unit has counts.
        width: features, where these are not the stream's.
        heads: the features are those of one head.
    """
    place = next((p for p in places if p in wiring.norms), None)
    if place is None:
        return nn.Identity()
    kind = wiring.kinds.get(place, str(spec.norm_kind or spec.domain.norm_kind))
    return norm_of_kind(kind, spec.kind.domain, (width or spec.width) // heads, wiring.alpha)


def norm_of_kind(kind: str, domain: str, width: int, alpha: float = 0.5) -> nn.Module:
    """A normalisation by its name."""
    if kind in POINTWISE:
        return Pointwise(kind, domain, width, alpha)
    return Norm(kind, domain, width)
