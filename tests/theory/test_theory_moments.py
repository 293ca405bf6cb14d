"""Gaussian moments and pair kernels: quadrature of torch's own functions, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray

from gradflow.networks.blocks import PHI
from gradflow.theory.describe import ALIKE
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS, gaussian_mean
from gradflow.theory.mean_field.attention import excess, excess_array, scatter

Array = NDArray[np.float64]
NAMES = sorted(ACTIVATION_MOMENTS)
SMOOTH = sorted(set(NAMES) - {"relu"})
VARIANCES = (1e-4, 0.3, 1.0, 2.0, 30.0, 1e4)
PAIRS_OF_VARIANCES = ((0.3, 0.3), (2.0, 2.0), (1.5, 4.0))
COSINES = (-0.9, -0.2, 0.0, 0.4, 0.95)


def phi_and_slope(name: str, z: Array) -> tuple[Array, Array]:
    """What a measurement uses: torch's function, and its derivative by autograd."""
    x = torch.from_numpy(z).requires_grad_()
    y = PHI[name](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach().numpy(), slope.numpy()


@cache
def normal_grid() -> tuple[Array, Array]:
    """200,001 points over 12 standard deviations, and the weight of each."""
    t = np.linspace(-12.0, 12.0, 200_001)
    return t, np.exp(-0.5 * t * t) / math.sqrt(2 * math.pi) * (t[1] - t[0])


def test_every_activation_of_a_spec_has_moments_and_kernels() -> None:
    assert set(ACTIVATION_MOMENTS) == set(PHI) - set(ALIKE)
    assert set(ALIKE.values()) <= set(ACTIVATION_MOMENTS)


@pytest.mark.parametrize(("name", "other"), ALIKE.items())
def test_activations_that_theory_takes_for_each_other_are_alike(name: str, other: str) -> None:
    z = np.linspace(-12.0, 12.0, 20_001)
    assert 0 < abs(phi_and_slope(name, z)[0] - phi_and_slope(other, z)[0]).max() < 5e-4


@pytest.mark.parametrize("q", VARIANCES)
@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_torchs_function(name: str, q: float) -> None:
    t, weight = normal_grid()
    phi, slope = phi_and_slope(name, math.sqrt(q) * t)
    known = ACTIVATION_MOMENTS[name]
    assert known.mean(q) == pytest.approx(weight @ phi, rel=1e-7, abs=1e-12)
    assert known.square(q) == pytest.approx(weight @ phi**2, rel=1e-7)
    # At relu's corner the grid counts half a cell, 6e-5 standard deviations.
    assert known.slope_square(q) == pytest.approx(weight @ slope**2, rel=1e-4)
    assert known.odd == (abs(phi + phi[::-1]).max() < 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_arrays_are_those_of_numbers(name: str) -> None:
    known = ACTIVATION_MOMENTS[name]
    for moment in (known.mean, known.square, known.slope_square):
        got = np.asarray(moment(np.array(VARIANCES)))
        assert got == pytest.approx([moment(q) for q in VARIANCES], rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("q", [1e2, 1e4, 1e6])
def test_narrow_integrands_are_resolved(q: float) -> None:
    """E sech^4 -> (4/3)/sqrt(2 pi q), its next order being smaller by 1/q."""
    asymptote = 4 / 3 / math.sqrt(2 * math.pi * q)
    assert ACTIVATION_MOMENTS["tanh"].slope_square(q) == pytest.approx(asymptote, rel=1 / q)


def test_gauss_hermite_would_not_resolve_them() -> None:
    """Negative control: 64 nodes of the usual rule are off by a third."""
    z, weight = hermegauss(64)
    rule = weight @ (1 - np.tanh(1e2 * z) ** 2) ** 2 / weight.sum()
    true = 4 / 3 / math.sqrt(2 * math.pi * 1e4)
    assert abs(rule / true - 1) > 0.3


def test_the_quadrature_takes_any_function() -> None:
    """E cos(z) = e^(-q/2), E z^4 = 3 q^2."""
    assert gaussian_mean(np.cos, 1.7) == pytest.approx(math.exp(-0.85), rel=1e-10)
    assert gaussian_mean(lambda z: z**4, 2.5) == pytest.approx(3 * 2.5**2, rel=1e-10)


@cache
def plane() -> tuple[Array, Array, Array]:
    """Two independent standard normals, and the weight of each point."""
    t = np.linspace(-9.0, 9.0, 401)
    density = np.exp(-0.5 * t * t) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    return t[:, None], t[None, :], np.outer(density, density)


def by_plane(name: str, q: tuple[float, float], c: float) -> tuple[float, float]:
    """E phi phi and E phi' phi' by quadrature in two dimensions."""
    z, w, weight = plane()
    first = phi_and_slope(name, math.sqrt(q[0]) * z)
    second = phi_and_slope(name, math.sqrt(q[1]) * (c * z + math.sqrt(1 - c * c) * w))
    value, slope = (float((weight * (a * b)).sum()) for a, b in zip(first, second, strict=True))
    return value, slope


@pytest.mark.parametrize("q", PAIRS_OF_VARIANCES)
@pytest.mark.parametrize("name", SMOOTH)
def test_pair_kernels_are_those_of_torchs_function(name: str, q: tuple[float, float]) -> None:
    for c in COSINES:
        value, slope = by_plane(name, q, c)
        p = c * math.sqrt(q[0] * q[1])
        assert ACTIVATION_MOMENTS[name].pair(*q, p)[0] == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert ACTIVATION_MOMENTS[name].pair(*q, p)[1] == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_the_quadrant_of_relu_is_that_of_sheppard() -> None:
    """P(z1 > 0, z2 > 0) = 1/4 + asin(c)/(2 pi), Sheppard 1899; 1.5 q at c = 1, 0 at c = -1."""
    for c in COSINES:
        quadrant = 0.25 + math.asin(c) / (2 * math.pi)
        assert ACTIVATION_MOMENTS["relu"].pair(2.0, 3.0, c * math.sqrt(6.0))[1] == pytest.approx(
            quadrant
        )
    assert ACTIVATION_MOMENTS["relu"].pair(3.0, 3.0, 3.0)[0] == pytest.approx(1.5)
    assert ACTIVATION_MOMENTS["relu"].pair(3.0, 3.0, -3.0)[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_kernel_is_the_derivative_of_the_value(name: str) -> None:
    """Price's theorem, by central differences."""
    q1, q2, step = 1.3, 2.1, 1e-4
    for c in COSINES:
        p = c * math.sqrt(q1 * q2)
        up, down = (ACTIVATION_MOMENTS[name].pair(q1, q2, p + side)[0] for side in (step, -step))
        assert ACTIVATION_MOMENTS[name].pair(q1, q2, p)[1] == pytest.approx(
            (up - down) / (2 * step), rel=1e-5
        )


@pytest.mark.parametrize("name", NAMES)
def test_kernels_of_matrices_are_those_of_their_entries(name: str) -> None:
    q = np.array([0.5, 1.0, 2.0])
    p = np.array([[0.5, 0.3, -0.2], [0.3, 1.0, 0.8], [-0.2, 0.8, 2.0]])
    pair = ACTIVATION_MOMENTS[name].pair
    for kernel in (0, 1):
        got = pair(q[:, None], q[None, :], p)[kernel]
        want = [
            [pair(float(q[i]), float(q[j]), float(p[i, j]))[kernel] for j in range(3)]
            for i in range(3)
        ]
        off = ~np.eye(3, dtype=bool)
        assert np.asarray(got)[off] == pytest.approx(np.asarray(want)[off], rel=1e-6)
        assert np.diagonal(got) == pytest.approx(np.diagonal(want), rel=1e-3)


# Kedia et al. 2024, s^2 = 1.5.
COMPONENTS: list[tuple[Callable[[], object], float]] = [
    (lambda: ACTIVATION_MOMENTS["relu"].mean(1.5), 0.489),
    (
        lambda: ACTIVATION_MOMENTS["relu"].square(1.5) - ACTIVATION_MOMENTS["relu"].mean(1.5) ** 2,
        0.511,
    ),
    (lambda: ACTIVATION_MOMENTS["gelu"].mean(1.5), 0.379),
    (
        lambda: ACTIVATION_MOMENTS["gelu"].square(1.5) - ACTIVATION_MOMENTS["gelu"].mean(1.5) ** 2,
        0.529,
    ),
    (lambda: ACTIVATION_MOMENTS["gelu"].slope_square(1.5), 0.478),
    # E phi' phi' r_g / E phi'^2 at r = 0.3, r_g = 0.25.
    (lambda: ACTIVATION_MOMENTS["relu"].pair(1.5, 1.5, 0.45)[1] / 0.5 * 0.25, 0.149),
]


@pytest.mark.parametrize(("moment", "published"), COMPONENTS)
def test_component_moments_are_the_published_ones(
    moment: Callable[[], object], published: float
) -> None:
    assert moment() == pytest.approx(published, abs=6e-4)


# Softmax.


def sampled_squares(g: float, tokens: int) -> Array:
    """T sum_s A_s^2 of many rows of independent logits."""
    logits = math.sqrt(g) * np.random.default_rng(1).standard_normal((40_000, tokens))
    weights = np.exp(logits)
    weights /= weights.sum(1, keepdims=True)
    return np.asarray(tokens * (weights**2).sum(1))


@pytest.mark.parametrize("tokens", [2, 8, 64])
@pytest.mark.parametrize("g", [0.1, 1.0, 2.0])
def test_the_excess_of_softmax_is_that_of_samples(g: float, tokens: int) -> None:
    """At T = 64 and g = 0.64 it is 0.822 by samples, 0.897 by e^g - 1."""
    squares = sampled_squares(g, tokens)
    error = squares.std() / math.sqrt(len(squares))
    assert excess(g, tokens) == pytest.approx(squares.mean() - 1, abs=4 * error)
    assert excess_array(np.array([g]), np.array([tokens]))[0] == pytest.approx(excess(g, tokens))


def test_the_excess_tends_to_that_of_infinitely_many_tokens() -> None:
    assert excess(0.1, 100_000) == pytest.approx(math.expm1(0.1), rel=1e-3)
    assert excess(0.0, 64) == pytest.approx(0.0, abs=1e-9)
    assert excess(1.0, 1) == pytest.approx(0.0, abs=1e-6)


def test_anticorrelated_queries_look_elsewhere() -> None:
    """E sum_s A_ts A_t's for two queries whose logits have cosine c = -1: samples."""
    logits = np.random.default_rng(1).standard_normal((40_000, 64)) * math.sqrt(0.5)
    one, other = np.exp(logits), np.exp(-logits)
    product = one / one.sum(1, keepdims=True) * (other / other.sum(1, keepdims=True))
    sampled = 64 * product.sum(1).mean() - 1
    assert excess(-0.5, 64) == pytest.approx(sampled, abs=0.02)


@pytest.mark.parametrize("g", [0.01, 1.0])
def test_the_scatter_of_softmax_is_that_of_samples(g: float) -> None:
    """sum_s (A_s - 1/T)^2 = (T sum A^2 - 1)/T; for small g a chi square of T - 1: 2/(T - 1)."""
    off = sampled_squares(g, 8) - 1
    assert scatter(g, 8) == pytest.approx(off.var() / off.mean() ** 2, rel=0.1)
    assert scatter(1e-6, 8) == pytest.approx(2 / 7, rel=0.1)
