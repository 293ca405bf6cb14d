"""Gaussian moments of the activations: E phi, E phi^2, E phi'^2 and their kin, for z ~ N(0, q).

Closed forms where there are any, else quadrature. All functions take q as a number or an array and
are element by element. They assume infinite width: a pre-activation is a sum of many independent
terms, so it is normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import erf, expit, ndtr

from gradflow.theory.maths import TINY, Array, Number, asin, constant, rounded, sqrt

Function = Callable[[Array], Array]
Moment = Callable[[Number], Number]

_REACH = 9.0  # standard deviations: what lies beyond is below 1e-18 of the whole
_HALF_NODES = 48
_STEPS = np.arange(-_HALF_NODES, _HALF_NODES + 1) / _HALF_NODES
_ROOT_2PI = math.sqrt(2 * math.pi)


def gaussian_mean(f: Function, q: Number) -> Number:
    """E f(z) for z ~ N(0, q), by the trapezoid rule in s = asinh(z).

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
    """The nodes of `gaussian_mean`, along a new last axis, and their weights."""
    wide = np.maximum(np.asarray(q, dtype=np.float64), TINY)[..., None]
    end = np.arcsinh(_REACH * np.sqrt(wide))
    s = end * _STEPS
    z = np.sinh(s)
    density = np.exp(-0.5 * z * z / wide) * np.cosh(s)
    return z, density * (end / (np.sqrt(wide) * (_HALF_NODES * _ROOT_2PI)))


@lru_cache(maxsize=4096)
def _gaussian_mean_once(f: Function, q: float) -> float:
    return float(gaussian_mean(f, q))


def by_quadrature(f: Function) -> Moment:
    """E f as a function of q; remembers single q, for a pre-norm stack asks for one only."""

    def moment(q: Number) -> Number:
        return _gaussian_mean_once(f, rounded(q)) if isinstance(q, float) else gaussian_mean(f, q)

    return moment


@dataclass(frozen=True)
class Activation:
    """phi with its derivative and its moments, each a function of q.

    Attributes:
        phi: the function.
        slope: its derivative.
        mean: E phi.
        square: E phi^2.
        slope_square: E phi'^2.
        odd: phi(-z) = -phi(z), so that E phi = 0.
        kinked: linear on either side of 0, where its slope jumps.
    """

    phi: Function
    slope: Function
    mean: Moment
    square: Moment
    slope_square: Moment
    odd: bool = False
    kinked: bool = False

    def expect(self, f: Callable[[Array, Array], Array], q: Number) -> Number:
        """E f(phi(z), phi'(z)) by quadrature; for a kinked phi the half lines are summed."""
        if not self.kinked:
            return gaussian_mean(lambda z: f(self.phi(z), self.slope(z)), q)
        up = gaussian_mean(lambda z: f(np.abs(z), np.ones_like(z)), q)
        return 0.5 * (up + gaussian_mean(lambda z: f(np.zeros_like(z), np.zeros_like(z)), q))


def _relu_slope(z: Array) -> Array:
    return np.where(z > 0, 1.0, 0.0)


def _gelu_slope(z: Array) -> Array:
    return np.asarray(ndtr(z) + z * np.exp(-0.5 * z * z) / _ROOT_2PI)


def _gelu_mean(q: Number) -> Number:
    """q / sqrt(2 pi (1 + q)): E z Phi(z) = q E Phi'(z) by Stein's lemma."""
    return q / sqrt(2 * math.pi * (1 + q))


def _gelu_square(q: Number) -> Number:
    """q/4 + q/(2 pi) [asin(q/(1+q)) + 2q/((1+q) sqrt(1+2q))]."""
    tail = 2 * q / ((1 + q) * sqrt(1 + 2 * q))
    return q / 4 + q / (2 * math.pi) * (asin(q / (1 + q)) + tail)


def _gelu_slope_square(q: Number) -> Number:
    """1/4 + 1/(2 pi) [asin(q/(1+q)) + q (3+5q) / ((1+q) (1+2q)^(3/2))]."""
    tail = q * (3 + 5 * q) / ((1 + q) * (1 + 2 * q) * sqrt(1 + 2 * q))
    return 0.25 + (asin(q / (1 + q)) + tail) / (2 * math.pi)


def _silu(z: Array) -> Array:
    return np.asarray(z * expit(z))


def _silu_slope(z: Array) -> Array:
    s = expit(z)
    return np.asarray(s * (1 + z * (1 - s)))


def _sech2(z: Array) -> Array:
    return np.asarray(1 - np.tanh(z) ** 2)


def _squared(f: Function) -> Function:
    return lambda z: np.asarray(f(z) ** 2)


def _zero(q: Number) -> Number:
    return constant(0.0, q)


# relu: He et al. 2015. erf: Williams 1997. gelu: derived here, by Stein's lemma.
ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(
        phi=lambda z: z,
        slope=np.ones_like,
        mean=_zero,
        square=lambda q: q,
        slope_square=lambda q: constant(1.0, q),
        odd=True,
    ),
    "relu": Activation(
        phi=lambda z: np.maximum(z, 0.0),
        slope=_relu_slope,
        mean=lambda q: sqrt(q / (2 * math.pi)),
        square=lambda q: 0.5 * q,
        slope_square=lambda q: constant(0.5, q),
        kinked=True,
    ),
    "erf": Activation(
        phi=lambda z: np.asarray(erf(z)),
        slope=lambda z: np.asarray(2 / math.sqrt(math.pi) * np.exp(-z * z)),
        mean=_zero,
        square=lambda q: 2 / math.pi * asin(2 * q / (1 + 2 * q)),
        slope_square=lambda q: 4 / math.pi / sqrt(1 + 4 * q),
        odd=True,
    ),
    "gelu": Activation(
        phi=lambda z: np.asarray(z * ndtr(z)),
        slope=_gelu_slope,
        mean=_gelu_mean,
        square=_gelu_square,
        slope_square=_gelu_slope_square,
    ),
    "tanh": Activation(
        phi=np.tanh,
        slope=_sech2,
        mean=_zero,
        square=by_quadrature(_squared(np.tanh)),
        slope_square=by_quadrature(_squared(_sech2)),
        odd=True,
    ),
    "silu": Activation(
        phi=_silu,
        slope=_silu_slope,
        mean=by_quadrature(_silu),
        square=by_quadrature(_squared(_silu)),
        slope_square=by_quadrature(_squared(_silu_slope)),
    ),
}
