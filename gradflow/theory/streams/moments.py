"""Moments of several streams together, and of their gradients, step by step through a unit.

A bundle is n streams with all second moments between them: (n, n, 2) for exchangeable tokens, E of
one token and of two, or (n, n, T, T) under a causal mask. A branch's last weights are independent
of all streams and of zero mean, so what it adds is uncorrelated with them, forward and backward;
linear maps A take S to A S A^T, and gradients G to A^T G A. Derived here; limits as in `passes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradflow.theory.maths import Array
from gradflow.theory.mean_field.attention import attend, pull_attend
from gradflow.theory.mean_field.layouts import Layout, Moments, through_weights
from gradflow.theory.mean_field.norms import ROW_NORMS, NormTape, Stream, normalise
from gradflow.theory.mean_field.recursion import UnitTape, unit_backward, unit_forward
from gradflow.theory.template import NoTheoryError, TemplateUnit, WeightMoments


class Bundle(NamedTuple):
    """Several streams.

    Attributes:
        s: second moments between them.
        fixed: of each the part of the mean square that a norm has fixed.
        layout: of the moments of one stream.
    """

    s: Array
    fixed: Array
    layout: Layout

    def of(self, i: int) -> Moments:
        """Moments of stream i."""
        return to_moments(self.s[i, i])

    def square(self, i: int) -> float:
        """Mean square of stream i."""
        return self.layout.mean_square(self.of(i))

    def joined_by(self, f: Moments) -> Bundle:
        """With one more stream, uncorrelated with the others."""
        n = len(self.s)
        s = np.zeros((n + 1, n + 1, *self.s.shape[2:]))
        s[:n, :n] = self.s
        s[n, n] = to_array(f)
        return Bundle(s, np.append(self.fixed, 0.0), self.layout)


def to_array(s: Moments) -> Array:
    """Moments of one stream as they stand in a bundle."""
    return np.array(s) if len(s) == 2 else np.asarray(s[0])


def to_moments(s: Array) -> Moments:
    """Moments of one stream as the branches take them."""
    return (float(s[0]), float(s[1])) if s.ndim == 1 else (s,)


def bundle_of(x: Moments, layout: Layout) -> Bundle:
    """One stream, no norm behind it."""
    return Bundle(to_array(x)[None, None], np.zeros(1), layout)


class Step(Protocol):
    """Part of a unit."""

    def ahead(self, x: Bundle, /) -> tuple[Bundle, Any]:
        """The bundle after it, and what the way back needs."""

    def back(self, tape: Any, g: Array, /) -> Array:
        """Moments of the gradient before it."""


@dataclass(frozen=True)
class Mix:
    """y_a = sum_i A_ai x_i, for each token; `rows` are A."""

    rows: tuple[tuple[float, ...], ...]

    @cached_property
    def _matrix(self) -> Array:
        return np.array(self.rows, dtype=np.float64)

    def ahead(self, x: Bundle, /) -> tuple[Bundle, None]:
        """A S A^T."""
        a = self._matrix
        return Bundle(_around(a, x.s), a**2 @ x.fixed, x.layout), None

    def back(self, _: None, g: Array, /) -> Array:
        """A^T G A."""
        return _around(self._matrix.T, g)


def _around(a: Array, s: Array) -> Array:
    """A S A^T over the first two axes."""
    n, rest = len(a), s.shape[2:]
    one = (a @ s.reshape(len(s), -1)).reshape(n, len(s), *rest).swapaxes(0, 1)
    return (a @ one.reshape(len(s), -1)).reshape(n, n, *rest).swapaxes(0, 1)


class NormBack(NamedTuple):
    """Of a norm: its tape, and what it multiplies each token of its stream by on the way back."""

    norm: NormTape
    factor: Array


@dataclass(frozen=True)
class Norm:
    """Normalises one stream.

    Attributes:
        stream: which.
        kind: of norm.
        count: elements that it averages, where they are not all features.
    """

    stream: int
    kind: str
    count: int | None = None

    def ahead(self, x: Bundle, /) -> tuple[Bundle, NormBack]:
        """1/sigma on the stream's rows and columns."""
        if self.kind not in ROW_NORMS:
            raise NoTheoryError(f"no formula for {self.kind} beyond the template")
        i, layout = self.stream, x.layout
        share = min(float(x.fixed[i]) / x.square(i), 1.0)
        y, tape = normalise(self.kind, Stream(x.of(i)), layout, share)
        assert tape is not None
        gain = tape.gain if self.count is None else 1 + (tape.gain - 1) * tape.number / self.count
        inverse = np.sqrt(np.asarray(layout.diagonal(tape.scale)))
        fixed = x.fixed.copy()
        fixed[i] = layout.mean_square(y.s)
        norm = NormTape(self.kind, tape.scale, gain, tape.number)
        return Bundle(_scaled(x.s, i, inverse), fixed, layout), NormBack(norm, gain**0.5 * inverse)

    def back(self, tape: NormBack, g: Array, /) -> Array:
        """The same, with the gain that finite width brings."""
        return _scaled(g, self.stream, tape.factor)


def _scaled(s: Array, i: int, factor: Array) -> Array:
    """Stream i times a factor for each token."""
    s = s.copy()
    s[i] *= factor[:, None] if factor.ndim else factor
    s[:, i] *= factor
    return s


class BranchBack(NamedTuple):
    """Of a branch: its tape, and the layout."""

    tape: Any
    layout: Layout


@dataclass(frozen=True)
class Branch:
    """Adds f(c Ni(x_i)) as a stream; the unit has no shortcut."""

    stream: int
    unit: TemplateUnit

    def ahead(self, x: Bundle, /) -> tuple[Bundle, BranchBack]:
        """f is uncorrelated with all streams."""
        f, tape = unit_forward(self.unit, Stream(x.of(self.stream)), x.layout)
        return x.joined_by(f.s), BranchBack(tape, x.layout)

    def back(self, tape: BranchBack, g: Array, /) -> Array:
        """J^T g on the gradient of x_i."""
        branch: UnitTape = tape.tape
        pulled = unit_backward(self.unit, branch, to_moments(g[-1, -1]), tape.layout)[0]
        return _given(g, (self.stream, pulled))


def _given(g: Array, *parts: tuple[int, Moments]) -> Array:
    """Without the last stream; the parts on the gradients of others."""
    g = g[:-1, :-1].copy()
    for i, part in parts:
        g[i, i] += to_array(part)
    return g


@dataclass(frozen=True)
class Project:
    """Adds W x_i + b as a stream."""

    stream: int
    weights: WeightMoments

    def ahead(self, x: Bundle, /) -> tuple[Bundle, None]:
        """Uncorrelated with all streams."""
        return x.joined_by(through_weights(self.weights, x.of(self.stream))), None

    def back(self, _: None, g: Array, /) -> Array:
        """W^T g."""
        return _given(g, (self.stream, to_moments(self.weights.scale * g[-1, -1])))


@dataclass(frozen=True)
class Attend:
    """Adds W_out softmax(q k) v as a stream, q and k of x_i, v another stream."""

    stream: int
    values: int
    unit: TemplateUnit

    def ahead(self, x: Bundle, /) -> tuple[Bundle, BranchBack]:
        """Uncorrelated with all streams."""
        tokens = x.layout.shape.tokens
        f, tape = attend(self.unit, x.of(self.stream), x.of(self.values), tokens)
        return x.joined_by(f), BranchBack(tape, x.layout)

    def back(self, tape: BranchBack, g: Array, /) -> Array:
        """Through the logits to x_i, by the mixing to the values."""
        g_last, tokens = to_moments(g[-1, -1]), tape.layout.shape.tokens
        to_input, to_values = pull_attend(self.unit, tape.tape, g_last, tokens)
        return _given(g, (self.stream, to_input), (self.values, to_values))


class Silent:
    """A branch that gives nothing."""

    def ahead(self, x: Bundle, /) -> tuple[Bundle, None]:
        """One more stream, 0."""
        return x.joined_by(to_moments(np.zeros(x.s.shape[2:]))), None

    def back(self, _: Any, g: Array, /) -> Array:
        """Nothing comes through it."""
        return _given(g)


@lru_cache(maxsize=4096)
def without_branches(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps with silent branches in the place of their own."""
    return tuple(step if isinstance(step, Mix | Norm) else Silent() for step in steps)


def go_ahead(steps: Sequence[Step], x: Bundle) -> tuple[Bundle, list[Any]]:
    """Through all of the steps."""
    tapes = []
    for step in steps:
        x, tape = step.ahead(x)
        tapes.append(tape)
    return x, tapes


def go_back(steps: Sequence[Step], tapes: Sequence[Any], g: Array) -> Array:
    """Back through all of them."""
    for step, tape in zip(reversed(steps), reversed(tapes), strict=True):
        g = step.back(tape, g)
    return g
