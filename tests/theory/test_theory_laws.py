"""Measured gradients against closed forms; numbers and sources stand in THEORY.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import measure, network
from torch import Tensor

from gradflow.engine.walk import walk
from gradflow.specs.stack import StackSpec

SEEDS = range(5)


def mlp(**options: Any) -> StackSpec:
    return StackSpec(block="mlp", **{"shortcut": "plain", "norm": "none", **options})


def log_squares(spec: StackSpec) -> np.ndarray:
    """ln |g_l|^2 for l = 0 ... depth, the mean over five seeds."""
    runs = [[row.log10_grad_norm for row in measure(spec, seed)[0]] for seed in SEEDS]
    return 2 * math.log(10) * np.mean(runs, axis=0)


def slope_towards_input(spec: StackSpec) -> float:
    """Least squares through `log_squares`: growth per layer on the way from output to input."""
    profile = log_squares(spec)
    return -float(np.polyfit(np.arange(len(profile)), profile, 1)[0])


@pytest.mark.parametrize("depth", [1, 7, 30])
@pytest.mark.parametrize("init", ["he", "orthogonal", "torch"])
def test_a_deep_linear_net_is_the_product_of_its_matrices(init: str, depth: int) -> None:
    """y_l = y_{l-1} W_l^T and g_{l-1} = g_l W_l: both passes are products of explicit matrices."""
    spec = mlp(
        depth=depth,
        activation="linear",
        width=24,
        batch_size=5,
        init=init,
        dtype="float64",
        bias_var=0.0,
    )
    net = network(spec)
    rows, params = walk(spec, 0, net).records()
    matrices = [block[0].branch.linear.weight.detach() for block in net.blocks]
    for layer, row in enumerate(rows):
        back = product(matrices[layer:][::-1])
        ahead = product(matrices[:layer][::-1])
        g, y = net.loss.v @ back, net.x @ ahead.T
        assert row.grad_norm == pytest.approx(length(g), rel=1e-10)
        assert row.act_rms == pytest.approx(length(y) / math.sqrt(y.numel()), rel=1e-10)
        if layer:
            below = net.x @ product(matrices[: layer - 1][::-1]).T
            want = length(g.T @ below), length(g.sum(0))
            got = [row.grad_norm for row in params if row.layer == layer]
            assert got == pytest.approx(want, rel=1e-10)


def product(matrices: list[Tensor]) -> Tensor:
    """M_1 M_2 ... M_n; of none, the identity."""
    total = torch.eye(24, dtype=torch.float64)
    for matrix in matrices:
        total = total @ matrix
    return total


def length(x: Tensor) -> float:
    return math.sqrt(float((x * x).sum()))


def test_an_orthogonal_linear_net_keeps_every_norm() -> None:
    """Saxe et al. 2014: dynamical isometry, at any depth."""
    spec = mlp(
        depth=500, activation="linear", width=16, batch_size=4, init="orthogonal", dtype="float64"
    )
    rows, _ = measure(spec)
    assert [row.grad_norm for row in rows] == pytest.approx([1.0] * 501, rel=1e-10)
    assert [row.gain for row in rows[1:]] == pytest.approx([1.0] * 500, rel=1e-10)


RELU = {"width": 256, "depth": 50, "batch_size": 16, "activation": "relu"}
TANH = {"width": 256, "depth": 50, "batch_size": 16, "activation": "tanh", "bias_var": 0.05}

# chi = weight_var E phi'^2 multiplies |g|^2 (Poole et al. 2016, Schoenholz et al. 2017).
PLAIN = [
    pytest.param({**RELU, "weight_var": 1.6}, -0.223, 0.02, id="relu-1.6"),
    pytest.param({**RELU, "weight_var": 2.0}, 0.0, 0.02, id="relu-2.0"),
    pytest.param({**RELU, "weight_var": 2.4}, 0.182, 0.02, id="relu-2.4"),
    pytest.param({**TANH, "weight_var": 1.0}, -0.280, 0.03, id="tanh-1.0"),
    pytest.param({**TANH, "weight_var": 2.5}, 0.126, 0.03, id="tanh-2.5"),
]


@pytest.mark.parametrize(("options", "slope", "within"), PLAIN)
def test_a_plain_mlp_has_the_slope_of_mean_field_theory(
    options: dict[str, Any], slope: float, within: float
) -> None:
    assert slope_towards_input(mlp(**options)) == pytest.approx(slope, abs=within)


def test_the_wrong_initialisation_is_told_apart() -> None:
    """Negative control: 2.4 does not pass for 1.6, nor for 2.0."""
    slope = slope_towards_input(mlp(**RELU, weight_var=2.4))
    assert abs(slope - math.log(1.6 / 2)) > 10 * 0.02
    assert abs(slope - math.log(2.0 / 2)) > 5 * 0.02


def batchnorm_growth(**options: Any) -> float:
    """Factor of |g|^2 per layer of a plain ReLU MLP with batchnorm."""
    spec = mlp(norm="post", norm_kind="batchnorm", activation="relu", **options)
    return math.exp(slope_towards_input(spec))


def test_batchnorm_explodes_a_plain_relu_mlp() -> None:
    """pi / (pi - 1) = 1.467 a layer (Yang et al. 2019)."""
    growth = batchnorm_growth(width=256, depth=40, batch_size=64)
    assert growth == pytest.approx(math.pi / (math.pi - 1), abs=0.05)


def test_batchnorm_comes_closer_to_its_law_in_larger_batches() -> None:
    """The law is that of an infinite batch; a batch of B is off by about 3 / B."""
    growth = batchnorm_growth(width=256, depth=20, batch_size=256)
    assert growth == pytest.approx(math.pi / (math.pi - 1), abs=0.025)


def prenorm_error(**options: Any) -> float:
    """Largest distance in decades of |g_l|^2 / |g_L|^2 from (1 + L) / (1 + l)."""
    spec = StackSpec(block="ffn", activation="relu", norm="pre", **options)
    profile = log_squares(spec) / math.log(10)
    layers = np.arange(spec.depth + 1)
    theory = np.log10((1 + spec.depth) / (1 + layers))
    return float(np.abs(profile - profile[-1] - theory).max())


PRENORM = {"width": 256, "depth": 100, "batch_size": 8, "seq_len": 8}


@pytest.mark.slow
def test_a_prenorm_residual_net_grows_as_a_power_law() -> None:
    """(1 + L) / (1 + l): each branch adds variance 1 to the stream and 1/l to the gradient."""
    assert prenorm_error(**PRENORM) < 0.1


@pytest.mark.slow
def test_a_branch_of_another_scale_is_not_this_power_law() -> None:
    """Negative control: at half the weights a branch adds 1/16, and the gradient grows less."""
    assert prenorm_error(**{**PRENORM, "width": 64}, gain=0.5) > 10 * 0.1


def test_a_residual_branch_adds_its_own_gain_squared() -> None:
    """Without a norm |g|^2 multiplies by 1 + v, v = s1 s2 / 2: no cross term (THEORY.md, b)."""
    v = 0.1
    spec = StackSpec(
        block="ffn",
        activation="relu",
        norm="none",
        width=128,
        depth=40,
        batch_size=8,
        seq_len=4,
        weight_var=math.sqrt(2 * v),
    )
    assert slope_towards_input(spec) == pytest.approx(math.log(1 + v), abs=0.01)
