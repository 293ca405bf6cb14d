"""What theory knows of a network: its units as data, all of one template.

    x' = Np(a x + b No(f(c Ni(x))))

f is a branch with independent weights of zero mean; the norms N have gains 1 and shifts 0. A
published scheme is a choice of these numbers. This module only holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

NORM_EPS = 1e-5  # epsilon of the norms, the default of `StackSpec`


class NoTheoryError(Exception):
    """Theory does not hold for a stack; the message says why."""


@dataclass(frozen=True)
class WeightMoments:
    """Second moments of one matrix: `scale` = variance times fan_in, `bias` = variance."""

    scale: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TemplateUnit:
    """One unit; its matrices are named as in `networks.blocks`.

    Attributes:
        kind: `mlp` phi(Wx), `conv` phi(conv3x3(x)), `ffn` W_out M(phi(W_in x)), `resnet`
            W_out phi(M(W_in phi(x))) or `attention` W_out M(softmax(q k) v), M the norm `norm_mid`.
        activation: phi; attention has none.
        w_in: W, the convolution, or the first matrix of two; the values of attention.
        w_out: the output projection; unused by mlp and conv.
        w_gate: the gate of a gated ffn, W_out M(phi(W_gate x) * W_in x); None for no gate.
        w_query, w_key: the queries and the keys of attention.
        w_transform: W_T of a highway layer's T(x) = sigmoid(W_T x + b_T); None elsewhere.
        gate_bias: b_T of a highway layer.
        a: weight of the shortcut; 0 for a plain unit.
        b, c: weights of the branch's output and of its input.
        norm_in, norm_branch, norm_out, norm_mid: kinds of the norms Ni, No, Np and M, or None.
        qk_norm: whether queries and keys are normalised per head.
        alpha: alpha of the pointwise norms dyt, tanh(alpha x), and derf, erf(alpha x).
        logits: factor on the variance of attention's logits, over that of q.k / sqrt(c).
        read: factor on the branch's input before Ni, of which a norm leaves its eps alone.
        norm_value: kind of norm of the values, per head, or None.
        norm_shared: kind of norm of the unit's input, for shortcut and branch alike, or None.
    """

    kind: str
    activation: str = "linear"
    w_in: WeightMoments = field(default=WeightMoments())
    w_out: WeightMoments = field(default=WeightMoments())
    w_gate: WeightMoments | None = None
    w_query: WeightMoments = field(default=WeightMoments())
    w_key: WeightMoments = field(default=WeightMoments())
    w_transform: WeightMoments | None = None
    gate_bias: float = 0.0
    a: float = 1.0
    b: float = 1.0
    c: float = 1.0
    norm_in: str | None = None
    norm_branch: str | None = None
    norm_out: str | None = None
    norm_mid: str | None = None
    qk_norm: bool = False
    alpha: float = 0.5
    logits: float = 1.0
    read: float = 1.0
    norm_value: str | None = None
    norm_shared: str | None = None

    @property
    def is_single(self) -> bool:
        """Tell whether the branch ends in its activation, so that its output has a mean."""
        return self.kind in ("mlp", "conv")

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Return the kinds of norm that the unit has."""
        placed = (self.norm_in, self.norm_branch, self.norm_mid, self.norm_out)
        own = (self.norm_value, self.norm_shared)
        return tuple(kind for kind in (*placed, *own) if kind is not None)


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """The shape of the stream, and what all units share.

    Attributes:
        domain: `vectors`, `tokens` or `images`.
        width: features, or channels.
        batch, tokens, side: samples, tokens in a sample, pixels on a side of an image.
        hidden: width inside an ffn.
        causal: whether attention sees the past only.
    """

    domain: str
    width: int
    batch: int = 1
    tokens: int = 1
    side: int = 1
    hidden: int = 1
    heads: int = 1
    causal: bool = False

    @property
    def rows(self) -> int:
        """Return the vectors of features in a batch, over which batchnorm averages."""
        return self.batch * self.tokens * self.side**2


@dataclass(frozen=True)
class Head:
    """A classifier after the stack, with cross-entropy against random labels.

    Attributes:
        weights: moments of the projection.
        norm: kind of the norm before the projection, or None.
        read: factor on the stream before that norm.
    """

    classes: int
    weights: WeightMoments
    norm: str | None = None
    read: float = 1.0


@dataclass(frozen=True)
class State:
    """What goes from unit to unit in place of one stream.

    Attributes:
        kind: the kind of the units, a key of `unit_theory.UNIT_THEORY`.
        copies: copies of the input at the start, where all streams remain copies.
        norm: kind of norm that units and readout have besides those of the template.
        head_size: values that a norm of attention's values averages.
        layer: units in a layer.
    """

    kind: str
    copies: int = 1
    norm: str = "layernorm"
    head_size: int = 1
    layer: int = 1


@dataclass(frozen=True)
class Stack:
    """A network for theory.

    Attributes:
        shape: of the stream.
        units: first to last.
        input_square: E x^2 of the input's elements, which are independent.
        head: what turns y_D into the loss; None for a random cotangent.
        state: what the units hand on; None for one stream of the template. With a state the units
            are those of the branches.
    """

    shape: StreamShape
    units: tuple[TemplateUnit, ...]
    input_square: float = 1.0
    head: Head | None = None
    state: State | None = None
