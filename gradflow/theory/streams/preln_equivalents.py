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
from itertools import pairwise

import numpy as np

from gradflow.theory.maths import Array
from gradflow.theory.mean_field.layouts import Layout, Moments
from gradflow.theory.mean_field.norms import Stream
from gradflow.theory.template import State


def state_levels(state: State, base: Array | Sequence[float]) -> Array:
    """ln of |g|^2 over that at the output, of the state.

    Args:
        state: of a kind above.
        base: the same of Pre-LN.
    """
    levels = np.array(base)
    if state.kind == "attnres":
        return np.asarray(levels + np.log(np.arange(1, len(base) + 1) / len(base)))
    if state.kind == "hyper-connections":
        levels = np.log1p(state.copies * np.expm1(base))
    levels[0] = base[0] + np.log(state.copies)
    return levels


def state_answers(state: State, base: Array) -> Array:
    """The derivative of `state_levels` by those of Pre-LN, row by row: what becomes of their noise.

    Args:
        state: of a kind above.
        base: ln of |g|^2 over that at the output, of Pre-LN.
    """
    answers = np.ones(len(base))
    if state.kind == "hyper-connections":
        answers[1:] = state.copies * np.exp(base[1:] - np.log1p(state.copies * np.expm1(base[1:])))
    return answers


def state_streams(state: State, base: Sequence[Stream], layout: Layout) -> list[Stream]:
    """All streams of each state: their mean square, the mean of their cosines between tokens."""
    if state.kind == "attnres":
        parts = [base[0].s, *(_less(y.s, x.s) for x, y in pairwise(base))]
        return _running(parts, layout)
    if state.kind == "denseformer":
        return _with_earlier(base, state.layer, layout)
    if state.kind == "ngpt":  # whose vectors have length 1
        shrink = 1 / layout.shape.width
        return [Stream(tuple([shrink * entry for entry in x.s])) for x in base]
    return list(base)


def _less(x: Moments, y: Moments) -> Moments:
    return tuple([a - b for a, b in zip(x, y, strict=True)])


class _Sum:
    """Of streams: their squares, and their moments over their squares."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.count, self.square = layout, 0, 0.0
        self.alike: Moments = ()

    def add(self, s: Moments) -> None:
        """One more stream."""
        square = self.layout.mean_square(s)
        one = tuple([entry / square for entry in s]) if square else s
        self.count, self.square = self.count + 1, self.square + square
        before = self.alike or (0.0,) * len(one)
        self.alike = tuple([a + b for a, b in zip(before, one, strict=True)])

    def stream(self, *more: Moments) -> Stream:
        """With the mean square and the mean cosine of these streams, and of some more."""
        whole = _Sum(self.layout)
        whole.count, whole.square, whole.alike = self.count, self.square, self.alike
        for s in more:
            whole.add(s)
        scale = whole.square / whole.count**2
        return Stream(tuple([scale * entry for entry in whole.alike]))


def _running(parts: Sequence[Moments], layout: Layout) -> list[Stream]:
    """The first, the first two, ... of these streams."""
    found, streams = _Sum(layout), []
    for part in parts:
        found.add(part)
        streams.append(found.stream())
    return streams


def _with_earlier(base: Sequence[Stream], layer: int, layout: Layout) -> list[Stream]:
    """(X_0, ..., X_(i-1), h) within layer i, (X_0, ..., X_i, Y_i = X_i) after it."""
    found, streams = _Sum(layout), [base[0]]
    found.add(base[0].s)
    for place, x in enumerate(base[1:], start=1):
        streams.append(found.stream(x.s) if place % layer else found.stream(x.s, x.s))
        if place % layer == 0:
            found.add(x.s)
    return streams
