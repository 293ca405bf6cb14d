"""One highway layer in numbers: what the passes of `highway` ask of it, as means over features.

y = t h + (1 - t) x; g is the gradient at y.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np

from gradflow.theory.highway.gate_moments import BranchMoments, GateMoments, gate_pair
from gradflow.theory.maths import Array, Number
from gradflow.theory.mean_field.layouts import Layout, Moments
from gradflow.theory.template import TemplateUnit


class Step(NamedTuple):
    """A unit after its forward pass.

    Attributes:
        unit: it.
        x: E x^k of its input, k to 4.
        q: E x^2 as the pre-activations see it, over the neighbours.
        shares: of the weights in the variance of W x + b, and of W_T x + b.
        gate: moments of t, `branch` of h.
    """

    unit: TemplateUnit
    x: tuple[Number, ...]
    q: Number
    shares: tuple[Number, ...]
    gate: GateMoments
    branch: BranchMoments


def power(step: Step, k: int) -> Number:
    """E y^k."""
    t, h, x = step.gate.means, step.branch.values, step.x
    return sum(comb(k, j) * t[j][k - j] * h[j] * x[k - j] for j in range(k + 1))


def covariance(step: Step, p: Number, hidden: Moments, opened: Moments, layout: Layout) -> Number:
    """E y y' of two rows: E t t' E h h' + E (1-t)(1-t') p + 2 E t (1-t') E h E x."""
    both = gate_pair(step.unit.gate_bias, opened, layout)
    product = layout.activate(step.unit.activation, hidden)[0][1]
    t, mean = step.gate.means[1][0], step.branch.values[1] * step.x[1]
    return both * product + (1 - 2 * t + both) * p + 2 * (t - both) * mean


class Slopes(NamedTuple):
    """Of eta, y's slope by the size of the pre-activations.

    Attributes:
        means: w, E eta (1, y).
        square: E eta^2.
        local: E[(1 - t) eta | x] as coefficients of (1, x).
        along: E eta y q.
    """

    means: Array
    square: float
    local: Array
    along: float


def slopes(step: Step, layout: Layout) -> Slopes:
    """eta q = t u (h - x) w_T + t d w, with w, w_T what the weights make of the pre-activations."""
    t, z, h = step.gate.means, step.gate.firsts, step.branch.values
    d, (m, q) = step.branch.firsts, step.x[1:3]
    first = z[1][1] * (h[1] - m) + t[1][0] * d[0]
    second = z[2][1] * (h[2] - h[1] * m) + z[1][2] * (h[1] * m - q)
    second = second + t[2][0] * d[1] + t[1][1] * d[0] * m
    square = step.gate.second * _apart(step, 0, 0) + t[2][0] * step.branch.second
    square = square + 2 * z[2][1] * (d[1] - m * d[0])
    constant, linear = z[1][2] * h[1] + t[1][1] * d[0], -z[1][2]
    means, local = (
        np.array([layout.mean(each / step.q) for each in pair])
        for pair in ((first, second), (constant, linear))
    )
    return Slopes(means, layout.mean(square / step.q**2), local, layout.mean(second))


def kept(step: Step, layout: Layout) -> Array:
    """N: E[(1 - t)(1, y) | x] = N (1, x)."""
    t, mean = step.gate.means, layout.mean
    cross = mean(t[1][1] * step.branch.values[1])
    return np.array([[mean(t[0][1]), 0.0], [cross, mean(t[0][2])]])


def carried_along(step: Step) -> Number:
    """E (1 - t) x y."""
    t, (m, q) = step.gate.means, step.x[1:3]
    return t[1][1] * step.branch.values[1] * m + t[0][2] * q


# E f, E f y, E f y^2 of a factor f.
Weighted = tuple[Number, Number, Number]


def energy(f: Weighted, own: Number, p: Array) -> Number:
    """E f g^2 with E[g^2 | y] = B + (1, y) P (1, y)."""
    return f[0] * (own + p[0, 0]) + 2 * p[0, 1] * f[1] + p[1, 1] * f[2]


def carried(step: Step) -> Weighted:
    """f = (1 - t)^2."""
    t, h, (m, q) = step.gate.means, step.branch.values, step.x[1:3]
    square = t[2][2] * h[2] + 2 * t[1][3] * h[1] * m + t[0][4] * q
    return t[0][2], t[1][2] * h[1] + t[0][3] * m, square


def weighted(step: Step) -> tuple[tuple[float, Weighted], tuple[float, Weighted]]:
    """f = t^2 d^2 and (h - x)^2 t^2 (1 - t)^2, with the scales of their weights."""
    t, d, (m, q) = step.gate.means, step.branch.squares, step.x[1:3]
    by_branch = (
        t[2][0] * d[0],
        t[3][0] * d[1] + t[2][1] * d[0] * m,
        t[4][0] * d[2] + 2 * t[3][1] * d[1] * m + t[2][2] * d[0] * q,
    )
    by_gate = (
        t[2][2] * _apart(step, 0, 0),
        t[3][2] * _apart(step, 1, 0) + t[2][3] * _apart(step, 0, 1),
        t[4][2] * _apart(step, 2, 0)
        + 2 * t[3][3] * _apart(step, 1, 1)
        + t[2][4] * _apart(step, 0, 2),
    )
    assert step.unit.w_transform is not None
    return (step.unit.w_in.scale, by_branch), (step.unit.w_transform.scale, by_gate)


def _apart(step: Step, i: int, k: int) -> Number:
    """E (h - x)^2 h^i x^k."""
    h, x = step.branch.values, step.x
    return h[2 + i] * x[k] - 2 * h[1 + i] * x[1 + k] + h[i] * x[2 + k]
