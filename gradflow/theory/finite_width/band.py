"""How far one seed may lie from the prediction: the variance of ln |g|^2 at finite width.

TemplateUnit by unit, in nats^2, for a branch that takes the share w of |g|^2:

- by probe: 4 w (1 - w)/n where shortcut and branch add, and w^2 (2/n per matrix + 2 (m4 - 1)/n),
  m4 = E phi'^4/(E phi'^2)^2. Averaged over the N independent probes of a batch.
- shared by probes whose inputs are alike: the pattern of slopes, w^2 (m4 - 1)/n. A plain ReLU net
  has 2 + 2 + 1 = 5: Var ln(G_0/G_L) = 5 L/n (Hanin & Nica 2020, arXiv:1812.05994).
- in a plain net also the stream's own size, which moves all later slopes or is divided out by a
  norm: phi'^2/E + A phi^2/E in place of phi'^2/E. Derived here.

Where attention is in the stack, `gradient_noise` and `stream_noise` have the variance by probe, and
that of sizes, instead; but for dyt and derf after the shortcut.

The ln of a mean of log-normal numbers lies half this variance below the ln of their mean: the bias.
Limits: L/n small. Good to about a factor of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from gradflow.theory.finite_width.gradient import gradient_variance, moved, parts_of
from gradflow.theory.finite_width.slopes import log_slope, slope_noise
from gradflow.theory.finite_width.stream import stream_steps
from gradflow.theory.maths import Array
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.norms import POINTWISE_PHI, ROW_NORMS
from gradflow.theory.mean_field.recursion import MomentPasses
from gradflow.theory.template import TemplateUnit


@dataclass(frozen=True)
class _Found:
    """Per unit.

    Attributes:
        share: of the branch in |g|^2, w.
        q: variance of the pre-activations; `alike` their cosine between rows; of attention 1, 0.
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

    def at(self, where: npt.NDArray[np.int64]) -> _Found:
        """Of these units only."""
        return _Found(*(getattr(self, field.name)[where] for field in fields(self)))


@dataclass(frozen=True)
class LevelNoise:
    """Of ln |g|^2, relative to the output, at the input and after every unit: nats.

    Attributes:
        variance: of one seed.
        bias: of its mean.
        drift: variance of one row where larger rows have larger slopes, so that rows of unlike
            size come further apart: the mean over rows then leaves the recursion of the mean.
    """

    variance: Array
    bias: Array
    drift: float

    def plus(self, variance: Array) -> LevelNoise:
        """With an independent part of this variance."""
        return LevelNoise(self.variance + variance, self.bias - 0.5 * variance, self.drift)


def finite_width(
    units: Sequence[TemplateUnit],
    passes: MomentPasses,
    layout: Layout,
    few: float = 0.0,
    *,
    whole: bool = True,
) -> LevelNoise:
    """Variance and bias of ln |g|^2.

    Args:
        units: first to last.
        passes: both passes through them.
        layout: of the moments.
        few: added to 1/N; 1/(classes - 1) where all gradients come from a few classes.
        whole: whether norms are of all that the units hand on, not of one stream of several.
    """
    found, groups = _gather(units, passes, layout, few), _alike(units)
    alone, shared, sizes = (np.zeros(len(units)) for _ in range(3))
    chained = len({unit.kind for unit in units}) == 1 and not any(u.a or u.norms for u in units)
    extra, drift = np.zeros(len(units) + 1), 0.0
    for where in groups:
        unit, part = units[where[0]], found.at(where)
        size = _size(unit, part) if unit.kind != "attention" and not unit.a else None
        if chained and unit.kind != "attention":
            size, extra[1:], drift = _later_slopes(unit, part, layout)
        alone[where] = _by_probe(unit, part, layout)
        shared[where] = _shared(unit, part, layout, size)
        sizes[where] = _rescaling(part, layout)
    every = _to_output(shared) + extra
    variance = _averaged(alone, found.probes) + every
    if whole and _has_tokens_noise(units, layout):
        return LevelNoise(
            every + _of_tokens(units, passes, layout, found, few), -0.5 * variance, drift
        )
    return LevelNoise(variance + _to_output(sizes), -0.5 * variance, drift)


def _has_tokens_noise(units: Sequence[TemplateUnit], layout: Layout) -> bool:
    """Whether `_of_tokens` describes it: attention, and after shortcuts no function of elements.

    Such a function answers to the stream's errors by its slopes, which `stream_noise` leaves out.
    """
    attends = layout.shape.tokens > 1 and any(unit.kind == "attention" for unit in units)
    return attends and not any(unit.norm_out in POINTWISE_PHI for unit in units)


def _alike(units: Sequence[TemplateUnit]) -> list[npt.NDArray[np.int64]]:
    """The places of units that share their formulas."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, unit in enumerate(units):
        gated = unit.w_gate and (unit.w_gate, unit.w_in)
        kind = (unit.kind, unit.activation, not unit.a, unit.norms, gated)
        groups.setdefault(kind, []).append(place)
    return [np.array(places) for places in groups.values()]


def _of_tokens(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout, found: _Found, few: float
) -> Array:
    """What probes and sizes bring where attention gathers the tokens' mean gradient.

    2 <g, J g>/n of many probes still has the trace of J, whose variance is 1/n of that of one
    probe: as far as the slopes in J are alike.
    """
    shape, parts = layout.shape, parts_of(passes, layout)
    activated = np.array([unit.kind != "attention" for unit in units])
    backs = [tape.inside.back for tape in passes.tapes if tape.inside.back is not None]
    slopes = np.ones(len(units))
    slopes[[tape.inside.back is not None for tape in passes.tapes]] = layout.cosines(backs)
    mean, rest = np.zeros(len(units)), np.zeros(len(units))
    for where in _alike(units):
        unit, part = units[where[0]], found.at(where)
        mean[where] = _by_probe(unit, replace(part, share=parts.mean[where]), layout)
        rest[where] = _by_probe(unit, replace(part, share=parts.rest[where]), layout)
    mean *= 1 / shape.batch + few + 1 / shape.width
    rest *= 1 / (shape.rows - shape.batch) + few + slopes / shape.width
    return gradient_variance(
        parts,
        moved(parts, activated, shape.tokens),
        (mean, rest),
        stream_steps(units, passes, layout),
        layout,
    )


def _to_output(steps: Array) -> Array:
    """Sums of the entries from each unit to the last; 0 at the output."""
    return np.append(steps[::-1].cumsum()[::-1], 0.0)


def _averaged(alone: Array, probes: Array) -> Array:
    """ln(1 + (e^v - 1)/N): the variance of the ln of a mean of N log-normals of variance v."""
    one = _to_output(alone)
    over = _to_output(alone * probes) / np.maximum(one, 1e-300)
    return np.asarray(np.log1p(np.expm1(np.minimum(one, 50.0)) * over))


def _gather(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout, few: float
) -> _Found:
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
    return _Found(np.array(passes.shares), q, alike, each, fresh, settled)


def _renewed(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout
) -> tuple[Array, Array]:
    """`fresh` and `settled`."""
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
    """Neurons of one activation layer."""
    return layout.shape.hidden if unit.kind == "ffn" else layout.shape.width


def _by_probe(unit: TemplateUnit, found: _Found, layout: Layout) -> Array:
    """(4 w (1 - w) + w^2 (2 per matrix + 2 (m4 - 1)))/n, of a single probe."""
    n, w = layout.shape.width, found.share
    matrices = 2 / n + (0.0 if unit.is_single else 2 / _inner(unit, layout))
    slopes = np.zeros_like(w)
    if unit.kind != "attention":
        layers = 2 if unit.kind == "resnet" else 1
        slopes = 2 * layers * slope_noise(unit, found.q, None) / _inner(unit, layout)
    return np.asarray(4 * w * (1 - w) / n + w * w * (matrices + slopes))


def _shared(unit: TemplateUnit, found: _Found, layout: Layout, size: Array | None) -> Array:
    """w^2 Var(phi'^2/E + A phi^2/E)/n, averaged over the rows as far as these differ."""
    if unit.kind == "attention":
        return np.zeros_like(found.q)
    shape, phi = layout.shape, ACTIVATION_MOMENTS[unit.activation]
    alike = found.alike**2 if phi.odd else 2 / np.pi * np.arcsin(np.minimum(found.alike, 1.0))
    alike = alike + (1 - alike) / shape.rows
    noise = slope_noise(unit, found.q, size) / _inner(unit, layout)
    if unit.kind == "ffn" and size is not None:
        noise = noise + size**2 * 2 / shape.width
    return np.asarray(alike * found.share**2 * noise)


def _rescaling(found: _Found, layout: Layout) -> Array:
    """(4 s (1 - s) + 2 s^2)/n c^2: Var ln sigma^2 of a norm after the shortcut, s = `fresh`.

    `corrections` has its bias.
    """
    s, c = found.fresh, found.settled
    return np.asarray((4 * s * (1 - s) + 2 * s * s) / layout.shape.width * c * c)


def _size(unit: TemplateUnit, found: _Found) -> Array | None:
    """A of a plain unit: -1 where a norm divides the stream's size out, row by row."""
    return np.full_like(found.q, -1.0) if set(unit.norms) & set(ROW_NORMS) else None


def _later_slopes(unit: TemplateUnit, found: _Found, layout: Layout) -> tuple[Array, Array, float]:
    """A of a plain net without norms: what a larger output does to ln E phi'^2 of later units.

    A_l = f (e + t A_{l+1}), e and t the derivatives of ln E phi'^2 and ln E phi^2 by ln q at l+1,
    f the share of q there that came through the weights. Also the variance that the size of each
    unit's own output brings to the ratio from there on, and the drift.
    """
    phi, q = ACTIVATION_MOMENTS[unit.activation], found.q
    e, t = (log_slope(f, q) for f in (phi.slope_square, phi.square))
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
    return later, found.alike * later**2 * size, drift
