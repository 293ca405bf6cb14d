"""The branches of the units, forward and backward: moments of f(u), and of J^T g.

The elements of all matrices are independent and of zero mean. Two branches are derived here, at
infinite width:

- Gated ffn, phi(z) h with z = W_gate u and h = W_in u. Given u the two are independent and h has no
  mean, so forward their moments multiply. Backward W_in^T (phi g) + W_gate^T (phi' h g) add up in
  the mean square: s_in E phi phi + s_gate E phi' phi' E h h. In pre-norm |g|^2 then grows as
  (q_L/q_l)^(1 + q E phi'^2/E phi^2), q the variance of z: an exponent of 2.07 for silu at q = 1.
- Resnet, W_out phi(BN(W_in phi(u))) with u = BN(x) (He et al. 2016) and He's relu. E phi(u) =
  1/sqrt(2 pi) is the same for all rows, and through W_in it becomes 1/pi of the unit variance, a
  vector that all rows share. The inner batchnorm takes it out and divides by 1 - 1/pi. In the same
  way 1/pi of the branch's output is shared, and the stream's variance less its shared part, V,
  grows by 1 - 1/pi per block. The branch's gain is 1/((1 - 1/pi) V), so that |g|^2 grows as
  (V_L/V_l)^(1/(1 - 1/pi)^2), an exponent of 2.15.
"""

from __future__ import annotations

from typing import NamedTuple

from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS
from gradflow.theory.mean_field.attention import MixTape, mix, pull_mix
from gradflow.theory.mean_field.layouts import (
    Layout,
    Moments,
    scaled_moments,
    through_weights,
    times_moments,
)
from gradflow.theory.mean_field.norms import NormTape, Stream, normalise, pull_norm
from gradflow.theory.template import TemplateUnit, WeightMoments


class BranchTape(NamedTuple):
    """What the way back through a branch needs.

    Attributes:
        hidden: moments of the pre-activations; empty for attention.
        back: factor from the gradient at the activations to that at the branch's input, for each
            class: weight scale times E phi' phi'; None for attention.
        last: the same factor of the second activation of a resnet, else None.
        mixing: the tape of attention, else None.
        mid: the tape of the norm inside, else None.
    """

    hidden: Moments
    back: Moments | None = None
    last: Moments | None = None
    mixing: MixTape | None = None
    mid: NormTape | None = None


def _single(unit: TemplateUnit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """Return the moments of phi(W u), which has the mean E phi over the features."""
    hidden = through_weights(unit.w_in, _mixed(u.s, layout))
    phi = ACTIVATION_MOMENTS[unit.activation]
    mean = 0.0 if phi.odd else phi.mean(layout.diagonal(hidden))
    f, slopes = layout.activate(unit.activation, hidden)
    source = (unit.activation, layout.mean_square(hidden))
    return Stream(f, mean, source), BranchTape(hidden, scaled_moments(unit.w_in.scale, slopes))


def _ffn(unit: TemplateUnit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """Return the moments of W_out M(phi(W_in u)), or of a gated ffn."""
    if unit.w_gate is not None:
        return _gated_ffn(unit, unit.w_gate, u, layout)
    hidden = through_weights(unit.w_in, u.s)
    phi = ACTIVATION_MOMENTS[unit.activation]
    mean = 0.0 if phi.odd or unit.norm_mid is None else phi.mean(layout.diagonal(hidden))
    source = (unit.activation, layout.mean_square(hidden)) if unit.norm_mid else None
    values, slopes = layout.activate(unit.activation, hidden)
    inner, mid = normalise(unit.norm_mid, Stream(values, mean, source), layout)
    back = scaled_moments(unit.w_in.scale, slopes)
    return Stream(through_weights(unit.w_out, inner.s)), BranchTape(hidden, back, mid=mid)


def _gated_ffn(
    unit: TemplateUnit, gate: WeightMoments, u: Stream, layout: Layout
) -> tuple[Stream, BranchTape]:
    """Return the moments of W_out M(phi(W_gate u) * W_in u), as derived at the top."""
    hidden, linear = through_weights(gate, u.s), through_weights(unit.w_in, u.s)
    values, slopes = layout.activate(unit.activation, hidden)
    product = times_moments(values, linear)
    triples = zip(values, slopes, linear, strict=True)
    back = tuple([unit.w_in.scale * phi + gate.scale * slope * h for phi, slope, h in triples])
    inner, mid = normalise(unit.norm_mid, Stream(product), layout)
    return Stream(through_weights(unit.w_out, inner.s)), BranchTape(hidden, back, mid=mid)


def _attention(unit: TemplateUnit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """Return the moments of W_out M(softmax(q k) v)."""
    mixed, mixing = mix(unit, u.s, layout.shape.tokens)
    inner, mid = normalise(unit.norm_mid, Stream(mixed), layout)
    return Stream(through_weights(unit.w_out, inner.s)), BranchTape((), mixing=mixing, mid=mid)


def _resnet(unit: TemplateUnit, u: Stream, layout: Layout) -> tuple[Stream, BranchTape]:
    """Return the moments of W_out phi(M(W_in phi(u))), both W convolutions."""
    first, slopes = layout.activate(unit.activation, u.s)
    hidden = _convolved(unit, unit.w_in, first, u.s, layout)
    inner, mid = normalise(unit.norm_mid, hidden, layout)
    second, later = layout.activate(unit.activation, inner.s)
    back, last = scaled_moments(unit.w_in.scale, slopes), scaled_moments(unit.w_out.scale, later)
    f = _convolved(unit, unit.w_out, second, inner.s, layout)
    return f, BranchTape(inner.s, back, last, mid=mid)


def _convolved(
    unit: TemplateUnit, weights: WeightMoments, x: Moments, hidden: Moments, layout: Layout
) -> Stream:
    """Convolve x = phi(hidden), whose pixels share their mean over the features."""
    s = through_weights(weights, _mixed(x, layout))
    if layout.shape.side == 1 or "batchnorm" not in unit.norms:
        return Stream(s)
    mean = ACTIVATION_MOMENTS[unit.activation].mean(layout.diagonal(hidden))
    return Stream(s, common=weights.scale * layout.mix_common(mean) + weights.bias)


BRANCH_MOMENTS = {
    "mlp": _single,
    "conv": _single,
    "resnet": _resnet,
    "ffn": _ffn,
    "attention": _attention,
}


def pull_branch(unit: TemplateUnit, tape: BranchTape, g: Moments, layout: Layout) -> Moments:
    """Return the moments of the gradient at the branch's input, g those at its output."""
    if tape.last is not None:
        g = pull_norm(tape.mid, times_moments(tape.last, _mixed(g, layout)), layout)
        return times_moments(tape.back or (), _mixed(g, layout))
    if not unit.is_single:
        g = pull_norm(tape.mid, scaled_moments(unit.w_out.scale, g), layout)
    if tape.mixing is not None:
        return pull_mix(tape.mixing, g, layout.shape.tokens)
    g = times_moments(tape.back or (), g)
    return _mixed(g, layout) if unit.kind == "conv" else g


def _mixed(g: Moments, layout: Layout) -> Moments:
    return tuple([layout.mix_pixels(entry) for entry in g])
