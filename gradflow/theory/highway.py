"""Highway layers, y = t h + (1 - t) x with h = phi(W x), t = sigmoid(W_T x + b_T).

Srivastava et al. 2015 (arXiv:1505.00387). At infinite width both pre-activations z, z_T are normal,
of variances s q and s_T q, q = E x^2, and independent of each other and of x, feature by feature.
x is not normal, so E x^k is carried for k to 4. Backward

    g_x = (1 - t) g + W^T (t phi' g) + W_T^T ((h - x) t (1 - t) g),
    G' = G (E (1 - t)^2 + s E t^2 E phi'^2 + s_T E (h - x)^2 E t^2 (1 - t)^2).

That is all at infinite width. But h, t and x have means, so the gradient gathers along x and along
the vector of ones: at first 1/n of it, which shrinks more slowly than the rest and outgrows it (4
of 10 decades of |g|^2 in a relu net of depth 50 and width 128). Derived here to first order in 1/n,
with v_j = (1, x_j) for features j and k of one row:

1. Let E g_j g_k = v_j P v_k for j != k and E g_j^2 = B + v_j P v_j at y, v of y.
2. On |x|^2 = n q, W_ij = x_j w_i/(n q) + a part independent of w = W x, of covariance
   (s/n)(delta_jk - x_j x_k/(n q)); W_T likewise. So g_x = (1 - t) g + x a + r, where
   a = sum_i eta_i g_i/n, eta q = t (1 - t)(h - x) w_T + t phi' w, is y's slope by the size of the
   pre-activations, 2 dy/dq, and r has covariance passed (delta_jk - x_j x_k/(n q)), passed the
   last two terms of G'.
3. With N v = E[(1 - t)(1, y) | x], w = E eta (1, y) and e = (0, 1), the terms in P give
   P' = L P L^T, L = N^T + e w^T. B enters where an index meets itself: B E[(1 - t) eta | x]/n with
   each e, (B E eta^2 - passed/q)/n with e e^T.
4. B' = B E (1 - t)^2 + passed + E (1 - t)^2 (v P v), less its part in P': E (N v) P (N v).

Convolutions average a over 3 x 3 neighbours, so P is held for each mode of that average, and e
carries the mode's factor. Where biases are random, w is a share r of z in the variance, E[w | z]
= r z. The derivation has passed/q in full there too, the code times r: what gathers is too much
by up to a fifth where biases make half of z. Neglected: order 1/n^2, and how the gathered part
changes the moments of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from math import comb
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from gradflow.theory.maths import Array, Number
from gradflow.theory.mean_field.activations import (
    ACTIVATION_MOMENTS,
    ActivationMoments,
    Function,
    Kernel,
    gaussian_mean,
    gaussian_nodes,
    hermite_kernel,
)
from gradflow.theory.mean_field.branches import BranchTape
from gradflow.theory.mean_field.layouts import Layout, Moments, through_weights
from gradflow.theory.mean_field.norms import Stream
from gradflow.theory.mean_field.recursion import MomentPasses, UnitTape, check_range
from gradflow.theory.template import TemplateUnit

_HIGHEST = 4

# Moments of the gate t, u = 1 - t, and of the branch h = phi(z), d = phi'(z). Numbers of pixels are
# arrays over the last axes.


class _GateMoments(NamedTuple):
    """`means` are E t^j u^k at [j, k], `firsts` E t^j u^k w, `second` is E t^2 u^2 w^2."""

    means: Array
    firsts: Array
    second: Number


class _BranchMoments(NamedTuple):
    """`values` are E h^k, `squares` E d^2 h^k, `firsts` E d h^k w, `second` is E d^2 w^2."""

    values: Array
    squares: Array
    firsts: Array
    second: Number


def gate_moments(bias: float, variance: Number, share: Number = 1.0) -> _GateMoments:
    """Return moments of t = sigmoid(bias + z) by quadrature; r is `share`."""
    z, weight = gaussian_nodes(variance)
    t, u = _powers(expit(bias + z)), _powers(expit(-bias - z))
    means, firsts, seconds = (
        np.einsum("j...z,k...z->jk...", t * each, u)
        for each in (weight, weight * z, weight * z * z)
    )
    second = _of_weights(means[2, 2], seconds[2, 2], variance, share)
    return _GateMoments(means, share * firsts, second)


def branch_moments(activation: str, variance: Number, share: Number = 1.0) -> _BranchMoments:
    """Return moments of h = phi(z) by quadrature, of a rectifier exactly; r is `share`."""
    phi = ACTIVATION_MOMENTS[activation]
    values, squares, firsts, second = _rectified(variance) if phi.kinked else _smooth(phi, variance)
    return _BranchMoments(
        values, squares, share * firsts, _of_weights(squares[0], second, variance, share)
    )


def gate_pair(bias: float, s: Moments, layout: Layout) -> Number:
    """Return E t t' of two rows; pixels have the cosine of their average."""
    q, p = (layout.mean(entry) for entry in s)
    both = _gate_kernel(bias)(q, q, p)
    if isinstance(s[0], float):
        return both
    square = np.asarray(gaussian_mean(_gate_square(bias), s[0]))
    return square * (both / layout.mean(square))


def _of_weights(plain: Number, second: Number, variance: Number, share: Number) -> Number:
    """Return E f w^2 = r^2 E f z^2 + r (1 - r) variance E f."""
    return share * share * second + share * (1 - share) * variance * plain


def _powers(x: Array) -> Array:
    """Return 1, x, ..., x^4 along a new first axis."""
    return np.stack([x**k for k in range(_HIGHEST + 1)])


def _smooth(phi: ActivationMoments, variance: Number) -> tuple[Array, Array, Array, Number]:
    z, weight = gaussian_nodes(variance)
    h, d = _powers(phi.phi(z)), phi.slope(z)
    values, squares, firsts = (
        np.einsum("k...z,...z->k...", h[: last + 1], weight * factor)
        for last, factor in ((4, np.ones_like(z)), (2, d * d), (1, d * z))
    )
    return values, squares, firsts, (weight * d * d * z * z).sum(-1)


def _rectified(variance: Number) -> tuple[Array, Array, Array, Number]:
    """Return the moments of max(z, 0), E h^k, in closed form; d h^k z = h^(k+1)."""
    v = np.asarray(variance, dtype=np.float64)
    first = np.sqrt(v / (2 * math.pi))
    h = np.stack([np.ones_like(v), first, v / 2, 2 * v * first, 1.5 * v * v])
    return h, np.stack([0.5 * h[0], h[1], h[2]]), h[1:3], h[2]


def _gate_square(bias: float) -> Function:
    return lambda z: np.asarray(expit(bias + z) ** 2)


@cache
def _gate_kernel(bias: float) -> Kernel:
    def square(q: Number) -> Number:
        return gaussian_mean(_gate_square(bias), q)

    return hermite_kernel(lambda z: np.asarray(expit(bias + z)), square)


# One layer, as means over features; g is the gradient at y.


class HighwayTape(NamedTuple):
    """A unit after its forward pass.

    Attributes:
        unit: the highway layer.
        x: E x^k of its input, k to 4.
        q: E x^2 averaged over the neighbours that the pre-activations see.
        shares: r, the weights' share in the variance of W x + b, and of W_T x + b_T.
        gate: moments of t.
        branch: moments of h.
    """

    unit: TemplateUnit
    x: tuple[Number, ...]
    q: Number
    shares: tuple[Number, ...]
    gate: _GateMoments
    branch: _BranchMoments


def stream_moment(tape: HighwayTape, k: int) -> Number:
    """Return E y^k of the layer's output."""
    t, h, x = tape.gate.means, tape.branch.values, tape.x
    return sum(comb(k, j) * t[j][k - j] * h[j] * x[k - j] for j in range(k + 1))


def _covariance(
    tape: HighwayTape, p: Number, hidden: Moments, opened: Moments, layout: Layout
) -> Number:
    """Return E y y' = E t t' E h h' + E (1-t)(1-t') p + 2 E t (1-t') E h E x of two rows."""
    both = gate_pair(tape.unit.gate_bias, opened, layout)
    product = layout.activate(tape.unit.activation, hidden)[0][1]
    t, mean = tape.gate.means[1][0], tape.branch.values[1] * tape.x[1]
    return both * product + (1 - 2 * t + both) * p + 2 * (t - both) * mean


class _Slopes(NamedTuple):
    """Moments of eta.

    Attributes:
        means: w = E eta (1, y).
        square: E eta^2.
        local: E[(1 - t) eta | x] as coefficients of (1, x).
        along: E eta y q.
    """

    means: Array
    square: float
    local: Array
    along: float


def _slopes(tape: HighwayTape, layout: Layout) -> _Slopes:
    """Return the moments of eta, eta q = t u (h - x) w_T + t d w, u = 1 - t and d = phi'."""
    t, z, h = tape.gate.means, tape.gate.firsts, tape.branch.values
    d, (m, q) = tape.branch.firsts, tape.x[1:3]
    first = z[1][1] * (h[1] - m) + t[1][0] * d[0]
    second = z[2][1] * (h[2] - h[1] * m) + z[1][2] * (h[1] * m - q)
    second = second + t[2][0] * d[1] + t[1][1] * d[0] * m
    square = tape.gate.second * _apart(tape, 0, 0) + t[2][0] * tape.branch.second
    square = square + 2 * z[2][1] * (d[1] - m * d[0])
    constant, linear = z[1][2] * h[1] + t[1][1] * d[0], -z[1][2]
    means, local = (
        np.array([layout.mean(each / tape.q) for each in pair])
        for pair in ((first, second), (constant, linear))
    )
    return _Slopes(means, layout.mean(square / tape.q**2), local, layout.mean(second))


def _kept(tape: HighwayTape, layout: Layout) -> Array:
    """Return N: E[(1 - t)(1, y) | x] = N (1, x)."""
    t, mean = tape.gate.means, layout.mean
    cross = mean(t[1][1] * tape.branch.values[1])
    return np.array([[mean(t[0][1]), 0.0], [cross, mean(t[0][2])]])


def _carried_along(tape: HighwayTape) -> Number:
    """Return E (1 - t) x y."""
    t, (m, q) = tape.gate.means, tape.x[1:3]
    return t[1][1] * tape.branch.values[1] * m + t[0][2] * q


# E f, E f y, E f y^2 of a factor f.
_Weighted = tuple[Number, Number, Number]


def _energy(f: _Weighted, own: Number, p: Array) -> Number:
    """Return E f g^2, with E[g^2 | y] = B + (1, y) P (1, y)."""
    return f[0] * (own + p[0, 0]) + 2 * p[0, 1] * f[1] + p[1, 1] * f[2]


def _carried(tape: HighwayTape) -> _Weighted:
    """Return the moments of the factor f = (1 - t)^2."""
    t, h, (m, q) = tape.gate.means, tape.branch.values, tape.x[1:3]
    square = t[2][2] * h[2] + 2 * t[1][3] * h[1] * m + t[0][4] * q
    return t[0][2], t[1][2] * h[1] + t[0][3] * m, square


def _weighted(tape: HighwayTape) -> tuple[tuple[float, _Weighted], tuple[float, _Weighted]]:
    """Return s, s_T with the moments of f = t^2 d^2 and f = (h - x)^2 t^2 (1 - t)^2."""
    t, d, (m, q) = tape.gate.means, tape.branch.squares, tape.x[1:3]
    by_branch = (
        t[2][0] * d[0],
        t[3][0] * d[1] + t[2][1] * d[0] * m,
        t[4][0] * d[2] + 2 * t[3][1] * d[1] * m + t[2][2] * d[0] * q,
    )
    by_gate = (
        t[2][2] * _apart(tape, 0, 0),
        t[3][2] * _apart(tape, 1, 0) + t[2][3] * _apart(tape, 0, 1),
        t[4][2] * _apart(tape, 2, 0)
        + 2 * t[3][3] * _apart(tape, 1, 1)
        + t[2][4] * _apart(tape, 0, 2),
    )
    assert tape.unit.w_transform is not None
    return (tape.unit.w_in.scale, by_branch), (tape.unit.w_transform.scale, by_gate)


def _apart(tape: HighwayTape, i: int, k: int) -> Number:
    """Return E (h - x)^2 h^i x^k."""
    h, x = tape.branch.values, tape.x
    return h[2 + i] * x[k] - 2 * h[1 + i] * x[1 + k] + h[i] * x[2 + k]


# Both passes.


class Gathered(NamedTuple):
    """`own` is B, `shared` P for each mode: modes x 2 x 2."""

    own: Number
    shared: Array


class _Pulled(NamedTuple):
    """One layer of the way back.

    Attributes:
        g: the gradient at the layer's input.
        passed: mean square of what came through the weights.
        free: ln of the factor on |g|^2 at infinite width.
        growth: d ln E y^2 / d ln E x^2; where it is above 1, unlike rows come further apart.
    """

    g: Gathered
    passed: float
    free: float
    growth: float


def run_highway(units: Sequence[TemplateUnit], square: float, layout: Layout) -> MomentPasses:
    """Run the moments forward, then backward, as `mean_field.recursion.run_units`.

    All units are highway layers; `square` is E x^2 of the input.

    Raises:
        NoTheoryError: the stream leaves the range of float32.
    """
    tapes, streams = _forward(units, square, layout)
    start = layout.start(1.0)
    modes = neighbour_modes(layout)
    g = Gathered(start[0], np.zeros((len(modes), 2, 2)))
    gradients, levels, shares, pulled, held = [start], [0.0], [], [], [1.0]
    for tape in reversed(tapes):
        pulled.append(highway_backward(tape, g, modes, layout))
        g = pulled[-1].g
        each = np.array([_along(tape.x, p, layout) for p in g.shared])
        gathered = float(each.mean())
        size = layout.mean(g.own) + gathered
        levels.append(levels[-1] + math.log(size))
        shares.append(min(pulled[-1].passed / size, 1.0))
        held.append(_one_over_count(each))
        g = Gathered(g.own / size, g.shared / size)
        gradients.append((g.own + gathered / size, 0.0 * g.own))
    free = np.cumsum([0.0, *(each.free for each in pulled)])
    beyond = np.maximum(1 - np.exp(free - levels), 0.0)
    return MomentPasses(
        streams,
        [layout.mean_square(x.s) for x in streams],
        gradients[::-1],
        levels[::-1],
        [_tape(tape, x, layout) for tape, x in zip(tapes, streams[:-1], strict=True)],
        shares[::-1],
        _scatter(tapes, streams, beyond, held, layout)[::-1],
        _drift([each.growth for each in reversed(pulled)], layout),
    )


def _scatter(
    tapes: Sequence[HighwayTape],
    streams: Sequence[Stream],
    beyond: Array,
    held: Sequence[float],
    layout: Layout,
) -> list[float]:
    """Return the variance of ln |g|^2 by the gathered part, from the output back.

    What gathers in a row and a mode is the square of one normal number, of variance 2, times the
    stream's size: c^2 (2/N + Var ln E x^2), c = `beyond` the share of |g|^2 that has gathered, N
    the number of rows and modes that hold it; `held` are 1 over the modes.
    """
    pairs = zip(reversed(tapes), streams[:0:-1], strict=True)
    sizes = np.cumsum([0.0, *(_size_noise(tape, y, layout) for tape, y in pairs)])
    variance = beyond**2 * (2 * np.array(held) / layout.shape.batch + sizes / layout.shape.width)
    return [float(each) for each in variance]


def _drift(growths: Sequence[float], layout: Layout) -> float:
    """Return how far rows come apart that begin with Var ln E x^2 = 2/n; the factor 4 is fitted."""
    most = float(np.cumprod([1.0, *growths]).max())
    return 4 * (most - 1) ** 2 / layout.shape.width


def _one_over_count(energies: Array) -> float:
    """Return 1 over the number of modes that hold the energy."""
    total = energies.sum()
    return min(float((energies**2).sum() / total**2), 1.0) if total > 0 else 1.0


def _size_noise(tape: HighwayTape, y: Stream, layout: Layout) -> float:
    """Return n times the variance of ln E y^2 that a layer adds, as far as all rows share it.

    Where y scales with x, as with relu, the sum of x g over the features is kept, so that the part
    along x varies as 1/E x^2. A layer adds E Var(y^2 | x)/(E y^2)^2.
    """
    t, h, x = tape.gate.means, tape.branch.values, tape.x
    square, linear, constant = t[0][2], 2 * t[1][1] * h[1], t[2][0] * h[2]
    known = square**2 * x[4] + 2 * square * linear * x[3] + constant**2
    known = known + (linear**2 + 2 * square * constant) * x[2] + 2 * linear * constant * x[1]
    relative = layout.mean((stream_moment(tape, 4) - known) / stream_moment(tape, 2) ** 2)
    return relative * max(layout.cosine(y.s), 0.0)


def neighbour_modes(layout: Layout) -> Array:
    """Return the eigenvalues of the average over 3 x 3 neighbours, 0 beyond the border."""
    if layout.shape.domain != "images":
        return np.ones(1)
    place = np.arange(1, layout.shape.side + 1)
    line = (1 + 2 * np.cos(math.pi * place / (layout.shape.side + 1))) / 3
    return np.multiply.outer(line, line).ravel()


def _tape(tape: HighwayTape, x: Stream, layout: Layout) -> UnitTape:
    hidden = through_weights(tape.unit.w_in, tuple([layout.mix_pixels(entry) for entry in x.s]))
    return UnitTape(x.s, None, BranchTape(hidden, ()), None, None)


def _forward(
    units: Sequence[TemplateUnit], square: float, layout: Layout
) -> tuple[list[HighwayTape], list[Stream]]:
    q, p = layout.start(square)
    x: tuple[Number, ...] = (q / q, 0.0 * q, q, 0.0 * q, 3 * q * q)
    tapes, streams = [], [Stream((q, p))]
    for unit in units:
        seen = layout.mix_pixels(x[2]), layout.mix_pixels(p)
        assert unit.w_transform is not None
        both = unit.w_in, unit.w_transform
        hidden, opened = (through_weights(weights, seen) for weights in both)
        pairs = zip(both, (hidden, opened), strict=True)
        shares = tuple(1 - weights.bias / each[0] for weights, each in pairs)
        branch = branch_moments(unit.activation, hidden[0], shares[0])
        gate = gate_moments(unit.gate_bias, opened[0], shares[1])
        tapes.append(HighwayTape(unit, x, seen[0], shares, gate, branch))
        p = _covariance(tapes[-1], p, hidden, opened, layout)
        x = tuple(stream_moment(tapes[-1], k) for k in range(5))
        check_range(layout.mean(x[2]))
        streams.append(Stream((x[2], p), x[1]))
    return tapes, streams


def _along(x: tuple[Number, ...], p: Array, layout: Layout) -> float:
    """Return E v P v over the row's features."""
    m, q = layout.mean(x[1]), layout.mean(x[2])
    return float(p[0, 0] + 2 * m * p[0, 1] + q * p[1, 1])


def highway_backward(tape: HighwayTape, g: Gathered, modes: Array, layout: Layout) -> _Pulled:
    """Return the gradient before one layer, by steps 2 to 4 of the derivation."""
    t, p, n = tape.gate.means, g.shared.mean(0), layout.shape.width
    parts = [scale * _energy(each, g.own, p) for scale, each in _weighted(tape)]
    back, passed = _kept(tape, layout), layout.mix_pixels(parts[0] + parts[1])
    leak = _energy(_carried(tape), 0.0 * g.own, p) - _along(tape.x, back.T @ p @ back, layout)
    slope, level = _slopes(tape, layout), layout.mean(g.own)
    fixed = layout.mean((tape.shares[0] * parts[0] + tape.shares[1] * parts[1]) / tape.q)
    ahead = back.T + modes[:, None, None] * np.array([np.zeros(2), slope.means])
    shared = ahead @ g.shared @ ahead.transpose(0, 2, 1)
    local = np.multiply.outer(modes, level * slope.local) / n
    shared[:, :, 1] += local
    shared[:, 1, :] += local
    shared[:, 1, 1] += modes**2 * (level * slope.square - fixed) / n
    own = t[0][2] * g.own + leak + passed
    return _Pulled(Gathered(own, shared), layout.mean(passed), *_factors(tape, slope, layout))


def _factors(tape: HighwayTape, slope: _Slopes, layout: Layout) -> tuple[float, float]:
    """Return `free` and `growth` of `_Pulled`."""
    mean = layout.mean
    by_branch, by_gate = (scale * each[0] for scale, each in _weighted(tape))
    free = mean(tape.gate.means[0][2] + layout.mix_pixels(by_branch + by_gate))
    scaled = mean(_carried_along(tape)) + slope.along
    return math.log(free), scaled / mean(stream_moment(tape, 2))
