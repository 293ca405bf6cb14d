"""Pair kernels of the activations: E phi(z1) phi(z2) and E phi'(z1) phi'(z2).

(z1, z2) is normal with variances q1, q2 and covariance p. The second kernel is the derivative of
the first by p (Price's theorem). All are element by element, over numbers or arrays that broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from gradflow.theory.maths import Array, Number, acos, asin, constant, cosine, rounded, sqrt
from gradflow.theory.moments import ACTIVATIONS, Function, Moment

Kernel = Callable[[Number, Number, Number], Number]

_ORDER = 96  # the highest Hermite polynomial kept


@dataclass(frozen=True)
class Pair:
    """The two kernels of an activation: `value` E phi phi, `slope` E phi' phi'."""

    value: Kernel
    slope: Kernel


def _relu_value(q1: Number, q2: Number, p: Number) -> Number:
    """sqrt(q1 q2)/2 k1(c), k1 = (sqrt(1-c^2) + (pi - acos c) c)/pi (Cho & Saul 2009, J_1)."""
    c = cosine(q1, q2, p)
    k1 = (sqrt(1 - c * c) + (math.pi - acos(c)) * c) / math.pi
    return 0.5 * sqrt(q1 * q2) * k1


def _relu_slope(q1: Number, q2: Number, p: Number) -> Number:
    """k0(c)/2, k0 = 1 - acos(c)/pi (Cho & Saul 2009, J_0)."""
    return 0.5 - 0.5 / math.pi * acos(cosine(q1, q2, p))


def _erf_value(q1: Number, q2: Number, p: Number) -> Number:
    """(2/pi) asin(2p / sqrt((1+2q1)(1+2q2))), Williams 1997."""
    return 2 / math.pi * asin(2 * p / sqrt((1 + 2 * q1) * (1 + 2 * q2)))


def _erf_slope(q1: Number, q2: Number, p: Number) -> Number:
    """(4/pi) / sqrt((1+2q1)(1+2q2) - 4p^2): the derivative of the value by p."""
    return 4 / math.pi / sqrt((1 + 2 * q1) * (1 + 2 * q2) - 4 * p * p)


def _gelu_value(q1: Number, q2: Number, p: Number) -> Number:
    """p H + F (q1 q2 + p^2 k), k = 1 - q1/a - q2/b, a = 1 + q1, b = 1 + q2.

    H = E Phi Phi = 1/4 + asin(p/sqrt(ab))/(2 pi), as Phi(z) = P(w < z) makes it an orthant;
    F = 1/(2 pi sqrt(ab - p^2)), the product of the densities. By Stein's lemma, twice, on
    E z1 z2 Phi(z1) Phi(z2). Derived here; Tsuchida et al. 2021 have another form.
    """
    a, b = 1 + q1, 1 + q2
    orthant = 0.25 + asin(p / sqrt(a * b)) / (2 * math.pi)
    density = 0.5 / math.pi / sqrt(a * b - p * p)
    return p * orthant + density * (q1 * q2 + p * p * (1 - q1 / a - q2 / b))


def _gelu_slope(q1: Number, q2: Number, p: Number) -> Number:
    """H + F p (1 + 2k + (q1 q2 + p^2 k)/(ab - p^2)): the derivative of `_gelu_value` by p."""
    a, b = 1 + q1, 1 + q2
    gap = a * b - p * p
    k = 1 - q1 / a - q2 / b
    orthant = 0.25 + asin(p / sqrt(a * b)) / (2 * math.pi)
    return orthant + 0.5 / math.pi / sqrt(gap) * p * (1 + 2 * k + (q1 * q2 + p * p * k) / gap)


@cache
def _hermite() -> tuple[Array, Array]:
    """Nodes z, and h_k(z) times the Gaussian weight of each node; h_k has unit variance.

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
    """a_k(q) = E f(sqrt(q) z) h_k(z), along the last axis."""
    z, weighted = _hermite()
    return np.asarray(f(np.sqrt(q)[..., None] * z) @ weighted.T)


def hermite_kernel(f: Function, square: Moment) -> Kernel:
    """E f(z1) f(z2) = sum_k a_k(q1) a_k(q2) c^k (Mehler), the a_k by quadrature.

    What the kept orders miss of E f^2 is given to the order above, an upper bound for its share.
    Good to 1e-6 for tanh and silu where q (1 - c) is above 0.1 or q is below 5; to 1e-3 beyond.

    Args:
        f: the function.
        square: E f^2 as a function of q, for the rest beyond the kept orders.
    """

    @lru_cache(maxsize=256)
    def series(q: float) -> list[float]:
        return _terms(f, square, q)

    def kernel(q1: Number, q2: Number, p: Number) -> Number:
        if _level(q1, q2):
            q = q1 if isinstance(q1, float) else float(np.mean(q1))
            return _horner(series(rounded(q)), cosine(q1, q2, p))
        a1, a2 = (_coefficients(f, np.asarray(q)) for q in (q1, q2))
        rest = _rest(square(q1), a1) * _rest(square(q2), a2)
        c = np.asarray(cosine(q1, q2, np.asarray(p)))
        total = rest * c
        for k in range(_ORDER, -1, -1):
            total = total * c + a1[..., k] * a2[..., k]
        return total

    return kernel


def _level(q1: Number, q2: Number) -> bool:
    """Whether all variances are equal; a norm makes them so but for its eps."""
    if isinstance(q1, float) and isinstance(q2, float):
        return q1 == q2
    low, high = min(np.min(q1), np.min(q2)), max(np.max(q1), np.max(q2))
    return bool(high - low <= 1e-4 * high)


def _rest(whole: Number, a: Array) -> Array:
    return np.asarray(np.sqrt(np.maximum(whole - (a**2).sum(-1), 0.0)))


def _terms(f: Function, square: Moment, q: float) -> list[float]:
    """Coefficients of c^k where q1 = q2 = q, as far as they count."""
    a = _coefficients(f, np.asarray(q))
    terms = np.append(a**2, _rest(square(q), a) ** 2)
    last = int(np.flatnonzero(terms > 1e-13 * terms.max()).max(initial=0))
    return [float(x) for x in terms[: last + 1]]


def _horner(terms: list[float], c: Number) -> Number:
    total: Number = 0.0 * c
    for term in reversed(terms):
        total = total * c + term
    return total


def _numeric(name: str) -> Pair:
    phi = ACTIVATIONS[name]
    return Pair(hermite_kernel(phi.phi, phi.square), hermite_kernel(phi.slope, phi.slope_square))


PAIRS: dict[str, Pair] = {
    "linear": Pair(lambda q1, q2, p: p, lambda q1, q2, p: constant(1.0, p)),
    "relu": Pair(_relu_value, _relu_slope),
    "erf": Pair(_erf_value, _erf_slope),
    "gelu": Pair(_gelu_value, _gelu_slope),
    "tanh": _numeric("tanh"),
    "silu": _numeric("silu"),
}
