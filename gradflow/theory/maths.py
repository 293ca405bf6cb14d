"""Elementary functions of a float or an array that are quick on floats.

A NumPy call on a single number costs ten times the arithmetic, and the prediction of a deep stack
is a long chain of such calls.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Number = float | Array

TINY = 1e-300


def sqrt(x: Number) -> Number:
    """Return the square root of x."""
    return math.sqrt(x) if isinstance(x, float) else np.asarray(np.sqrt(x))


def asin(x: Number) -> Number:
    """Return the inverse sine of x, cut off at +-1 against rounding."""
    if isinstance(x, float):
        return math.asin(max(-1.0, min(1.0, x)))
    return np.asarray(np.arcsin(_within_1(x)))


def acos(x: Number) -> Number:
    """Return the inverse cosine of x, cut off at +-1 against rounding."""
    return math.pi / 2 - asin(x)


def atan(x: Number) -> Number:
    """Return the inverse tangent of x."""
    return math.atan(x) if isinstance(x, float) else np.asarray(np.arctan(x))


def cosine(q1: Number, q2: Number, p: Number) -> Number:
    """Return p / sqrt(q1 q2) within +-1; 0 where a variance is 0."""
    if isinstance(p, float):
        length = math.sqrt(q1 * q2)
        return max(-1.0, min(1.0, p / length)) if length else 0.0
    return _within_1(p / np.sqrt(np.maximum(q1 * q2, TINY)))


def least(x: Array) -> float:
    """Return the minimum of x; `np.min` takes four times as long for few numbers."""
    return float(x.item(x.argmin()))


def most(x: Array) -> float:
    """Return the maximum of x; `np.max` takes four times as long for few numbers."""
    return float(x.item(x.argmax()))


def constant(value: float, like: Number) -> Number:
    """Return the value in the shape of `like`."""
    return value if isinstance(like, float) else np.full_like(like, value)


def quadrature_key(x: float) -> float:
    """Return x to eight digits: a key under which nearly equal numbers share one quadrature."""
    return float(f"{x:.8g}")


def _within_1(x: Array) -> Array:
    """Return x cut off at +-1; quicker than `np.clip` on few numbers."""
    return np.minimum(np.maximum(x, -1.0), 1.0)
