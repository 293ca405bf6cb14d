"""Second moments of a stream: which entries of the covariance between rows are kept apart.

A row is a vector of features: a sample, a token, a pixel. Moments are E x_r x_s per feature;
covariances of gradients have the same form. By symmetry few entries differ, and a `Moments` tuple
holds one number (or array) for each class of equal entries:

- `Exchangeable`: (q, p): E x_r^2, and E x_r x_s for two rows of a batch (of a sample, where
  attention mixes tokens). Pixels differ by their distance to the zero padding: then q and p are
  arrays over a quarter of the image, the rest being its mirror image.
- `CausalTokens`: (K,) with K the T x T covariance: tokens differ by their past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add, mul

import numpy as np

from gradflow.theory.maths import Array, Number
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS
from gradflow.theory.template import StreamShape, WeightMoments

Moments = tuple[Number, ...]  # one number, or array, for each class

_AT_ONCE = 256  # kernels


def through_weights(weights: WeightMoments, x: Moments) -> Moments:
    """Return the moments of W x + b."""
    product = scaled_moments(weights.scale, x)
    return tuple([entry + weights.bias for entry in product]) if weights.bias else product


def scaled_moments(factor: float, x: Moments) -> Moments:
    """Return the factor times x, entry by entry."""
    return x if factor == 1.0 else tuple([factor * entry for entry in x])


def plus_moments(x: Moments, y: Moments) -> Moments:
    """Return x + y, entry by entry."""
    return tuple(map(add, x, y))  # half the time of a comprehension, in a chain of a million


def times_moments(x: Moments, y: Moments) -> Moments:
    """Return x y, entry by entry."""
    return tuple(map(mul, x, y))


@dataclass(frozen=True)
class _Layout:
    """The classes of entries of one stream's moments, and the sums that need to know them.

    Attributes:
        shape: of the stream.
    """

    shape: StreamShape

    def batch_mean(self, s: Moments) -> float:
        """Return E (mean over the batch's rows)^2, per feature."""
        raise NotImplementedError

    def batch_common(self, s: Moments) -> Moments:
        """Return what subtracting the batch's mean takes from each class, for each kind of row."""
        raise NotImplementedError

    def mix_pixels(self, x: Number) -> Number:
        """Return the average over the 3 x 3 neighbours of each pixel, 0 beyond the border."""
        return x

    def mix_common(self, m: Number) -> Number:
        """Return the average over r' of E y_r y_r', y the convolution of x_r = m_r v.

        v is a vector that all rows share, |v|^2 = 1 per feature; weights have variance 1/fan_in.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Exchangeable(_Layout):
    """Rows that are all alike, or pixels: the moments (q, p) of the module's docstring."""

    @cached_property
    def _shifts(self) -> Array:
        """Return the shifts by -1, 0, 1 pixels along a side, folded onto half of it."""
        side = self.shape.side
        half = (side + 1) // 2
        steps = np.stack([np.eye(side, k=k) for k in (-1, 0, 1)])
        folded = steps[:, :half, :half].copy()
        mirror = steps[:, :half, half:][:, :, ::-1]
        folded[:, :, : mirror.shape[2]] += mirror
        return folded

    @cached_property
    def _neighbours(self) -> Array:
        """Return the average over three neighbours of a side, folded onto half of it."""
        return np.asarray(self._shifts.sum(0) / 3)

    @cached_property
    def _seen(self) -> Array:
        """Return the weights of a line's average over the pixels that each of `_shifts` reads."""
        each = np.full((3, (self.shape.side + 1) // 2), 2.0)
        if self.shape.side % 2:
            each[:, -1] = 1.0
        each[[0, 2], 0] -= 1.0
        return each / self.shape.side

    @cached_property
    def _share(self) -> Array:
        """Return the share of the image that each pixel of the quarter stands for."""
        side = self.shape.side
        ones = np.full((side + 1) // 2, 2.0)
        if side % 2:
            ones[-1] = 1.0
        return np.outer(ones, ones) / side**2

    def start(self, square: float) -> Moments:
        """Return (square, 0): the moments of independent elements of the given mean square."""
        if self.shape.side == 1:
            return square, 0.0
        return np.full_like(self._share, square), np.zeros_like(self._share)

    def diagonal(self, s: Moments) -> Number:
        """Return E x_r^2 for each kind of row: q."""
        return s[0]

    def outer(self, x: Number) -> Moments:
        """Return x_r x_s of a number per row: x^2 for both classes."""
        return x * x, x * x

    def mean(self, x: Number) -> float:
        """Return x, or its average over the pixels of an image."""
        return x if isinstance(x, float) else float(np.vdot(x, self._share))

    def mean_square(self, s: Moments) -> float:
        """Return the average of q."""
        return self.mean(s[0])

    def cosine(self, s: Moments) -> float:
        """Return the cosine between two rows: p / q, or 0 where q is 0."""
        q, p = (self.mean(x) for x in s)
        return p / q if q else 0.0

    def cosines(self, many: Sequence[Moments]) -> Array:
        """Return each `cosine`; of images by the hundred, which takes a third of the time."""
        if self.shape.side == 1:
            return np.array([self.cosine(s) for s in many])
        share = self._share.ravel()
        parts = (many[start : start + _AT_ONCE] for start in range(0, len(many), _AT_ONCE))
        found = [np.array(part).reshape(len(part), 2, -1) @ share for part in parts]
        q, p = np.concatenate([np.zeros((0, 2)), *found]).T
        return np.asarray(np.where(q == 0, 0.0, p) / np.where(q == 0, 1.0, q))

    def batch_mean(self, s: Moments) -> float:
        """Return (q + (R - 1) p) / R for the R rows of the batch."""
        q, p = (self.mean(x) for x in s)
        return p + (q - p) / self.shape.rows

    def batch_common(self, s: Moments) -> Moments:
        """Return `batch_mean`; for pixels 2 r m - m^2, r = sqrt(p) and m the average of r."""
        if isinstance(s[0], float):
            return (self.batch_mean(s),) * 2
        r = np.sqrt(np.maximum(s[1], 0.0))
        m = self.mean(r)
        return (2 * m * r - m * m,) * 2

    def mix_pixels(self, x: Number) -> Number:
        """Return A x A, A the average of three pixels of a line; x where there are no pixels."""
        if isinstance(x, float):
            return x / 9 if self.shape.domain == "images" else x  # one pixel, all else is border
        return np.asarray(self._neighbours @ x @ self._neighbours.T)

    def activate(self, name: str, s: Moments) -> tuple[Moments, Moments]:
        """Return E phi phi and E phi' phi', each of one row and of two, s the arguments' moments.

        Two pixels have the cosine of the average.
        """
        phi, q = ACTIVATION_MOMENTS[name], self.mean(s[0])
        value, slope = phi.pair(q, q, self.mean(s[1]))
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
        """Return 1/9 of the sum over the kernel's places d of m_(a+d) mean_a m_(a+d), a the pixels.

        A place of the kernel reads pixels inside the image only, so a pixel of the border and one
        of the middle share fewer places than their sizes suggest.
        """
        if isinstance(m, float):
            return m * m
        means = self._seen @ m @ self._seen.T
        second = (means @ self._shifts.reshape(3, -1)).reshape(self._shifts.shape)
        return np.asarray((self._shifts @ m @ second.transpose(0, 2, 1)).sum(0) / 9)


@dataclass(frozen=True)
class CausalTokens(_Layout):
    """Tokens under a causal mask: the moments (K,) of the module's docstring."""

    def start(self, square: float) -> Moments:
        """Return the identity times the mean square."""
        return (square * np.eye(self.shape.tokens),)

    def diagonal(self, s: Moments) -> Number:
        """Return the diagonal of K."""
        return np.asarray(s[0]).diagonal()

    def outer(self, x: Number) -> Moments:
        """Return the T x T matrix of x_r x_s."""
        values = np.asarray(x)
        return (values[:, None].dot(values[None]),)  # the quickest product of few numbers

    def mean(self, x: Number) -> float:
        """Return the average over the tokens."""
        return float(np.asarray(x).dot(self._even))

    @cached_property
    def _even(self) -> Array:
        """Return T weights of 1/T; a dot product is the quickest mean of few numbers."""
        return np.full(self.shape.tokens, 1 / self.shape.tokens)

    def mean_square(self, s: Moments) -> float:
        """Return the trace of K over T."""
        return float(np.asarray(s[0]).diagonal().dot(self._even))

    def cosine(self, s: Moments) -> float:
        """Return the mean entry of K off the diagonal over the mean entry on it."""
        return float(self.cosines([s])[0])

    def cosines(self, many: Sequence[Moments]) -> Array:
        """Return each `cosine`, a few hundred at a time: one by one takes three times as long."""
        parts = (many[start : start + _AT_ONCE] for start in range(0, len(many), _AT_ONCE))
        found = [self._cosines(np.array([s[0] for s in part])) for part in parts]
        return np.concatenate([np.zeros(0), *found])

    def _cosines(self, k: Array) -> Array:
        n = self.shape.tokens
        own = k.diagonal(axis1=1, axis2=2).dot(self._even)
        everything = k.dot(self._even).dot(self._even)
        return np.asarray((n * everything - own) / max(n - 1, 1) / np.where(own == 0, np.inf, own))

    def activate(self, name: str, s: Moments) -> tuple[Moments, Moments]:
        """Return the T x T kernels between all tokens."""
        q = np.asarray(s[0]).diagonal()
        value, slope = ACTIVATION_MOMENTS[name].pair(q[:, None], q[None, :], s[0])
        return (value,), (slope,)


Layout = Exchangeable | CausalTokens
