"""Moments of several streams together, and of their gradients, through steps of four kinds.

A bundle is n streams with all second moments between them: (n, n, 2) for exchangeable tokens, E of
one token and of two, or (n, n, T, T) under a causal mask. A branch's last weights are independent
of all streams and of zero mean, so what it adds is uncorrelated with them, forward and backward;
linear maps A take S to A S A^T, and gradients G to A^T G A. Derived here; limits as in `passes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradflow.theory.attention_values import attend, pull_attend
from gradflow.theory.layouts import Layout, Moments
from gradflow.theory.maths import Array
from gradflow.theory.norms import ROW_NORMS, NormTape, Stream, normalise
from gradflow.theory.passes import Tape, backward, forward, through
from gradflow.theory.units import NoTheoryError, Unit, Weights


class Bundle(NamedTuple):
    """Second moments between streams, and of each the mean square that a norm has fixed."""

    s: Array
    fixed: Array


def to_array(s: Moments) -> Array:
    """Moments of one stream as they stand in a bundle."""
    return np.array(s) if len(s) == 2 else np.asarray(s[0])


def to_moments(s: Array) -> Moments:
    """Moments of one stream as the branches take them."""
    return (float(s[0]), float(s[1])) if s.ndim == 1 else (s,)


def bundle_of(x: Moments) -> Bundle:
    """One stream, no norm behind it."""
    return Bundle(to_array(x)[None, None], np.zeros(1))


class Step(Protocol):
    """Part of a unit."""

    def ahead(self, x: Bundle, layout: Layout) -> tuple[Bundle, Any]:
        """The bundle after it, and what the way back needs."""

    def back(self, tape: Any, g: Array, layout: Layout, *, branches: bool) -> Array:
        """Moments of the gradient before it; without what came through branches, if not so."""


@dataclass(frozen=True)
class Mix:
    """y_a = sum_i A_ai x_i, for each token."""

    rows: tuple[tuple[float, ...], ...]

    @cached_property
    def matrix(self) -> Array:
        """A."""
        return np.array(self.rows)

    def ahead(self, x: Bundle, layout: Layout) -> tuple[Bundle, None]:
        """A S A^T."""
        return Bundle(between(self.matrix, x.s), self.matrix**2 @ x.fixed), None

    def back(self, tape: None, g: Array, layout: Layout, *, branches: bool) -> Array:
        """A^T G A."""
        return between(self.matrix.T, g)


def between(a: Array, s: Array) -> Array:
    """A S A^T over the first two axes."""
    one = a @ s.reshape(len(s), -1)
    two = one.reshape(len(a), *s.shape[1:]).swapaxes(0, 1)
    both = a @ two.reshape(len(s), -1)
    return both.reshape(len(a), len(a), *s.shape[2:]).swapaxes(0, 1)


@dataclass(frozen=True)
class Norm:
    """Normalises one stream; `count` elements, where they are not all of its features."""

    stream: int
    kind: str
    count: int | None = None

    def ahead(self, x: Bundle, layout: Layout) -> tuple[Bundle, NormTape]:
        """1/sigma on the stream's rows and columns."""
        if self.kind not in ROW_NORMS:
            raise NoTheoryError(f"no formula for {self.kind} beyond the template")
        i = self.stream
        square = layout.mean(layout.diagonal(to_moments(x.s[i, i])))
        share = min(float(x.fixed[i]) / square, 1.0)
        y, tape = normalise(self.kind, Stream(to_moments(x.s[i, i])), layout, share)
        assert tape is not None
        gain = tape.gain if self.count is None else 1 + (tape.gain - 1) * tape.count / self.count
        fixed = x.fixed.copy()
        fixed[i] = layout.mean(layout.diagonal(y.s))
        y_s = _scaled_stream(x.s, i, tape, layout)
        return Bundle(y_s, fixed), NormTape(self.kind, tape.scale, gain, tape.count)

    def back(self, tape: NormTape, g: Array, layout: Layout, *, branches: bool) -> Array:
        """The same, with the gain that finite width brings."""
        return _scaled_stream(g, self.stream, tape, layout, tape.gain**0.5)


def _scaled_stream(s: Array, i: int, tape: NormTape, layout: Layout, factor: float = 1.0) -> Array:
    """Stream i over sigma, token by token, and times the factor."""
    inverse = factor * np.sqrt(layout.diagonal(tape.scale))
    s = s.copy()
    s[i] *= inverse[:, None] if inverse.ndim else inverse
    s[:, i] *= inverse
    return s


def _with_stream(x: Bundle, f: Moments) -> Bundle:
    """With one more stream, uncorrelated with the others."""
    n = len(x.s)
    s = np.zeros((n + 1, n + 1, *x.s.shape[2:]))
    s[:n, :n] = x.s
    s[n, n] = to_array(f)
    return Bundle(s, np.append(x.fixed, 0.0))


def _added(g: Array, i: int, part: Moments | None) -> Array:
    """Without the last stream; the part on the gradient of stream i."""
    g = g[:-1, :-1].copy()
    if part is not None:
        g[i, i] += to_array(part)
    return g


@dataclass(frozen=True)
class Branch:
    """Adds f(c Ni(x_i)) as a stream; the unit has no shortcut."""

    stream: int
    unit: Unit

    def ahead(self, x: Bundle, layout: Layout) -> tuple[Bundle, Tape]:
        """f is uncorrelated with all streams."""
        f, tape = forward(self.unit, Stream(to_moments(x.s[self.stream, self.stream])), layout)
        return _with_stream(x, f.s), tape

    def back(self, tape: Tape, g: Array, layout: Layout, *, branches: bool) -> Array:
        """J^T g on the gradient of x_i."""
        part = backward(self.unit, tape, to_moments(g[-1, -1]), layout)[0] if branches else None
        return _added(g, self.stream, part)


@dataclass(frozen=True)
class Project:
    """Adds W x_i + b as a stream."""

    stream: int
    weights: Weights

    def ahead(self, x: Bundle, layout: Layout) -> tuple[Bundle, None]:
        """Uncorrelated with all streams."""
        return _with_stream(
            x, through(self.weights, to_moments(x.s[self.stream, self.stream]))
        ), None

    def back(self, tape: None, g: Array, layout: Layout, *, branches: bool) -> Array:
        """W^T g."""
        part = to_moments(self.weights.scale * g[-1, -1]) if branches else None
        return _added(g, self.stream, part)


@dataclass(frozen=True)
class Attend:
    """Adds W_out softmax(q k) v as a stream, q and k of x_i, v another stream."""

    stream: int
    values: int
    unit: Unit

    def ahead(self, x: Bundle, layout: Layout) -> tuple[Bundle, Any]:
        """Uncorrelated with all streams."""
        i, v = self.stream, self.values
        tokens = layout.shape.tokens
        f, tape = attend(self.unit, to_moments(x.s[i, i]), to_moments(x.s[v, v]), tokens)
        return _with_stream(x, f), tape

    def back(self, tape: Any, g: Array, layout: Layout, *, branches: bool) -> Array:
        """Through the logits to x_i, by the mixing to the values."""
        own = g[-1, -1]
        g = _added(g, self.stream, None)
        if branches:
            parts = pull_attend(self.unit, tape, to_moments(own), layout.shape.tokens)
            for i, part in zip((self.stream, self.values), parts, strict=True):
                g[i, i] += to_array(part)
        return g


def go_ahead(steps: Sequence[Step], x: Bundle, layout: Layout) -> tuple[Bundle, list[Any]]:
    """Through all of the steps."""
    tapes = []
    for step in steps:
        x, tape = step.ahead(x, layout)
        tapes.append(tape)
    return x, tapes


def go_back(
    steps: Sequence[Step], tapes: Sequence[Any], g: Array, layout: Layout, *, branches: bool = True
) -> Array:
    """Back through all of them."""
    for step, tape in zip(reversed(steps), reversed(tapes), strict=True):
        g = step.back(tape, g, layout, branches=branches)
    return g
