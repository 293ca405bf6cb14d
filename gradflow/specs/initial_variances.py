"""How large initial weights and biases are: the rules `--init`. Imports no torch.

he: He et al. 2015 (arXiv:1502.01852), variance 2/fan_in before a rectifier, else 1/fan_in.
orthogonal: the same variance, Saxe et al. 2014 (arXiv:1312.6120). xavier: Glorot & Bengio 2010,
2/(fan_in + fan_out). lecun: LeCun et al. 1998, 1/fan_in. torch: its own layers' uniform numbers
between -fan_in^(-1/2) and fan_in^(-1/2), biases too. normal: N(0, 0.02). gpt2: Radford et al. 2019,
as normal, output projections over the square root of the number of residual units.
`--weight-var` and `--bias-var` give variances of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradflow.specs.stack import StackSpec

_RECTIFIERS = ("relu", "gelu", "gelu-tanh", "silu")


@dataclass(frozen=True)
class _Rule:
    """The square of a draw's scale at gain 1: square / fan / residual_units.

    The scale is a standard deviation, or the half-width of a uniform draw. The three numbers stay
    apart so that neither the draws nor the theory round what the other one needs.
    """

    square: float
    fan: int
    residual_units: int = 1


def _rule(spec: StackSpec, fan_in: int, fan_out: int, *, feeds: bool, output: bool) -> _Rule:
    if spec.weight_var is not None:
        return _Rule(spec.weight_var, fan_in)
    if spec.init == "gpt2":
        return _Rule(4e-4, 1, spec.depth * spec.units_per_block if output else 1)
    rectified = feeds and spec.activation in _RECTIFIERS
    he = _Rule(2.0 if rectified else 1.0, fan_in)
    return {
        "he": he,
        "orthogonal": he,
        "xavier": _Rule(2.0, fan_in + fan_out),
        "lecun": _Rule(1.0, fan_in),
        "torch": _Rule(1.0, fan_in),
        "normal": _Rule(4e-4, 1),
    }[str(spec.init)]


def is_uniform(spec: StackSpec) -> bool:
    """Tell whether weights are uniform: torch's own layers draw U(-1, 1) / sqrt(fan_in)."""
    return spec.init == "torch" and spec.weight_var is None


def weight_std(spec: StackSpec, shape: tuple[int, ...], *, feeds: bool, output: bool) -> float:
    """Return the standard deviation of a weight, or its half-width where it is uniform.

    Args:
        spec: `init`, `gain`, `weight_var` and `activation` decide.
        shape: (out, in) or (out, in, height, width).
        feeds: whether its output goes into the activation.
        output: whether it is the last matrix of a branch of two or more.
    """
    rule = _rule(spec, *fans(shape), feeds=feeds, output=output)
    return spec.gain * math.sqrt(rule.square / rule.fan) / math.sqrt(rule.residual_units)


def weight_moment(
    spec: StackSpec, fan_in: int, fan_out: int, *, feeds: bool = False, output: bool = False
) -> float:
    """Return the variance of a weight times fan_in; the arguments are those of `weight_std`."""
    rule = _rule(spec, fan_in, fan_out, feeds=feeds, output=output)
    square = rule.square * (fan_in / rule.fan) / rule.residual_units
    return spec.gain**2 * (square / (3 if is_uniform(spec) else 1))


def bias_std(spec: StackSpec, fan_in: int) -> float | None:
    """Return the scale of a bias draw, as for `weight_std`; None where biases start at 0."""
    if spec.bias_var is not None:
        # U(-1, 1) has variance 1/3.
        return math.sqrt(spec.bias_var * (3 if is_uniform(spec) else 1)) or None
    return 1 / math.sqrt(fan_in) if is_uniform(spec) else None


def bias_variance(spec: StackSpec, fan_in: int) -> float:
    """Return the variance of a bias."""
    if spec.bias_var is not None:
        return spec.bias_var
    return 1 / (3 * fan_in) if is_uniform(spec) else 0.0


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return fan_in and fan_out of a weight (out, in, ...), the positions of a kernel counted."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel
