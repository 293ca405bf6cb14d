"""The branches f of the units y = x + f(norm(x)).

Axes: B batch, T tokens, d width, C channels, H x W pixels. Streams are (B, d), (B, T, d) or
(B, C, H, W). A branch states which of its linear maps feed the activation and which is its output
projection; `initial` needs both. Its parameters hold no values until `initial.fill` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.networks.initial import Matrix
from gradflow.networks.norms import make_norm
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class Linear(Matrix):
    """y = x W^T + b, x: (..., fan_in)."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        super().__init__(fan_out, fan_in, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv3x3(Matrix):
    """3x3 convolution with zero padding that keeps width and image size, x: (B, C, H, W)."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__(width, width, 3, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "silu": F.silu,
    "erf": torch.erf,
    "linear": lambda x: x,
}


class Branch(nn.Module):
    """The branch f of a unit, made from the spec and the unit's wiring.

    Attributes:
        feeds_activation: names of the linear maps whose output goes into the activation.
        output: name of the output projection, where the branch has two matrices or more.
        norms_inside: the branch places the norms itself; the unit adds none.
    """

    feeds_activation: tuple[str, ...] = ()
    output: str | None = None
    norms_inside = False

    def roles(self) -> dict[nn.Module, str]:
        """Return the layers with the names that `feeds_activation`, `output` and gains use."""
        return {part: name for name, part in self.named_children()}


class Mlp(Branch):
    """f(x) = phi(Wx + b), the dense layer of classical feed-forward nets. x: (B, d)."""

    feeds_activation = ("linear",)

    def __init__(self, spec: StackSpec, _: Wiring) -> None:
        super().__init__()
        self.linear = Linear(spec.width, spec.width)
        self.phi = PHI[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(self.linear(x))


class Conv(Branch):
    """f(x) = phi(conv3x3(x) + b), zero padding. x: (B, C, H, W)."""

    feeds_activation = ("conv",)

    def __init__(self, spec: StackSpec, _: Wiring) -> None:
        super().__init__()
        self.conv = Conv3x3(spec.width)
        self.phi = PHI[spec.activation]

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
        self.norm1, self.norm2 = (make_norm(spec, wiring, *wiring.norms) for _ in range(2))
        self.phi = PHI[spec.activation]
        self.activation_last = "out" in wiring.norms

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_last:
            return self.norm2(self.conv2(self.phi(self.norm1(self.conv1(x)))))
        return self.conv2(self.phi(self.norm2(self.conv1(self.phi(self.norm1(x))))))


class Attention(Branch):
    """Multi-head self-attention, Vaswani et al. 2017 (arXiv:1706.03762). x: (B, T, d).

    f(x) = W_o M(concat_h softmax(q_h k_h^T / sqrt(c)) v_h) + b_o through torch's fused kernel, c
    the features of a head, M the norm in the middle, where there is one; queries, keys and values
    are normalised per head where the wiring says so, queries and keys then rotated (`rotate`). The
    power of c may be another (`Wiring.logit_power`).
    With fewer `kv_heads` than `heads` each key and value serves a group of queries, Ainslie et al.
    2023 (arXiv:2305.13245).
    """

    output = "out"

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__()
        self.size, self.base, self.causal = spec.head_size, spec.rope, bool(spec.causal)
        heads = spec.head_count
        kv_heads = spec.kv_heads or heads
        queries, keys = heads * self.size, kv_heads * self.size
        self.heads, self.grouped = heads, kv_heads != heads
        self.q = Linear(spec.width, queries, bias=spec.has_bias("q"))
        self.k = Linear(spec.width, keys, bias=spec.has_bias("k"))
        self.v = Linear(spec.width, keys, bias=spec.has_bias("v"))
        self.out = Linear(queries, spec.width, bias=spec.has_bias("out"))
        self.q_norm = make_norm(spec, wiring, "query-key", width=self.size)
        self.k_norm = make_norm(spec, wiring, "query-key", width=self.size)
        self.v_norm = make_norm(spec, wiring, "value", width=self.size)
        self.mid = make_norm(spec, wiring, "mid", width=queries)
        self.sharpness = self.size**-wiring.logit_power

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.v(x))

    def attend(self, x: Tensor, values: Tensor) -> Tensor:
        """Return f(x) with these values (B, T, heads c) in the place of the projection of x."""
        q, k, v = (self._split(part) for part in (self.q(x), self.k(x), values))
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        if self.base:
            q, k = rotate(q, self.base), rotate(k, self.base)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.sharpness, enable_gqa=self.grouped
        )
        return self.out(self.mid(mixed.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """Reshape (B, T, heads c) to (B, heads, T, c)."""
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, -1, self.size).transpose(1, 2)


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn feature pairs (i, i + c/2) of the token at position t by the angle t base^(-2i/c).

    Rotary position embedding, Su et al. 2021 (arXiv:2104.09864): scores q_s . k_t then depend on
    t - s alone. The pairs are the halves of a head, as in the checkpoints of Hugging Face; the
    paper pairs neighbours, which is a permutation of features, and has base 10,000. x and the
    result are queries or keys (B, heads, T, c), c even.
    """
    turns = _turns if torch.compiler.is_compiling() else _known_turns
    cos, sin = turns(x.shape[-2], x.shape[-1], base, x.dtype, x.device)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _turns(
    tokens: int, size: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles, (T, c/2), from float32, as published models have them."""
    frequency = 1.0 / base ** (torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.arange(tokens, device=device).float()[:, None] * frequency
    return angles.cos().to(dtype), angles.sin().to(dtype)


_known_turns = lru_cache(maxsize=8)(_turns)  # the same for every layer


class Ffn(Branch):
    """f(x) = W_2 M(phi(W_1 x + b_1)) + b_2, x: (B, T, d)."""

    feeds_activation = ("up",)
    output = "down"

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__()
        self.up = Linear(spec.width, spec.hidden, bias=spec.has_bias("up"))
        self.down = Linear(spec.hidden, spec.width, bias=spec.has_bias("down"))
        self.phi = PHI[spec.activation]
        self.mid = make_norm(spec, wiring, "mid", width=spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(self.phi(self.up(x))))


class GatedFfn(Ffn):
    """f(x) = W_2 M(phi(W_g x + b_g) * (W_1 x + b_1)) + b_2, x: (B, T, d).

    SwiGLU with silu, GEGLU with gelu: Shazeer 2020 (arXiv:2002.05202).
    """

    feeds_activation = ("gate",)

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__(spec, wiring)
        self.gate = Linear(spec.width, spec.hidden, bias=spec.has_bias("gate"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(self.phi(self.gate(x)) * self.up(x)))


def _ffn(spec: StackSpec, wiring: Wiring) -> Branch:
    return (GatedFfn if spec.gated else Ffn)(spec, wiring)


MakeBranch = Callable[[StackSpec, Wiring], Branch]

BRANCHES: dict[str, MakeBranch] = {
    "mlp": Mlp,
    "conv": Conv,
    "resnet": ResNet,
    "attention": Attention,
    "ffn": _ffn,
}
