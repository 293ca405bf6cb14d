"""Second moments of a stream: which entries of the covariance between rows are kept apart.

A row is a vector of features: a sample, a token, a pixel. Moments are E x_r x_s per feature,
covariances of gradients likewise. By symmetry few entries differ, and a `Moments` tuple holds one
number (or array) for each class of them:

- `Exchangeable`: (q, p): E x_r^2, and E x_r x_s for two rows of a batch (of a sample, where
  attention mixes tokens). Pixels differ by their distance to the zero padding: then q and p are
  arrays over a quarter of the image, the rest being its mirror image.
- `CausalTokens`: (K,) with K the T x T covariance: tokens differ by their past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from gradflow.theory.maths import Array, Number
from gradflow.theory.mean_field.kernels import PAIRS
from gradflow.theory.mean_field.moment_sums import Moments
from gradflow.theory.mean_field.moments import ACTIVATIONS
from gradflow.theory.template import Shape

_AT_ONCE = 256  # kernels


class Layout(Protocol):
    """The classes of entries of one stream, and the sums that need to know them."""

    @property
    def shape(self) -> Shape:
        """Of the stream."""

    def start(self, square: float) -> Moments:
        """Moments of independent elements of the given mean square."""

    def diagonal(self, s: Moments) -> Number:
        """E x_r^2, for each kind of row."""

    def ends(self, s: Moments) -> tuple[tuple[Number, Number], ...]:
        """For each class of entries (r, s): E x_r^2 and E x_s^2."""

    def outer(self, x: Number) -> Moments:
        """x_r x_s of a number per row."""

    def mean(self, x: Number) -> float:
        """Average of a number per row."""

    def mean_square(self, s: Moments) -> float:
        """Average of the diagonal."""

    def cosine(self, s: Moments) -> float:
        """Average cosine between two rows."""

    def cosines(self, many: Sequence[Moments]) -> Array:
        """`cosine` of each."""

    def batch_mean(self, s: Moments) -> float:
        """E (mean over the batch's rows)^2, per feature."""

    def batch_common(self, s: Moments) -> Moments:
        """What subtracting the batch's mean takes from each class, for each kind of row."""

    def mix_pixels(self, x: Number) -> Number:
        """Average over the 3 x 3 neighbours of each pixel, 0 beyond the border."""

    def mix_common(self, m: Number) -> Number:
        """For rows that share the vector m_r v, what a convolution makes of them.

        Average over r' of E y_r y_r', for weights of variance 1/fan_in and |v|^2 = 1 per feature.
        """

    def activate(self, name: str, s: Moments) -> tuple[Moments, Moments]:
        """E phi phi and E phi' phi', for each class."""


@dataclass(frozen=True)
class Exchangeable:
    """(q, p); see the module."""

    shape: Shape

    @cached_property
    def _shifts(self) -> Array:
        """Steps to the pixel before, to itself and to the one after, along a side: folded."""
        side = self.shape.side
        half = (side + 1) // 2
        steps = np.stack([np.eye(side, k=k) for k in (-1, 0, 1)])
        folded = steps[:, :half, :half].copy()
        mirror = steps[:, :half, half:][:, :, ::-1]
        folded[:, :, : mirror.shape[2]] += mirror
        return folded

    @cached_property
    def _neighbours(self) -> Array:
        """(1/3) tridiagonal over a side of the image, folded onto half of it."""
        return np.asarray(self._shifts.sum(0) / 3)

    @cached_property
    def _seen(self) -> Array:
        """Weights of a line's average over the pixels that each of `_shifts` comes from."""
        each = np.full((3, (self.shape.side + 1) // 2), 2.0)
        if self.shape.side % 2:
            each[:, -1] = 1.0
        each[[0, 2], 0] -= 1.0
        return each / self.shape.side

    @cached_property
    def _share(self) -> Array:
        """Share of the pixels that each pixel of the quarter stands for."""
        side = self.shape.side
        ones = np.full((side + 1) // 2, 2.0)
        if side % 2:
            ones[-1] = 1.0
        return np.outer(ones, ones) / side**2

    def start(self, square: float) -> Moments:
        """(square, 0)."""
        if self.shape.side == 1:
            return square, 0.0
        return np.full_like(self._share, square), np.zeros_like(self._share)

    def diagonal(self, s: Moments) -> Number:
        """q."""
        return s[0]

    def ends(self, s: Moments) -> tuple[tuple[Number, Number], ...]:
        """The same q at both ends, of both classes."""
        return (s[0], s[0]), (s[0], s[0])

    def outer(self, x: Number) -> Moments:
        """x^2 for both classes."""
        return x * x, x * x

    def mean(self, x: Number) -> float:
        """x, or its average over the pixels."""
        return x if isinstance(x, float) else float(np.vdot(x, self._share))

    def mean_square(self, s: Moments) -> float:
        """Average of q."""
        return self.mean(s[0])

    def cosine(self, s: Moments) -> float:
        """p / q."""
        q, p = (self.mean(x) for x in s)
        return p / q if q else 0.0

    def cosines(self, many: Sequence[Moments]) -> Array:
        """`cosine` of each; of images a few hundred at a time, which takes a third of the time."""
        if self.shape.side == 1:
            return np.array([self.cosine(s) for s in many])
        share = self._share.ravel()
        parts = (many[start : start + _AT_ONCE] for start in range(0, len(many), _AT_ONCE))
        found = [np.array(part).reshape(len(part), 2, -1) @ share for part in parts]
        q, p = np.concatenate([np.zeros((0, 2)), *found]).T
        return np.asarray(np.where(q == 0, 0.0, p) / np.where(q == 0, 1.0, q))

    def batch_mean(self, s: Moments) -> float:
        """(q + (R - 1) p) / R over the R rows of the batch."""
        q, p = (self.mean(x) for x in s)
        return p + (q - p) / self.shape.rows

    def batch_common(self, s: Moments) -> Moments:
        """`batch_mean`; of pixels 2 r m - m^2, r = sqrt(p) their share in the mean m of r."""
        if isinstance(s[0], float):
            return (self.batch_mean(s),) * 2
        r = np.sqrt(np.maximum(s[1], 0.0))
        m = self.mean(r)
        return (2 * m * r - m * m,) * 2

    def mix_pixels(self, x: Number) -> Number:
        """A x A, with A the average of three; x itself where there are no pixels."""
        if isinstance(x, float):
            return x / 9 if self.shape.domain == "images" else x  # one pixel, all else is border
        return np.asarray(self._neighbours @ x @ self._neighbours.T)

    def activate(self, name: str, s: Moments) -> tuple[Moments, Moments]:
        """Of one row, and of two; of two pixels by the cosine of the average, which is small."""
        phi, q = ACTIVATIONS[name], self.mean(s[0])
        value, slope = PAIRS[name].both(q, q, self.mean(s[1]))
        squares, slopes = phi.square(s[0]), phi.slope_square(s[0])
        if not isinstance(s[0], float):
            value, slope = (
                each * (pair / moment(q))
                for each, pair, moment in (
                    (squares, value, phi.square),
                    (slopes, slope, phi.slope_square),
                )
            )
        return (squares, value), (slopes, slope)

    def mix_common(self, m: Number) -> Number:
        """1/9 of the sum over the kernel's places d of m_(a+d) and its average over the pixels a.

        The pixels that a place sees lie inside the image; a pixel of the border and one of its
        middle so share fewer places than their sizes suggest.
        """
        if isinstance(m, float):
            return m * m
        means = self._seen @ m @ self._seen.T
        second = (means @ self._shifts.reshape(3, -1)).reshape(self._shifts.shape)
        return np.asarray((self._shifts @ m @ second.transpose(0, 2, 1)).sum(0) / 9)


@dataclass(frozen=True)
class CausalTokens:
    """(K,); see the module."""

    shape: Shape

    def start(self, square: float) -> Moments:
        """square times the identity."""
        return (square * np.eye(self.shape.tokens),)

    def diagonal(self, s: Moments) -> Number:
        """Of K."""
        return np.asarray(s[0]).diagonal()

    def ends(self, s: Moments) -> tuple[tuple[Number, Number], ...]:
        """The diagonal as a column and as a row."""
        q = np.asarray(s[0]).diagonal()
        return ((q[:, None], q[None, :]),)

    def outer(self, x: Number) -> Moments:
        """x_r x_s, T x T."""
        values = np.asarray(x)
        return (values[:, None].dot(values[None]),)  # the quickest product of few numbers

    def mean(self, x: Number) -> float:
        """Over the tokens."""
        return float(np.asarray(x).dot(self._even))

    @cached_property
    def _even(self) -> Array:
        """1/T each; a dot product is the quickest mean of few numbers."""
        return np.full(self.shape.tokens, 1 / self.shape.tokens)

    def mean_square(self, s: Moments) -> float:
        """The trace over T."""
        return float(np.asarray(s[0]).diagonal().dot(self._even))

    def cosine(self, s: Moments) -> float:
        """Off the diagonal, by the average length."""
        return float(self.cosines([s])[0])

    def cosines(self, many: Sequence[Moments]) -> Array:
        """`cosine` of each; a few hundred at a time, one by one takes three times as long."""
        parts = (many[start : start + _AT_ONCE] for start in range(0, len(many), _AT_ONCE))
        found = [self._cosines(np.array([s[0] for s in part])) for part in parts]
        return np.concatenate([np.zeros(0), *found])

    def _cosines(self, k: Array) -> Array:
        n = self.shape.tokens
        own = k.diagonal(axis1=1, axis2=2).dot(self._even)
        everything = k.dot(self._even).dot(self._even)
        return np.asarray((n * everything - own) / max(n - 1, 1) / np.where(own == 0, np.inf, own))

    def batch_mean(self, s: Moments) -> float:
        """Not defined: batchnorm would mix what the mask keeps apart."""
        raise NotImplementedError

    def batch_common(self, s: Moments) -> Moments:
        """Not defined, as `batch_mean`."""
        raise NotImplementedError

    def mix_pixels(self, x: Number) -> Number:
        """Tokens are no pixels."""
        return x

    def mix_common(self, m: Number) -> Number:
        """As `mix_pixels`."""
        raise NotImplementedError

    def activate(self, name: str, s: Moments) -> tuple[Moments, Moments]:
        """Between all tokens."""
        ((q1, q2),) = self.ends(s)
        value, slope = PAIRS[name].both(q1, q2, s[0])
        return (value,), (slope,)
