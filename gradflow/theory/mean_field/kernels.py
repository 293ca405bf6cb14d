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

from gradflow.theory.maths import Array, Number, acos, asin, atan, constant, cosine, rounded, sqrt
from gradflow.theory.mean_field.moments import ACTIVATIONS, Function, Moment

Kernel = Callable[[Number, Number, Number], Number]
Kernels = Callable[[Number, Number, Number], tuple[Number, Number]]

_ORDER = 96  # the highest Hermite polynomial kept


@dataclass(frozen=True)
class Pair:
    """The two kernels of an activation.

    Attributes:
        value: E phi phi.
        slope: E phi' phi'.
        together: both at once, where they share most of their work.
    """

    value: Kernel
    slope: Kernel
    together: Kernels | None = None

    def both(self, q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
        """`value` and `slope`."""
        if self.together is not None:
            return self.together(q1, q2, p)
        return self.value(q1, q2, p), self.slope(q1, q2, p)


def _shared(together: Kernels) -> Pair:
    return Pair(lambda *args: together(*args)[0], lambda *args: together(*args)[1], together)


def _relu(q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
    """sqrt(q1 q2)/2 k1(c) and k0(c)/2, Cho & Saul 2009, J_1 and J_0.

    k1 = (sqrt(1-c^2) + (pi - acos c) c)/pi, k0 = 1 - acos(c)/pi.
    """
    c = cosine(q1, q2, p)
    k0 = 1 - acos(c) / math.pi
    return 0.5 * sqrt(q1 * q2) * (sqrt(1 - c * c) / math.pi + k0 * c), 0.5 * k0


def _erf_value(q1: Number, q2: Number, p: Number) -> Number:
    """(2/pi) asin(2p / sqrt((1+2q1)(1+2q2))), Williams 1997."""
    return 2 / math.pi * asin(2 * p / sqrt((1 + 2 * q1) * (1 + 2 * q2)))


def _erf_slope(q1: Number, q2: Number, p: Number) -> Number:
    """(4/pi) / sqrt((1+2q1)(1+2q2) - 4p^2): the derivative of the value by p."""
    return 4 / math.pi / sqrt((1 + 2 * q1) * (1 + 2 * q2) - 4 * p * p)


def _gelu(q1: Number, q2: Number, p: Number) -> tuple[Number, Number]:
    """p H + F m and its derivative by p, H + F p (1 + 2k + m/r^2).

    a = 1 + q1, b = 1 + q2, r^2 = ab - p^2, k = 1 - q1/a - q2/b, m = q1 q2 + p^2 k;
    H = E Phi Phi = 1/4 + atan(p/r)/(2 pi), as Phi(z) = P(w < z) makes it an orthant;
    F = 1/(2 pi r), the product of the densities. By Stein's lemma, twice, on
    E z1 z2 Phi(z1) Phi(z2). Derived here; Tsuchida et al. 2021 have another form.
    """
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
    "relu": _shared(_relu),
    "erf": Pair(_erf_value, _erf_slope),
    "gelu": _shared(_gelu),
    "tanh": _numeric("tanh"),
    "silu": _numeric("silu"),
}
