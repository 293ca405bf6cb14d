"""Moments of a highway layer's parts: the gate t = sigmoid(b + z), u = 1 - t, and h = phi(z).

z is normal; where its biases are random, w is the part of it that the weights make, a share r of
its variance: E[w | z] = r z. Numbers of pixels are arrays over the last axes.
"""

from __future__ import annotations

import math
from functools import cache
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
from gradflow.theory.mean_field.layouts import Layout, Moments

_HIGHEST = 4


class GateMoments(NamedTuple):
    """`means` E t^j u^k at [j, k], `firsts` E t^j u^k w, `second` E t^2 u^2 w^2."""

    means: Array
    firsts: Array
    second: Number


class BranchMoments(NamedTuple):
    """Of h = phi(z) and d = phi'(z).

    Attributes:
        values: E h^k, k to 4.
        squares: E d^2 h^k, k to 2.
        firsts: E d h^k w, k to 1.
        second: E d^2 w^2.
    """

    values: Array
    squares: Array
    firsts: Array
    second: Number


def gate_moments(bias: float, variance: Number, share: Number = 1.0) -> GateMoments:
    """By quadrature.

    Args:
        bias: b.
        variance: of z.
        share: r.
    """
    z, weight = gaussian_nodes(variance)
    t, u = _powers(expit(bias + z)), _powers(expit(-bias - z))
    means, firsts, seconds = (
        np.einsum("j...z,k...z->jk...", t * each, u)
        for each in (weight, weight * z, weight * z * z)
    )
    second = _of_weights(means[2, 2], seconds[2, 2], variance, share)
    return GateMoments(means, share * firsts, second)


def branch_moments(activation: str, variance: Number, share: Number = 1.0) -> BranchMoments:
    """By quadrature; those of a rectifier are exact.

    Args:
        activation: phi.
        variance: of z.
        share: r.
    """
    phi = ACTIVATION_MOMENTS[activation]
    values, squares, firsts, second = _rectified(variance) if phi.kinked else _smooth(phi, variance)
    return BranchMoments(
        values, squares, share * firsts, _of_weights(squares[0], second, variance, share)
    )


def gate_pair(bias: float, s: Moments, layout: Layout) -> Number:
    """E t t' of two rows; of pixels by the cosine of their average."""
    q, p = (layout.mean(entry) for entry in s)
    both = _gate_kernel(bias)(q, q, p)
    if isinstance(s[0], float):
        return both
    square = np.asarray(gaussian_mean(_gate_square(bias), s[0]))
    return square * (both / layout.mean(square))


def _of_weights(plain: Number, second: Number, variance: Number, share: Number) -> Number:
    """E f w^2 = r^2 E f z^2 + r (1 - r) variance E f."""
    return share * share * second + share * (1 - share) * variance * plain


def _powers(x: Array) -> Array:
    """1, x, ... along a new first axis."""
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
    """E max(z, 0)^k = 1, sqrt(v/2 pi), v/2, 2 v sqrt(v/2 pi), 3 v^2/2; d h^k z = h^(k+1)."""
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
