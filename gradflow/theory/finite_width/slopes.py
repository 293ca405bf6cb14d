"""How unlike the neurons of one activation are: relative variances of their squared slopes."""

from __future__ import annotations

import numpy as np

from gradflow.theory.maths import Array
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS, Moment
from gradflow.theory.mean_field.norms import CENTRED_NORMS
from gradflow.theory.template import TemplateUnit, WeightMoments

_STEP = 1e-4  # for derivatives by ln q


def slope_noise(unit: TemplateUnit, q: Array, size: Array | None) -> Array:
    """Var(phi'^2/E phi'^2 + A (phi - m)^2/E (phi - m)^2) with A = `size`, m = 0 or the mean."""
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
    """Var(z)/(E z)^2 of z = s_in phi^2 + s_gate (phi' h)^2, h ~ N(0, r) the other factor."""
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


def log_slope(moment: Moment, q: Array) -> Array:
    """d ln moment / d ln q."""
    up, down = (np.log(np.asarray(moment(q * np.exp(h)))) for h in (_STEP, -_STEP))
    return np.asarray((up - down) / (2 * _STEP))
