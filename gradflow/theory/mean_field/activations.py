"""Gaussian moments of the activations, and their kernels for two correlated arguments.

For z ~ N(0, q): E phi, E phi^2, E phi'^2. For normal (z1, z2) of variances q1, q2 and covariance p:
E phi(z1) phi(z2) and E phi'(z1) phi'(z2), the derivative of the former by p (Price's theorem).
Closed forms where there are any, else quadrature; every function is element by element over numbers
or arrays that broadcast. A pre-activation of infinite width is a sum of many independent terms, and
therefore normal.

The kernels of gelu, phi(z) = z Phi(z), n the standard normal density. Stein's lemma,
E z1 g = q1 E d_1 g + p E d_2 g, on g = z2 Phi(z1) Phi(z2) gives

    E phi phi = p H + q1 E z2 n(z1) Phi(z2) + p E z2 Phi(z1) n(z2),  H = E Phi(z1) Phi(z2),

and on the two means that are left, with a = 1 + q1, b = 1 + q2 and F = E n(z1) n(z2),

    E z2 n(z1) Phi(z2) = F (q2 - p^2/a),  E z2 Phi(z1) n(z2) = F p/b.

So E phi phi = p H + F m, m = q1 q2 + p^2 k, k = 1/b - q1/a = 1 - q1/a - q2/b. A Gaussian integral
gives F = 1/(2 pi r), r^2 = a b - p^2; Phi(z) = P(w < z) makes H the probability of an orthant,
1/4 + atan(p/r)/(2 pi). With dH/dp = F and dF/dp = F p/r^2 the derivative by p is
E phi' phi' = H + F p (1 + 2 k + m/r^2). E phi^2 and E phi'^2 are the case q1 = q2 = p = q, and
E phi = q E n = q/sqrt(2 pi (1 + q)). Nothing is neglected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from scipy.special import erf, expit, ndtr

from gradflow.theory.maths import (
    TINY,
    Array,
    Number,
    acos,
    asin,
    atan,
    constant,
    cosine,
    quadrature_key,
    sqrt,
)

Function = Callable[[Array], Array]
Moment = Callable[[Number], Number]
Kernel = Callable[[Number, Number, Number], Number]

_REACH = 9.0  # standard deviations: what lies beyond is below 1e-18 of the whole
_HALF_NODES = 48
_STEPS = np.arange(-_HALF_NODES, _HALF_NODES + 1) / _HALF_NODES
_ROOT_2PI = math.sqrt(2 * math.pi)
_ORDER = 96  # the highest Hermite polynomial kept


def gaussian_mean(f: Function, q: Number) -> Number:
    """Return E f(z) for z ~ N(0, q), by the trapezoid rule in s = asinh(z).

    The grid is even near 0 on the scale of f (poles of tanh and sigmoid are O(1) away) and
    logarithmic beyond, so it resolves f where the Gaussian is wide (q >> 1; Gauss-Hermite
    fails there) and the Gaussian where it is narrow (q << 1). For f analytic in
    a strip the error falls exponentially with the nodes: below 1e-11 of the result for q up to
    1e4, 1e-6 at 1e8.

    Args:
        f: the function, array to array of the same shape.
        q: variance, any shape.

    Returns:
        The mean, of q's shape.
    """
    z, weight = gaussian_nodes(q)
    total = (f(z) * weight).sum(-1)
    return float(total) if isinstance(q, float) else np.asarray(total)


def gaussian_nodes(q: Number) -> tuple[Array, Array]:
    """Return the nodes of `gaussian_mean` along a new last axis, and their weights."""
    wide = np.maximum(np.asarray(q, dtype=np.float64), TINY)[..., None]
    end = np.arcsinh(_REACH * np.sqrt(wide))
    s = end * _STEPS
    z = np.sinh(s)
    density = np.exp(-0.5 * z * z / wide) * np.cosh(s)
    return z, density * (end / (np.sqrt(wide) * (_HALF_NODES * _ROOT_2PI)))


@lru_cache(maxsize=4096)
def _gaussian_mean_once(f: Function, q: float) -> float:
    return float(gaussian_mean(f, q))


def _by_quadrature(f: Function) -> Moment:
    """Return E f as a function of q that remembers single q: a pre-norm stack asks for one only."""

    def moment(q: Number) -> Number:
        if isinstance(q, float):
            return _gaussian_mean_once(f, quadrature_key(q))
        return gaussian_mean(f, q)

    return moment


@dataclass(frozen=True)
class ActivationMoments:
    """An activation phi, its derivative, and their Gaussian moments as functions of q.

    Attributes:
        phi: the function.
        slope: its derivative phi'.
        mean: E phi.
        square: E phi^2.
        slope_square: E phi'^2.
        pair: (E phi phi, E phi' phi') as a function of (q1, q2, p).
        odd: whether phi(-z) = -phi(z), so that E phi = 0.
        kinked: whether phi is linear on either side of 0, where its slope jumps.
    """

    phi: Function
    slope: Function
    mean: Moment
    square: Moment
    slope_square: Moment
    pair: Callable[[Number, Number, Number], tuple[Number, Number]]
    odd: bool = False
    kinked: bool = False

    def expect(self, f: Callable[[Array, Array], Array], q: Number) -> Number:
        """Return E f(phi(z), phi'(z)) by quadrature; of a kinked phi both half lines are summed."""
        if not self.kinked:
            return gaussian_mean(lambda z: f(self.phi(z), self.slope(z)), q)
        up = gaussian_mean(lambda z: f(np.abs(z), np.ones_like(z)), q)
        return 0.5 * (up + gaussian_mean(lambda z: f(np.zeros_like(z), np.zeros_like(z)), q))


def _relu_pair(q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
    """Return sqrt(q1 q2)/2 k1(c) and k0(c)/2: Cho & Saul 2009, J_1 and J_0.

    k1 = (sqrt(1-c^2) + (pi - acos c) c)/pi, k0 = 1 - acos(c)/pi.
    """
    c = cosine(q1, q2, p)
    k0 = 1 - acos(c) / math.pi
    return 0.5 * sqrt(q1 * q2) * (sqrt(1 - c * c) / math.pi + k0 * c), 0.5 * k0


def _erf_pair(q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
    """Return (2/pi) asin(2p/r), (4/pi)/sqrt(r^2 - 4p^2), r^2 = (1+2q1)(1+2q2); Williams 1997."""
    square = (1 + 2 * q1) * (1 + 2 * q2)
    return 2 / math.pi * asin(2 * p / sqrt(square)), 4 / math.pi / sqrt(square - 4 * p * p)


def _gelu_slope(z: Array) -> Array:
    return np.asarray(ndtr(z) + z * np.exp(-0.5 * z * z) / _ROOT_2PI)


def _gelu_square(q: Number) -> Number:
    """Return E phi^2 = q/4 + q/(2 pi) [asin(q/(1+q)) + 2q/((1+q) sqrt(1+2q))]."""
    tail = 2 * q / ((1 + q) * sqrt(1 + 2 * q))
    return q / 4 + q / (2 * math.pi) * (asin(q / (1 + q)) + tail)


def _gelu_slope_square(q: Number) -> Number:
    """E phi'^2 = 1/4 + 1/(2 pi) [asin(q/(1+q)) + q (3+5q) / ((1+q) (1+2q)^(3/2))]."""
    tail = q * (3 + 5 * q) / ((1 + q) * (1 + 2 * q) * sqrt(1 + 2 * q))
    return 0.25 + (asin(q / (1 + q)) + tail) / (2 * math.pi)


def _gelu_pair(q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
    """Return p H + F m and H + F p (1 + 2k + m/r^2), derived at the top of the module."""
    a, b = 1 + q1, 1 + q2
    square = p * p
    gap = a * b - square
    root = sqrt(gap)
    ratio = p / root
    k = 1 / a - q2 / b
    inner = (q1 * q2 + square * k) / gap
    angle = 0.5 * math.pi + atan(ratio)
    value, slope = p * angle + inner * root, angle + ratio * (1 + 2 * k + inner)
    return value / (2 * math.pi), slope / (2 * math.pi)


def _silu_slope(z: Array) -> Array:
    s = expit(z)
    return np.asarray(s * (1 + z * (1 - s)))


def _squared(f: Function) -> Function:
    return lambda z: np.asarray(f(z) ** 2)


def _zero(q: Number) -> Number:
    return constant(0.0, q)


@cache
def _hermite() -> tuple[Array, Array]:
    """Return nodes z, and h_k(z) times the Gaussian weight of each node; h_k has variance 1.

    h_{k+1} = (z h_k - sqrt(k) h_{k-1}) / sqrt(k+1), recursed with sqrt(weight) for its range.
    The step of 0.07 is a tenth of the shortest wave of order 96, pi / sqrt(k).
    """
    z = np.linspace(-22.0, 22.0, 641)
    root = np.exp(-0.25 * z * z) / (2 * math.pi) ** 0.25
    rows = [root, z * root]
    for k in range(1, _ORDER):
        rows.append((z * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return z, np.asarray(rows) * root * (z[1] - z[0])


def _coefficients(f: Function, q: Number) -> Array:
    """Return a_k(q) = E f(sqrt(q) z) h_k(z), k along the last axis."""
    z, weighted = _hermite()
    return np.asarray(f(np.sqrt(q)[..., None] * z) @ weighted.T)


def hermite_kernel(f: Function, square: Moment) -> Kernel:
    """Return the kernel E f(z1) f(z2) = sum_k a_k(q1) a_k(q2) c^k (Mehler), a_k by quadrature.

    The part of E f^2 that the kept orders miss is given to the order above them, an upper bound.
    `square` is E f^2 as a function of q.
    Good to 1e-6 for tanh and silu where q (1 - c) is above 0.1 or q is below 5; to 1e-3 beyond.
    """

    @lru_cache(maxsize=256)
    def series(q: float) -> list[float]:
        return _terms(f, square, q)

    def kernel(q1: Number, q2: Number, p: Number) -> Number:
        if _level(q1, q2):
            q = q1 if isinstance(q1, float) else float(np.mean(q1))
            return _horner(series(quadrature_key(q)), cosine(q1, q2, p))
        a1, a2 = (_coefficients(f, np.asarray(q)) for q in (q1, q2))
        rest = _rest(square(q1), a1) * _rest(square(q2), a2)
        c = np.asarray(cosine(q1, q2, np.asarray(p)))
        total = rest * c
        for k in range(_ORDER, -1, -1):
            total = total * c + a1[..., k] * a2[..., k]
        return total

    return kernel


def _level(q1: Number, q2: Number) -> bool:
    """Tell whether all variances are equal; a norm makes them so, its eps apart."""
    if isinstance(q1, float) and isinstance(q2, float):
        return q1 == q2
    low, high = min(np.min(q1), np.min(q2)), max(np.max(q1), np.max(q2))
    return bool(high - low <= 1e-4 * high)


def _rest(whole: Number, a: Array) -> Array:
    return np.asarray(np.sqrt(np.maximum(whole - (a**2).sum(-1), 0.0)))


def _terms(f: Function, square: Moment, q: float) -> list[float]:
    """Return the coefficients of c^k for q1 = q2 = q, up to the last above 1e-13 of the largest."""
    a = _coefficients(f, np.asarray(q))
    terms = np.append(a**2, _rest(square(q), a) ** 2)
    last = int(np.flatnonzero(terms > 1e-13 * terms.max()).max(initial=0))
    return [float(x) for x in terms[: last + 1]]


def _horner(terms: list[float], c: Number) -> Number:
    total: Number = 0.0 * c
    for term in reversed(terms):
        total = total * c + term
    return total


def _numeric(phi: Function, slope: Function, *, odd: bool = False) -> ActivationMoments:
    """Return the moments of a smooth activation by quadrature."""
    mean = _zero if odd else _by_quadrature(phi)
    square, slope_square = (_by_quadrature(_squared(f)) for f in (phi, slope))
    values, slopes = hermite_kernel(phi, square), hermite_kernel(slope, slope_square)

    def pair(q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
        return values(q1, q2, p), slopes(q1, q2, p)

    return ActivationMoments(phi, slope, mean, square, slope_square, pair, odd=odd)


# relu: He et al. 2015. erf: Williams 1997. gelu: the derivation at the top of the module.
ACTIVATION_MOMENTS: dict[str, ActivationMoments] = {
    "linear": ActivationMoments(
        phi=lambda z: z,
        slope=np.ones_like,
        mean=_zero,
        square=lambda q: q,
        slope_square=lambda q: constant(1.0, q),
        pair=lambda q1, q2, p: (p, constant(1.0, p)),
        odd=True,
    ),
    "relu": ActivationMoments(
        phi=lambda z: np.maximum(z, 0.0),
        slope=lambda z: np.where(z > 0, 1.0, 0.0),
        mean=lambda q: sqrt(q / (2 * math.pi)),
        square=lambda q: 0.5 * q,
        slope_square=lambda q: constant(0.5, q),
        pair=_relu_pair,
        kinked=True,
    ),
    "erf": ActivationMoments(
        phi=lambda z: np.asarray(erf(z)),
        slope=lambda z: np.asarray(2 / math.sqrt(math.pi) * np.exp(-z * z)),
        mean=_zero,
        square=lambda q: 2 / math.pi * asin(2 * q / (1 + 2 * q)),
        slope_square=lambda q: 4 / math.pi / sqrt(1 + 4 * q),
        pair=_erf_pair,
        odd=True,
    ),
    "gelu": ActivationMoments(
        phi=lambda z: np.asarray(z * ndtr(z)),
        slope=_gelu_slope,
        mean=lambda q: q / sqrt(2 * math.pi * (1 + q)),
        square=_gelu_square,
        slope_square=_gelu_slope_square,
        pair=_gelu_pair,
    ),
    "tanh": _numeric(np.tanh, lambda z: np.asarray(1 - np.tanh(z) ** 2), odd=True),
    "silu": _numeric(lambda z: np.asarray(z * expit(z)), _silu_slope),
}
