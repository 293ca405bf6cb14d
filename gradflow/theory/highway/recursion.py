"""Highway layers, y = t h + (1 - t) x: h = phi(W x), t = sigmoid(W_T x + b_T).

Srivastava et al. 2015 (arXiv:1505.00387). Both pre-activations are normal and independent, of
variances s q and s_T q, q = E x^2; x itself is not normal, so its first four moments are carried.

Backward g_x = (1 - t) g + W^T (t phi' g) + W_T^T ((h - x) t (1 - t) g). In the mean

    G' = G (E (1 - t)^2 + s E t^2 E phi'^2 + s_T E (h - x)^2 E t^2 (1 - t)^2),

and at infinite width this is all. But h and t have means, and so has x: the gradient gathers along
x and along the vector of ones. At first 1/n of it lies there; this part shrinks more slowly than
the rest, and outgrows it. With v_j = (1, x_j), for features j and k of one row,

    E g_j g_k = v_j P v_k,  E g_j^2 = B + v_j P v_j,  P' = L P L^T + sources/n,

L = N^T + e w^T, N v = E[(1 - t) (1, y) | x], w = E eta (1, y), e = (0, 1), where eta = 2 dy/dq is
y's slope by the size of both pre-activations. Convolutions average e w^T over neighbours, so P is
held for each mode of that average. Derived here, to first order in 1/n; of a relu net of depth 50
and width 128 it is 4 of 10 decades of |g|^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gradflow.theory.highway.gate_moments import branch_moments, gate_moments
from gradflow.theory.highway.layer import (
    Slopes,
    Step,
    carried,
    carried_along,
    covariance,
    energy,
    kept,
    power,
    slopes,
    weighted,
)
from gradflow.theory.maths import Array, Number
from gradflow.theory.mean_field.branches import BranchTape
from gradflow.theory.mean_field.layouts import Layout, through_weights
from gradflow.theory.mean_field.norms import Stream
from gradflow.theory.mean_field.recursion import MomentPasses, UnitTape, check_range
from gradflow.theory.template import TemplateUnit


class Gradient(NamedTuple):
    """B, and P for each mode: modes x 2 x 2."""

    own: Number
    shared: Array


class Pulled(NamedTuple):
    """One layer of the way back.

    Attributes:
        g: the gradient at its input.
        passed: the mean square of what came through the weights.
        free: ln of the factor on |g|^2 at infinite width.
        growth: d ln E y^2 / d ln E x^2; where it is above 1, unlike rows come further apart.
    """

    g: Gradient
    passed: float
    free: float
    growth: float


def run(units: Sequence[TemplateUnit], square: float, layout: Layout) -> MomentPasses:
    """Forward, then backward, as `passes.run`.

    Args:
        units: first to last, all highway layers.
        square: E x^2 of the input.
        layout: of the moments.

    Raises:
        NoTheoryError: the stream leaves the range of number formats.
    """
    steps, streams = _forward(units, square, layout)
    start = layout.start(1.0)
    modes = neighbour_modes(layout)
    g = Gradient(start[0], np.zeros((len(modes), 2, 2)))
    gradients, levels, shares, pulled, held = [start], [0.0], [], [], [1.0]
    for step in reversed(steps):
        pulled.append(backward(step, g, modes, layout))
        g = pulled[-1].g
        each = np.array([_along(step.x, p, layout) for p in g.shared])
        gathered = float(each.mean())
        size = layout.mean(g.own) + gathered
        levels.append(levels[-1] + math.log(size))
        shares.append(min(pulled[-1].passed / size, 1.0))
        held.append(_one_over_count(each))
        g = Gradient(g.own / size, g.shared / size)
        gradients.append((g.own + gathered / size, 0.0 * g.own))
    return MomentPasses(
        streams,
        [layout.mean_square(x.s) for x in streams],
        gradients[::-1],
        levels[::-1],
        [_tape(step, x, layout) for step, x in zip(steps, streams[:-1], strict=True)],
        shares[::-1],
        _scatter(steps, streams, pulled, (levels, held), layout)[::-1],
        _drift([each.growth for each in reversed(pulled)], layout),
    )


def _scatter(
    steps: Sequence[Step],
    streams: Sequence[Stream],
    pulled: Sequence[Pulled],
    found: tuple[Sequence[float], Sequence[float]],
    layout: Layout,
) -> list[float]:
    """Variance of ln |g|^2 by what is gathered, from the output on.

    r^2 (2/N + the variance of the stream's size), r what |g|^2 has beyond the factors of infinite
    width; each row and mode of `found` gathers the square of one normal number.
    """
    levels, held = (np.array(each) for each in found)
    free = np.cumsum([0.0, *(each.free for each in pulled)])
    pairs = zip(reversed(steps), streams[:0:-1], strict=True)
    sizes = np.cumsum([0.0, *(_size_noise(step, y, layout) for step, y in pairs)])
    beyond = np.maximum(1 - np.exp(free - levels), 0.0)
    variance = beyond**2 * (2 * held / layout.shape.batch + sizes / layout.shape.width)
    return [float(each) for each in variance]


def _drift(growths: Sequence[float], layout: Layout) -> float:
    """How far rows come apart that begin with 2/n of variance in ln E x^2; the factor is fitted."""
    most = float(np.cumprod([1.0, *growths]).max())
    return 4 * (most - 1) ** 2 / layout.shape.width


def _one_over_count(energies: Array) -> float:
    """1 over the number of modes that hold the energy."""
    total = energies.sum()
    return min(float((energies**2).sum() / total**2), 1.0) if total > 0 else 1.0


def _size_noise(step: Step, y: Stream, layout: Layout) -> float:
    """n times the variance of ln E y^2 that a layer adds, as far as all rows share it.

    x g keeps its sum over the features where y scales with x, as with relu, so what is gathered
    along x varies as 1/E x^2: E Var(y^2 | x)/(E y^2)^2.
    """
    t, h, x = step.gate.means, step.branch.values, step.x
    square, linear, constant = t[0][2], 2 * t[1][1] * h[1], t[2][0] * h[2]
    known = square**2 * x[4] + 2 * square * linear * x[3] + constant**2
    known = known + (linear**2 + 2 * square * constant) * x[2] + 2 * linear * constant * x[1]
    relative = layout.mean((power(step, 4) - known) / power(step, 2) ** 2)
    return relative * max(layout.cosine(y.s), 0.0)


def neighbour_modes(layout: Layout) -> Array:
    """Factors of the average over 3 x 3 neighbours, 0 beyond the border, on its own vectors."""
    if layout.shape.domain != "images":
        return np.ones(1)
    place = np.arange(1, layout.shape.side + 1)
    line = (1 + 2 * np.cos(math.pi * place / (layout.shape.side + 1))) / 3
    return np.multiply.outer(line, line).ravel()


def _tape(step: Step, x: Stream, layout: Layout) -> UnitTape:
    hidden = through_weights(step.unit.w_in, tuple([layout.mix_pixels(entry) for entry in x.s]))
    return UnitTape(x.s, None, BranchTape(hidden, ()), None, None)


def _forward(
    units: Sequence[TemplateUnit], square: float, layout: Layout
) -> tuple[list[Step], list[Stream]]:
    q, p = layout.start(square)
    x: tuple[Number, ...] = (q / q, 0.0 * q, q, 0.0 * q, 3 * q * q)
    steps, streams = [], [Stream((q, p))]
    for unit in units:
        seen = layout.mix_pixels(x[2]), layout.mix_pixels(p)
        assert unit.w_transform is not None
        both = unit.w_in, unit.w_transform
        hidden, opened = (through_weights(weights, seen) for weights in both)
        pairs = zip(both, (hidden, opened), strict=True)
        shares = tuple(1 - weights.bias / each[0] for weights, each in pairs)
        branch = branch_moments(unit.activation, hidden[0], shares[0])
        gate = gate_moments(unit.gate_bias, opened[0], shares[1])
        steps.append(Step(unit, x, seen[0], shares, gate, branch))
        p = covariance(steps[-1], p, hidden, opened, layout)
        x = tuple(power(steps[-1], k) for k in range(5))
        check_range(layout.mean(x[2]))
        streams.append(Stream((x[2], p), x[1]))
    return steps, streams


def _along(x: tuple[Number, ...], p: Array, layout: Layout) -> float:
    """E v P v."""
    m, q = layout.mean(x[1]), layout.mean(x[2])
    return float(p[0, 0] + 2 * m * p[0, 1] + q * p[1, 1])


def backward(step: Step, g: Gradient, modes: Array, layout: Layout) -> Pulled:
    """One layer of the way back; formulas at the top."""
    t, p, n = step.gate.means, g.shared.mean(0), layout.shape.width
    parts = [scale * energy(each, g.own, p) for scale, each in weighted(step)]
    back, passed = kept(step, layout), layout.mix_pixels(parts[0] + parts[1])
    leak = energy(carried(step), 0.0 * g.own, p) - _along(step.x, back.T @ p @ back, layout)
    slope, level = slopes(step, layout), layout.mean(g.own)
    fixed = layout.mean((step.shares[0] * parts[0] + step.shares[1] * parts[1]) / step.q)
    ahead = back.T + modes[:, None, None] * np.array([np.zeros(2), slope.means])
    shared = ahead @ g.shared @ ahead.transpose(0, 2, 1)
    local = np.multiply.outer(modes, level * slope.local) / n
    shared[:, :, 1] += local
    shared[:, 1, :] += local
    shared[:, 1, 1] += modes**2 * (level * slope.square - fixed) / n
    own = t[0][2] * g.own + leak + passed
    return Pulled(Gradient(own, shared), layout.mean(passed), *_factors(step, slope, layout))


def _factors(step: Step, slope: Slopes, layout: Layout) -> tuple[float, float]:
    """`free` and `growth` of `Pulled`."""
    mean = layout.mean
    by_branch, by_gate = (scale * each[0] for scale, each in weighted(step))
    free = mean(step.gate.means[0][2] + layout.mix_pixels(by_branch + by_gate))
    scaled = mean(carried_along(step)) + slope.along
    return math.log(free), scaled / mean(power(step, 2))
