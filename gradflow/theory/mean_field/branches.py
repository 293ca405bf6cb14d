"""The branches of the units, forward and backward: moments of f(u), and of J^T g.

Weights are independent, of zero mean; matrices that follow one another are so too.
"""

from __future__ import annotations

from typing import NamedTuple

from gradflow.theory.mean_field.attention import MixTape, mix, pull_mix
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.moment_sums import Moments, scaled, through, times
from gradflow.theory.mean_field.moments import ACTIVATIONS
from gradflow.theory.mean_field.norms import NormTape, Stream, normalise, pull_norm
from gradflow.theory.template import Unit, Weights


class BranchTape(NamedTuple):
    """Inside a branch.

    Attributes:
        hidden: moments of the pre-activations; none of attention.
        back: from the gradient at the activations to that at the branch's input, for each class:
            weight scale times E phi' phi'; None for attention.
        last: the same of the second activation, of a resnet.
        mixing: of attention, else None.
        mid: of the norm inside.
    """

    hidden: Moments
    back: Moments | None = None
    last: Moments | None = None
    mixing: MixTape | None = None
    mid: NormTape | None = None


def _single(unit: Unit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """phi(W u): E phi^2, with a mean E phi over the features."""
    hidden = through(unit.w_in, _mixed(u.s, layout))
    phi = ACTIVATIONS[unit.activation]
    mean = 0.0 if phi.odd else phi.mean(layout.diagonal(hidden))
    f, slopes = layout.activate(unit.activation, hidden)
    source = (unit.activation, layout.mean_square(hidden))
    return Stream(f, mean, source), BranchTape(hidden, scaled(unit.w_in.scale, slopes))


def _ffn(unit: Unit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """W_out M(phi(W_in u)), or with a gate."""
    if unit.w_gate is not None:
        return _gated_ffn(unit, unit.w_gate, u, layout)
    hidden = through(unit.w_in, u.s)
    phi = ACTIVATIONS[unit.activation]
    mean = 0.0 if phi.odd or unit.norm_mid is None else phi.mean(layout.diagonal(hidden))
    source = (unit.activation, layout.mean_square(hidden)) if unit.norm_mid else None
    values, slopes = layout.activate(unit.activation, hidden)
    inner, mid = normalise(unit.norm_mid, Stream(values, mean, source), layout)
    back = scaled(unit.w_in.scale, slopes)
    return Stream(through(unit.w_out, inner.s)), BranchTape(hidden, back, mid=mid)


def _gated_ffn(unit: Unit, gate: Weights, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """W_out M(phi(W_gate u) * W_in u): both factors are independent, the second has no mean.

    Forward the product of their moments; backward s_in E phi phi + s_gate E phi' phi' E h h, h the
    second factor. Derived here; at ffn_mult 4 SwiGLU grows as (q_L/q_l)^2.07.
    """
    hidden, linear = through(gate, u.s), through(unit.w_in, u.s)
    values, slopes = layout.activate(unit.activation, hidden)
    product = times(values, linear)
    back = tuple(
        [
            unit.w_in.scale * phi + gate.scale * slope * h
            for phi, slope, h in zip(values, slopes, linear, strict=True)
        ]
    )
    inner, mid = normalise(unit.norm_mid, Stream(product), layout)
    return Stream(through(unit.w_out, inner.s)), BranchTape(hidden, back, mid=mid)


def _attention(unit: Unit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """W_out M(softmax(q k) v)."""
    mixed, mixing = mix(unit, u.s, layout.shape.tokens)
    inner, mid = normalise(unit.norm_mid, Stream(mixed), layout)
    return Stream(through(unit.w_out, inner.s)), BranchTape((), mixing=mixing, mid=mid)


def _resnet(unit: Unit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """W_out phi(M(W_in phi(u))), both W convolutions: He et al. 2016, u the norm of the stream.

    The mean of phi(u) over the features becomes, through W_in, one that the rows share. Batchnorm
    takes it out: for relu it divides by 1 - 1/pi there, and the stream's own variance, less what
    its rows share, grows by as much per block. So |g|^2 grows as (q_L/q_l)^(1/(1 - 1/pi)^2), an
    exponent of 2.15. Derived here.
    """
    first, slopes = layout.activate(unit.activation, u.s)
    hidden = _convolved(unit, unit.w_in, first, u.s, layout)
    inner, mid = normalise(unit.norm_mid, hidden, layout)
    second, later = layout.activate(unit.activation, inner.s)
    back, last = scaled(unit.w_in.scale, slopes), scaled(unit.w_out.scale, later)
    f = _convolved(unit, unit.w_out, second, inner.s, layout)
    return f, BranchTape(inner.s, back, last, mid=mid)


def _convolved(unit: Unit, weights: Weights, x: Moments, hidden: Moments, layout: Layout) -> Stream:
    """A convolution of x = phi(hidden), whose pixels share their mean over the features."""
    s = through(weights, _mixed(x, layout))
    if layout.shape.side == 1 or "batchnorm" not in unit.norms:
        return Stream(s)
    mean = ACTIVATIONS[unit.activation].mean(layout.diagonal(hidden))
    return Stream(s, common=weights.scale * layout.mix_common(mean) + weights.bias)


BRANCHES = {
    "mlp": _single,
    "conv": _single,
    "resnet": _resnet,
    "ffn": _ffn,
    "attention": _attention,
}


def pull_branch(unit: Unit, tape: BranchTape, g: Moments, layout: Layout) -> Moments:
    """Moments of the gradient at the branch's input, from those at its output."""
    if tape.last is not None:
        g = pull_norm(tape.mid, times(tape.last, _mixed(g, layout)), layout)
        return times(tape.back or (), _mixed(g, layout))
    if not unit.is_single:
        g = pull_norm(tape.mid, scaled(unit.w_out.scale, g), layout)
    if tape.mixing is not None:
        return pull_mix(tape.mixing, g, layout.shape.tokens)
    g = times(tape.back or (), g)
    return _mixed(g, layout) if unit.kind == "conv" else g


def _mixed(g: Moments, layout: Layout) -> Moments:
    return tuple([layout.mix_pixels(entry) for entry in g])
