"""Schemes whose streams are Pre-LN's at initialisation: the gradient they carry, by Pre-LN's.

x_u is Pre-LN's stream after unit u, the input and all branches' outputs so far, g_u its gradient,
R_u = |g_u|^2/|g_D|^2, D the last unit. A branch of these schemes reads a multiple of x_(u-1)
through a norm, so it gives what Pre-LN's gives; g_(u-1) - g_u, which comes through it, is
uncorrelated with g_u at infinite width. So |gradient of all streams|^2 over that at the output is

- `denseformer`: the last stream alone is read on, at weight 1: R_u.
- `attnres`: h = x_u/(u + 1) is the mean of u + 1 streams. Later units see these through their sum
  alone, so each has the gradient of x_u: R_u (u + 1)/(D + 1).
- `mhc`: n equal streams, read and mixed by equal or doubly stochastic weights, so that each has
  g_u/n: R_u. The input, of which they are copies, has the sum g_0: n R_0.
- `hyper-connections`: n equal streams that do not mix; their sum is the output, so each has g_D at
  the end. Unit m writes to all, whose gradients sum to n g_m, and reads one, which gets
  n (g_(m-1) - g_m): [n + n^2 (R_u - 1)]/n. The copied input has the sum n g_0: n R_0.

Exact at infinite width, the norms' eps apart. The streams of `schemes.streams` are the oracle
(tests/theory/test_theory_streams.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from operator import sub

import numpy as np

from gradflow.theory.maths import Array
from gradflow.theory.mean_field.layouts import Layout, Moments, plus_moments, scaled_moments
from gradflow.theory.mean_field.norms import Stream
from gradflow.theory.template import State


def attnres_levels(base: Array, _: State) -> Array:
    """Return ln of |g|^2 over that at the output, from that of Pre-LN: R_u (u + 1)/(D + 1)."""
    return np.asarray(base + np.log(np.arange(1, len(base) + 1) / len(base)))


def mhc_levels(base: Array, state: State) -> Array:
    """Return ln of |g|^2 over that at the output, from that of Pre-LN: R_u, and n R_0."""
    return np.append(base[0] + np.log(state.copies), base[1:])


def hyper_levels(base: Array, state: State) -> Array:
    """Return ln of |g|^2 over that at the output, from Pre-LN's: 1 + n (R_u - 1), and n R_0."""
    rows = np.log1p(state.copies * np.expm1(base[1:]))
    return np.append(base[0] + np.log(state.copies), rows)


def hyper_answers(base: Array, state: State) -> Array:
    """Return the derivative of `hyper_levels` by `base`, row by row: what becomes of its noise."""
    n, rest = state.copies, base[1:]
    return np.append(1.0, n * np.exp(rest - np.log1p(n * np.expm1(rest))))


def attnres_streams(base: Sequence[Stream], _: State, layout: Layout) -> list[Stream]:
    """Return the streams (v_0, ..., v_u) together, after every unit u, from Pre-LN's stream."""
    found, streams = _StreamSum(layout), []
    for part in (base[0].s, *(tuple(map(sub, y.s, x.s)) for x, y in pairwise(base))):
        found.add(part)
        streams.append(found.stream())
    return streams


def denseformer_streams(base: Sequence[Stream], state: State, layout: Layout) -> list[Stream]:
    """Return (X_0, ..., X_(i-1), h) together in layer i, (X_0, ..., X_i, Y_i = X_i) after it."""
    found, streams = _StreamSum(layout), [base[0]]
    found.add(base[0].s)
    for place, x in enumerate(base[1:], start=1):
        if place % state.layer:
            streams.append(found.stream(x.s))
        else:
            streams.append(found.stream(x.s, x.s))
            found.add(x.s)
    return streams


class _StreamSum:
    """Sums over streams: of their mean squares, and of their moments over their mean squares."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.count, self.square = layout, 0, 0.0
        self.alike: Moments = ()

    def add(self, s: Moments) -> None:
        """Add one more stream of moments s."""
        square = self.layout.mean_square(s)
        one = tuple([entry / square for entry in s]) if square else s
        self.count, self.square = self.count + 1, self.square + square
        self.alike = plus_moments(self.alike, one) if self.alike else one

    def stream(self, *more: Moments) -> Stream:
        """Return the mean square and the mean cosine of these streams and of some more."""
        whole = copy(self)
        for s in more:
            whole.add(s)
        return Stream(scaled_moments(whole.square / whole.count**2, whole.alike))
