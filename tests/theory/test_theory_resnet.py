"""The residual block of two convolutions: its law, a slow derivation by samples, measurement."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from theory_profiles import profiles, worst

from gradflow.specs.stack import StackSpec
from gradflow.theory import (
    Prediction,
    Stack,
    StreamShape,
    TemplateUnit,
    WeightMoments,
    predict,
    predict_stack,
)

Array = NDArray[np.float64]
HE = WeightMoments(2.0)
BLOCK = TemplateUnit(
    kind="resnet",
    activation="relu",
    w_in=HE,
    w_out=HE,
    norm_in="batchnorm",
    norm_mid="batchnorm",
)


def squared(found: Prediction) -> float:
    """log10 of |g_0|^2 / |g_L|^2."""
    assert found.log10_grad_norm is not None, found.reason
    return 2 * found.log10_grad_norm[0]


@pytest.mark.parametrize("depth", [10, 100])
def test_away_from_the_border_the_gradient_is_a_power_law(depth: int) -> None:
    """prod (1 + r/V_l), V_l = 1 + l/r and r = 1/(1 - 1/pi): an exponent of r^2 = 2.152."""
    endless = StreamShape(domain="vectors", width=2**30, batch=2**30)  # each row its own image
    r = 1 / (1 - 1 / math.pi)
    want = sum(math.log10(1 + r / (1 + layer / r)) for layer in range(depth))
    assert squared(predict_stack(Stack(endless, (BLOCK,) * depth))) == pytest.approx(want, rel=1e-4)


# The slow way: covariances of all rows with all rows, by samples of features.

SIDE, SAMPLES, FEATURES = 4, 3, 1000
ROWS = SAMPLES * SIDE**2


def convolved(k: Array) -> Array:
    """1/9 of the sum of K[a + d, b + d] over the kernel's places d, 0 beyond the border."""
    images = (SAMPLES, SIDE, SIDE)
    padded = np.pad(k.reshape(*images, *images), [(0, 0), (1, 1), (1, 1)] * 2)
    total = np.zeros((*images, *images))
    for i in range(3):
        for j in range(3):
            rows = slice(i, i + SIDE), slice(j, j + SIDE)
            total += padded[:, *rows, :, *rows]
    return total.reshape(ROWS, ROWS) / 9


def normed(k: Array, source: np.random.Generator) -> tuple[Array, Array]:
    """Batchnorm of features drawn from N(0, K), features x rows, and its Jacobians."""
    root = np.linalg.cholesky(k + 1e-9 * np.eye(ROWS))
    h = source.standard_normal((FEATURES, ROWS)) @ root.T
    h = h - h.mean(1, keepdims=True)
    sigma = np.sqrt((h * h).mean(1, keepdims=True))
    y = h / sigma
    flat = np.eye(ROWS) - 1 / ROWS
    return y, (flat - y[:, :, None] * y[:, None, :] / ROWS) / sigma[:, :, None]


def test_the_moments_of_a_stack_are_those_of_sampled_features() -> None:
    """Two blocks on images of 4 x 4, both passes; the last norm's Jacobians are taken whole."""
    source, k, tape = np.random.default_rng(0), np.eye(ROWS), []
    for _ in range(2):
        y, first = normed(k, source)
        hidden = 2 * convolved(np.maximum(y, 0).T @ np.maximum(y, 0) / FEATURES)
        z, second = normed(hidden, source)
        k = k + 2 * convolved(np.maximum(z, 0).T @ np.maximum(z, 0) / FEATURES)
        tape.append((y > 0, first, z > 0, second))
    g = np.eye(ROWS)
    for one, first, two, second in reversed(tape):
        inner = pulled(2 * convolved(g), two, second)
        g = g + pulled(2 * convolved(inner), one, first)
    shape = StreamShape(domain="images", width=2**20, batch=SAMPLES, side=SIDE)
    found = predict_stack(Stack(shape, (BLOCK,) * 2))
    assert squared(found) == pytest.approx(math.log10(np.trace(g) / ROWS), abs=0.02)
    assert found.act_rms[-1] ** 2 == pytest.approx(np.trace(k) / ROWS, rel=0.02)


def pulled(g: Array, slopes: NDArray[np.bool_], jacobians: Array) -> Array:
    """E J^T D G D J over the features."""
    factors = jacobians.transpose(0, 2, 1) * slopes[:, None, :]
    return np.asarray((factors @ g @ factors.transpose(0, 2, 1)).mean(0))


# Measured.

SMALL = {"block": "resnet", "depth": 8, "width": 64, "batch_size": 16, "image_size": 8}
CASES: list[dict[str, Any]] = [
    {"scheme": "he-v2"},
    {"scheme": "he-v2", "activation": "gelu", "image_size": 4, "batch_size": 64},
    {"scheme": "he-v2", "norm_kind": "layernorm"},
    {"norm": "none", "activation": "tanh", "init": "lecun"},
    {"norm": "pre", "norm_kind": "dyt"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_measured_profile_lies_in_the_band(options: dict[str, Any]) -> None:
    spec = StackSpec(**(SMALL | options))
    assert worst(profiles(spec, range(3)), predict(spec)) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("side", "batch"), [(4, 64), (8, 16), (16, 4)])
def test_he_v2_lies_within_the_share_that_the_border_takes(side: int, batch: int) -> None:
    """0.15/side of the profile at depth 32: width 32 and 128 alike."""
    for width in (32, 128):
        spec = StackSpec(scheme="he-v2", depth=32, width=width, batch_size=batch, image_size=side)
        told = predict(replace(spec, width=2**20))
        measured = profiles(spec, range(3))
        error = measured[:, 0].std(ddof=1) / math.sqrt(3)
        apart = abs(measured[:, 0].mean() - squared(told) / 2)
        assert apart < 0.15 / side * squared(told) / 2 + 2 * error


def test_one_convolution_for_two_is_told_apart() -> None:
    """Taking the middle norm out, or the common part of the pixels by their sizes alone."""
    spec = StackSpec(scheme="he-v2", **SMALL)
    measured = profiles(spec, range(3))
    shape = StreamShape(domain="images", width=64, batch=16, side=8)
    without = predict_stack(Stack(shape, (replace(BLOCK, norm_mid=None),) * 8))
    assert worst(measured, predict(spec)) < 1 < worst(measured, without)


@pytest.mark.parametrize("block", ["conv", "resnet"])
def test_an_image_of_one_pixel_sees_one_place_of_the_kernel(block: str) -> None:
    spec = StackSpec(
        block=block, norm="none", activation="tanh", depth=4, width=64, batch_size=64, image_size=1
    )
    assert worst(profiles(spec, range(3)), predict(spec)) < 1
