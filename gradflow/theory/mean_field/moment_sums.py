"""Second moments of a stream by class of entries (see `layouts`), and sums of them."""

from __future__ import annotations

from operator import add, mul

from gradflow.theory.maths import Number
from gradflow.theory.template import Weights

# One number, or array, for each class.
Moments = tuple[Number, ...]


def through(weights: Weights, x: Moments) -> Moments:
    """Moments of W x + b."""
    product = scaled(weights.scale, x)
    return tuple([entry + weights.bias for entry in product]) if weights.bias else product


def scaled(factor: float, x: Moments) -> Moments:
    """The factor times x."""
    return x if factor == 1.0 else tuple([factor * entry for entry in x])


def plus(x: Moments, y: Moments) -> Moments:
    """x + y."""
    return tuple(map(add, x, y))  # half the time of a comprehension, in a chain of a million


def times(x: Moments, y: Moments) -> Moments:
    """x y, entry by entry."""
    return tuple(map(mul, x, y))
