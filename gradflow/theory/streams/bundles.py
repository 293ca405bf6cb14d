"""Moments of several streams together, and of their gradients, step by step through a unit.

A bundle is n streams with all second moments between them: S_ij of shape (n, n, 2) for exchangeable
tokens, E of one token and of two, or (n, n, T, T) under a causal mask. Derived here, at infinite
width, with the limits of `mean_field.recursion`:

- y_a = sum_i A_ai x_i takes S to A S A^T; g_x = A^T g_y takes the gradient's moments G to A^T G A.
- A branch ends in weights W that are independent of all streams and of zero mean. So E f x_j = 0
  for all j, and f enters S with its own moments alone. On the way back J^T g = J_h^T W^T g, h the
  last hidden layer, is uncorrelated with every gradient that does not pass W, and adds to the G_ii
  of the stream that was read.
- A norm multiplies the rows and columns of its stream in S by 1/sigma, and in G by its Jacobian.
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
        s: second moments between the streams, S.
        fixed: for each stream, the part of its mean square that a norm has fixed.
        layout: of the moments of one stream.
    """

    s: Array
    fixed: Array
    layout: Layout

    def of(self, i: int) -> Moments:
        """Return the moments of stream i."""
        return to_moments(self.s[i, i])

    def square(self, i: int) -> float:
        """Return the mean square of stream i."""
        return self.layout.mean_square(self.of(i))

    def joined_by(self, f: Moments) -> Bundle:
        """Return the bundle with one more stream, uncorrelated with the others."""
        n = len(self.s)
        s = np.zeros((n + 1, n + 1, *self.s.shape[2:]))
        s[:n, :n] = self.s
        s[n, n] = to_array(f)
        return Bundle(s, np.append(self.fixed, 0.0), self.layout)


def to_array(s: Moments) -> Array:
    """Return the moments of one stream as a bundle holds them."""
    return np.array(s) if len(s) == 2 else np.asarray(s[0])


def to_moments(s: Array) -> Moments:
    """Return the moments of one stream as branches and norms take them."""
    return (float(s[0]), float(s[1])) if s.ndim == 1 else (s,)


def bundle_of(x: Moments, layout: Layout) -> Bundle:
    """Return the bundle of one stream that no norm has fixed."""
    return Bundle(to_array(x)[None, None], np.zeros(1), layout)


class BundleStep(Protocol):
    """One operation on a bundle; a unit is a sequence of them."""

    def ahead(self, x: Bundle, /) -> tuple[Bundle, Any]:
        """Return the bundle after the step, and what the way back needs."""

    def back(self, tape: Any, g: Array, /) -> Array:
        """Return the moments G of the gradient before the step."""


@dataclass(frozen=True)
class MixStep:
    """y_a = sum_i A_ai x_i for each token; `rows` are those of A, one for each stream made."""

    rows: tuple[tuple[float, ...], ...]

    @cached_property
    def _matrix(self) -> Array:
        return np.array(self.rows, dtype=np.float64)

    def ahead(self, x: Bundle, /) -> tuple[Bundle, None]:
        """Return the moments A S A^T."""
        a = self._matrix
        return Bundle(_around(a, x.s), a**2 @ x.fixed, x.layout), None

    def back(self, _: None, g: Array, /) -> Array:
        """Return the gradient's moments A^T G A."""
        return _around(self._matrix.T, g)


def _around(a: Array, s: Array) -> Array:
    """Return A S A^T, the products taken over the first two axes."""
    n, rest = len(a), s.shape[2:]
    one = (a @ s.reshape(len(s), -1)).reshape(n, len(s), *rest).swapaxes(0, 1)
    return (a @ one.reshape(len(s), -1)).reshape(n, n, *rest).swapaxes(0, 1)


class _NormBack(NamedTuple):
    """The tape of a norm, and its factor on each token's gradient of its stream."""

    norm: NormTape
    factor: Array


@dataclass(frozen=True)
class NormStep:
    """Normalises one stream.

    Attributes:
        stream: the number of the stream.
        kind: of norm.
        count: elements that the norm averages; None for all features.
    """

    stream: int
    kind: str
    count: int | None = None

    def ahead(self, x: Bundle, /) -> tuple[Bundle, _NormBack]:
        """Multiply the stream's rows and columns by 1/sigma."""
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
        return Bundle(_scaled(x.s, i, inverse), fixed, layout), _NormBack(norm, gain**0.5 * inverse)

    def back(self, tape: _NormBack, g: Array, /) -> Array:
        """Multiply the stream's rows and columns by 1/sigma and the gain of finite width."""
        return _scaled(g, self.stream, tape.factor)


def _scaled(s: Array, i: int, factor: Array) -> Array:
    """Return s with stream i multiplied by a factor for each token."""
    s = s.copy()
    s[i] *= factor[:, None] if factor.ndim else factor
    s[:, i] *= factor
    return s


class _BranchBack(NamedTuple):
    """The tape of a branch, and the layout of its moments."""

    tape: Any
    layout: Layout


UnitSteps = tuple[BundleStep, ...]


@dataclass(frozen=True)
class BranchStep:
    """Adds f(c Ni(x_i)) as a stream; `unit` has no shortcut."""

    stream: int
    unit: TemplateUnit

    def ahead(self, x: Bundle, /) -> tuple[Bundle, _BranchBack]:
        """Join f as one more stream."""
        f, tape = unit_forward(self.unit, Stream(x.of(self.stream)), x.layout)
        return x.joined_by(f.s), _BranchBack(tape, x.layout)

    def back(self, tape: _BranchBack, g: Array, /) -> Array:
        """Add J^T g to the gradient of x_i."""
        branch: UnitTape = tape.tape
        pulled = unit_backward(self.unit, branch, to_moments(g[-1, -1]), tape.layout)[0]
        return _given(g, (self.stream, pulled))


def _given(g: Array, *parts: tuple[int, Moments]) -> Array:
    """Return g without its last stream, the parts added to the gradients of their streams."""
    g = g[:-1, :-1].copy()
    for i, part in parts:
        g[i, i] += to_array(part)
    return g


@dataclass(frozen=True)
class ProjectStep:
    """Adds W x_i + b as a stream."""

    stream: int
    weights: WeightMoments

    def ahead(self, x: Bundle, /) -> tuple[Bundle, None]:
        """Join the new stream, which is uncorrelated with the others."""
        return x.joined_by(through_weights(self.weights, x.of(self.stream))), None

    def back(self, _: None, g: Array, /) -> Array:
        """Add W^T g to the gradient of x_i."""
        return _given(g, (self.stream, to_moments(self.weights.scale * g[-1, -1])))


@dataclass(frozen=True)
class AttendStep:
    """Adds W_out softmax(q k) v as a stream, q and k of x_i, v another stream."""

    stream: int
    values: int
    unit: TemplateUnit

    def ahead(self, x: Bundle, /) -> tuple[Bundle, _BranchBack]:
        """Join the new stream, which is uncorrelated with the others."""
        tokens = x.layout.shape.tokens
        f, tape = attend(self.unit, x.of(self.stream), x.of(self.values), tokens)
        return x.joined_by(f), _BranchBack(tape, x.layout)

    def back(self, tape: _BranchBack, g: Array, /) -> Array:
        """Add what comes through the logits to x_i, what comes by the mixing to the values."""
        g_last, tokens = to_moments(g[-1, -1]), tape.layout.shape.tokens
        to_input, to_values = pull_attend(self.unit, tape.tape, g_last, tokens)
        return _given(g, (self.stream, to_input), (self.values, to_values))


class SilentStep:
    """Adds a stream of zeros, in the place of a branch."""

    def ahead(self, x: Bundle, /) -> tuple[Bundle, None]:
        """Join a stream of zeros."""
        return x.joined_by(to_moments(np.zeros(x.s.shape[2:]))), None

    def back(self, _: Any, g: Array, /) -> Array:
        """Drop the gradient of the stream of zeros."""
        return _given(g)


@lru_cache(maxsize=4096)
def without_branches(steps: tuple[BundleStep, ...]) -> tuple[BundleStep, ...]:
    """Return the steps with a `SilentStep` in the place of each branch."""
    return tuple(step if isinstance(step, MixStep | NormStep) else SilentStep() for step in steps)


def go_ahead(steps: Sequence[BundleStep], x: Bundle) -> tuple[Bundle, list[Any]]:
    """Return the bundle after all steps, and the tape of each."""
    tapes = []
    for step in steps:
        x, tape = step.ahead(x)
        tapes.append(tape)
    return x, tapes


def go_back(steps: Sequence[BundleStep], tapes: Sequence[Any], g: Array) -> Array:
    """Return the moments of the gradient before all steps, given those after them."""
    for step, tape in zip(reversed(steps), reversed(tapes), strict=True):
        g = step.back(tape, g)
    return g
