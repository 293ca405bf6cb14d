"""How far one seed may lie from the prediction: the variance of ln |g|^2 at finite width n.

Unit by unit, in nats^2, derived here to first order in 1/n for a branch with the share w of |g|^2:

- Shortcut and branch: |g + J^T g|^2 has the cross term 2 <g, J^T g>, normal in the branch's
  weights: 4 w (1 - w)/n.
- A matrix W of m rows: |W^T g|^2 is a mean of m squared normals, 2/m: w^2 times as much.
- An activation between: sum_i d_i^2 c_i^2/n, d = phi', c normal, has the relative variance
  (3 m4 - 1)/n, m4 = E d^4/(E d^2)^2. That is the matrix's 2/n; 2 (m4 - 1)/n more for given d, drawn
  anew by each probe's c; and (m4 - 1)/n of the pattern of d, which probes share whose inputs are
  alike. A plain ReLU net has 2 + 2 + 1 = 5: Var ln(G_0/G_L) = 5 L/n (Hanin & Nica 2020,
  arXiv:1812.05994).
- In a plain net a neuron also moves the size of its layer's output, E phi^2, by phi^2/E phi^2
  over n. With A the derivative of the ln of all later E d^2 by the ln of that size, the sum over
  the neurons is of d^2/E d^2 + A phi^2/E phi^2. Where a norm divides the size out, A = -1; else
  (`_later_slopes`) A_l = f (e + t A_(l+1)), e and t the derivatives of ln E d^2 and ln E phi^2 by
  ln q at l + 1, f the share of q there that came through the weights, not biases.

What differs from probe to probe is averaged over the N independent probes of a batch,
ln(1 + (e^v - 1)/N). Where attention is in the stack, `tokens` has the variance by probe and that of
sizes instead; but for dyt and derf after the shortcut.

The ln of a mean of log-normal numbers lies half this variance below the ln of their mean: the bias.
Neglected: order (L/n)^2, and correlations between units. Good to about a factor of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from gradflow.theory.finite_width.tokens import gradient_parts, tokens_variance
from gradflow.theory.maths import Array
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS, Moment
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.norms import CENTRED_NORMS, POINTWISE_PHI, ROW_NORMS
from gradflow.theory.mean_field.recursion import MomentPasses
from gradflow.theory.template import TemplateUnit, WeightMoments

_STEP = 1e-4  # for derivatives by ln q


@dataclass(frozen=True)
class _UnitFacts:
    """What the noise of each unit depends on, one entry a unit.

    Attributes:
        share: w, the share of the branch in |g|^2.
        q: variance of the pre-activations; 1 for attention.
        alike: cosine of the pre-activations between rows; 0 for attention.
        probes: 1/N.
        fresh: share of the branch in the variance that a norm after the shortcut divides out.
        settled: cosine between rows of the unit's output, where a norm follows the shortcut.
    """

    share: Array
    q: Array
    alike: Array
    probes: Array
    fresh: Array
    settled: Array

    def at(self, where: npt.NDArray[np.int64]) -> _UnitFacts:
        """Return the entries of these units only."""
        return _UnitFacts(*(getattr(self, field.name)[where] for field in fields(self)))


@dataclass(frozen=True)
class LevelNoise:
    """The noise of ln |g|^2 over that at the output, at the input and after every unit, in nats.

    Attributes:
        variance: variance of one seed.
        bias: bias of the mean over seeds.
        drift: variance of one row where larger rows have larger slopes, so that rows of unlike
            size come further apart: the mean over rows then leaves the recursion of the mean.
    """

    variance: Array
    bias: Array
    drift: float

    def plus(self, variance: Array) -> LevelNoise:
        """Return the noise with an independent part of this variance."""
        return LevelNoise(self.variance + variance, self.bias - 0.5 * variance, self.drift)


def finite_width(
    units: Sequence[TemplateUnit],
    passes: MomentPasses,
    layout: Layout,
    few: float = 0.0,
    *,
    whole: bool = True,
) -> LevelNoise:
    """Return variance and bias of ln |g|^2.

    Args:
        units: first to last.
        passes: both passes through them.
        layout: classes of the moments.
        few: added to 1/N; 1/(classes - 1) where all gradients come from a few classes.
        whole: whether norms are of all that the units hand on, not of one stream of several.
    """
    facts, groups = _gather(units, passes, layout, few), _alike(units)
    alone, shared, sizes = (np.zeros(len(units)) for _ in range(3))
    chained = len({unit.kind for unit in units}) == 1 and not any(u.a or u.norms for u in units)
    extra, drift = np.zeros(len(units) + 1), 0.0
    for where in groups:
        unit, part = units[where[0]], facts.at(where)
        size = _size(unit, part) if unit.kind != "attention" and not unit.a else None
        if chained and unit.kind != "attention":
            size, extra[1:], drift = _later_slopes(unit, part, layout)
        alone[where] = _by_probe(unit, part, layout)
        shared[where] = _shared(unit, part, layout, size)
        sizes[where] = _rescaling(part, layout)
    every = _to_output(shared) + extra
    variance = _averaged(alone, facts.probes) + every
    if whole and _has_tokens_noise(units, layout):
        return LevelNoise(
            every + _of_tokens(units, passes, layout, facts, few), -0.5 * variance, drift
        )
    return LevelNoise(variance + _to_output(sizes), -0.5 * variance, drift)


def _has_tokens_noise(units: Sequence[TemplateUnit], layout: Layout) -> bool:
    """Tell whether `_of_tokens` holds: attention, and no pointwise norm after a shortcut.

    A pointwise norm answers to the stream's errors by its slopes, which `tokens` leaves out.
    """
    attends = layout.shape.tokens > 1 and any(unit.kind == "attention" for unit in units)
    return attends and not any(unit.norm_out in POINTWISE_PHI for unit in units)


def _alike(units: Sequence[TemplateUnit]) -> list[npt.NDArray[np.int64]]:
    """Return the places of units that share their formulas."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, unit in enumerate(units):
        gated = unit.w_gate and (unit.w_gate, unit.w_in)
        kind = (unit.kind, unit.activation, not unit.a, unit.norms, gated)
        groups.setdefault(kind, []).append(place)
    return [np.array(places) for places in groups.values()]


def _of_tokens(
    units: Sequence[TemplateUnit],
    passes: MomentPasses,
    layout: Layout,
    facts: _UnitFacts,
    few: float,
) -> Array:
    """Return the variance by probes and sizes where attention gathers the tokens' mean gradient.

    2 <g, J g>/n averaged over many probes still has the trace of J, whose variance is 1/n of that
    of one probe, as far as the slopes in J are alike.
    """
    shape, parts = layout.shape, gradient_parts(passes, layout)
    backs = [tape.inside.back for tape in passes.tapes if tape.inside.back is not None]
    slopes = np.ones(len(units))
    slopes[[tape.inside.back is not None for tape in passes.tapes]] = layout.cosines(backs)
    mean, rest = np.zeros(len(units)), np.zeros(len(units))
    for where in _alike(units):
        unit, part = units[where[0]], facts.at(where)
        mean[where] = _by_probe(unit, replace(part, share=parts.mean[where]), layout)
        rest[where] = _by_probe(unit, replace(part, share=parts.rest[where]), layout)
    mean *= 1 / shape.batch + few + 1 / shape.width
    rest *= 1 / (shape.rows - shape.batch) + few + slopes / shape.width
    return tokens_variance(units, passes, parts, (mean, rest), layout)


def _to_output(steps: Array) -> Array:
    """Return the sums of the entries from each unit to the last; 0 at the output."""
    return np.append(steps[::-1].cumsum()[::-1], 0.0)


def _averaged(alone: Array, probes: Array) -> Array:
    """Return ln(1 + (e^v - 1)/N), the variance of the ln of a mean of N log-normals."""
    one = _to_output(alone)
    over = _to_output(alone * probes) / np.maximum(one, 1e-300)
    return np.asarray(np.log1p(np.expm1(np.minimum(one, 50.0)) * over))


def _gather(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout, few: float
) -> _UnitFacts:
    tokens, rows, none = layout.shape.tokens, layout.shape.rows, np.zeros(len(units))
    same = layout.cosines(passes.gradients[1:]) if layout.shape.domain == "tokens" else none
    probes = (1 + (tokens - 1) * same * same) / rows
    tapes = enumerate(passes.tapes)
    hidden = {place: tape.inside.hidden for place, tape in tapes if tape.inside.back is not None}
    q, alike = none + 1, none.copy()
    q[list(hidden)] = [layout.mean_square(each) for each in hidden.values()]
    alike[list(hidden)] = np.maximum(layout.cosines(list(hidden.values())), 0.0)
    fresh, settled = _renewed(units, passes, layout)
    each = probes + few + 1 / layout.shape.width
    return _UnitFacts(np.array(passes.shares), q, alike, each, fresh, settled)


def _renewed(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout
) -> tuple[Array, Array]:
    """Return `fresh` and `settled` of `_UnitFacts`."""
    fresh, settled = np.zeros(len(units)), np.zeros(len(units))
    after = {
        place: tape.after
        for place, tape in enumerate(passes.tapes)
        if units[place].a and tape.after is not None
    }
    places = list(after)
    a = np.array([units[place].a for place in places])
    kept = [passes.squares[place] * layout.mean_square(norm.scale) for place, norm in after.items()]
    fresh[places] = np.maximum(1 - a**2 * kept, 0.0)
    cosines = layout.cosines([passes.streams[place + 1].s for place in places])
    settled[places] = np.maximum(cosines, 0.0)
    return fresh, settled


def _inner(unit: TemplateUnit, layout: Layout) -> int:
    """Return the number of neurons of one activation layer."""
    return layout.shape.hidden if unit.kind == "ffn" else layout.shape.width


def _by_probe(unit: TemplateUnit, facts: _UnitFacts, layout: Layout) -> Array:
    """Return (4 w (1 - w) + w^2 (2 a matrix + 2 (m4 - 1)))/n, the variance of a single probe."""
    n, w = layout.shape.width, facts.share
    matrices = 2 / n + (0.0 if unit.is_single else 2 / _inner(unit, layout))
    slopes = np.zeros_like(w)
    if unit.kind != "attention":
        layers = 2 if unit.kind == "resnet" else 1
        slopes = 2 * layers * _slope_noise(unit, facts.q, None) / _inner(unit, layout)
    return np.asarray(4 * w * (1 - w) / n + w * w * (matrices + slopes))


def _shared(unit: TemplateUnit, facts: _UnitFacts, layout: Layout, size: Array | None) -> Array:
    """Return w^2 Var(phi'^2/E + A phi^2/E)/n, averaged over the rows as far as these differ.

    Patterns of slopes of two rows of cosine c are alike by c^2, of a rectifier by (2/pi) asin c.
    """
    if unit.kind == "attention":
        return np.zeros_like(facts.q)
    shape, phi = layout.shape, ACTIVATION_MOMENTS[unit.activation]
    alike = facts.alike**2 if phi.odd else 2 / np.pi * np.arcsin(np.minimum(facts.alike, 1.0))
    alike = alike + (1 - alike) / shape.rows
    noise = _slope_noise(unit, facts.q, size) / _inner(unit, layout)
    if unit.kind == "ffn" and size is not None:
        noise = noise + size**2 * 2 / shape.width
    return np.asarray(alike * facts.share**2 * noise)


def _rescaling(facts: _UnitFacts, layout: Layout) -> Array:
    """Return (4 s (1 - s) + 2 s^2)/n c^2, Var ln sigma^2 of a norm after the shortcut; s = `fresh`.

    `mean_field.norms` has its derivation, and its bias.
    """
    s, c = facts.fresh, facts.settled
    return np.asarray((4 * s * (1 - s) + 2 * s * s) / layout.shape.width * c * c)


def _size(unit: TemplateUnit, facts: _UnitFacts) -> Array | None:
    """Return A of a plain unit: -1 where a norm divides the stream's size out, row by row."""
    return np.full_like(facts.q, -1.0) if set(unit.norms) & set(ROW_NORMS) else None


def _later_slopes(
    unit: TemplateUnit, facts: _UnitFacts, layout: Layout
) -> tuple[Array, Array, float]:
    """Return A of a plain net without norms, the variance by the output's own size, and the drift.

    The variance is that of the ratio of |g|^2 from each unit's output on.
    """
    phi, q = ACTIVATION_MOMENTS[unit.activation], facts.q
    e, t = (_log_slope(f, q) for f in (phi.slope_square, phi.square))
    gain = unit.w_in.scale * (unit.w_out.scale if unit.kind == "ffn" else 1.0)
    f = np.minimum(gain * np.asarray(phi.square(q))[:-1] / q[1:], 1.0)
    later = np.zeros_like(q)
    for place in range(len(q) - 2, -1, -1):
        later[place] = f[place] * (e[place + 1] + t[place + 1] * later[place + 1])
    own = np.asarray(phi.expect(lambda y, _: y**4, q)) / np.asarray(phi.square(q)) ** 2 - 1
    own = own / _inner(unit, layout) + (2 / layout.shape.width if unit.kind == "ffn" else 0.0)
    size = np.zeros_like(q)
    size[0] = own[0]
    for place in range(1, len(q)):
        size[place] = own[place] + (t[place] * f[place - 1]) ** 2 * size[place - 1]
    drift = float((np.maximum(later, 0.0) ** 2 * own).sum())
    return later, facts.alike * later**2 * size, drift


def _slope_noise(unit: TemplateUnit, q: Array, size: Array | None) -> Array:
    """Return Var(d^2/E d^2 + A (phi - m)^2/E (phi - m)^2), A = `size`, m = 0 or the mean."""
    if unit.w_gate is not None:
        return _gated_noise(unit, unit.w_gate, q)
    phi = ACTIVATION_MOMENTS[unit.activation]
    keys = np.round(np.stack([np.log(q), np.zeros_like(q) if size is None else size]), 6)
    (log_q, weight), back = np.unique(keys, axis=1, return_inverse=True)
    q = np.exp(log_q)
    centred = bool(set(unit.norms) & set(CENTRED_NORMS))
    mean = np.asarray(phi.mean(q))[:, None] if centred else np.zeros_like(q)[:, None]
    variance = np.asarray(phi.square(q))[:, None] - mean**2
    slope = np.asarray(phi.slope_square(q))[:, None]

    def squared(f: Array, d: Array) -> Array:
        sizes = weight[:, None] * (f - mean) ** 2 / variance
        return np.asarray((d * d / slope + sizes) ** 2)

    noise = np.asarray(phi.expect(squared, q)) - (1 + weight) ** 2
    return np.asarray(noise[back.ravel()])


def _gated_noise(unit: TemplateUnit, gate: WeightMoments, q: Array) -> Array:
    """Return Var(z)/(E z)^2 of z = s_in phi^2 + s_gate (phi' h)^2, h ~ N(0, r) the other factor."""
    phi = ACTIVATION_MOMENTS[unit.activation]
    keys, back = np.unique(np.round(np.log(q), 6), return_inverse=True)
    q = np.exp(keys)
    r = (unit.w_in.scale * (q - gate.bias) / gate.scale + unit.w_in.bias)[:, None]
    a, b = unit.w_in.scale, gate.scale

    def square(f: Array, d: Array) -> Array:
        one, two = a * f * f, b * r * d * d
        return np.asarray(one * one + 2 * one * two + 3 * two * two)

    mean = phi.expect(lambda f, d: a * f * f + b * r * d * d, q)
    return np.asarray((np.asarray(phi.expect(square, q)) / np.asarray(mean) ** 2 - 1)[back.ravel()])


def _log_slope(moment: Moment, q: Array) -> Array:
    """Return d ln moment / d ln q."""
    up, down = (np.log(np.asarray(moment(q * np.exp(h)))) for h in (_STEP, -_STEP))
    return np.asarray((up - down) / (2 * _STEP))
