"""What a norm does to the moments of a stream, and its Jacobian to those of a gradient.

y = (x - mean)/sigma over n elements; J^T g = (g - mean g - y (y.g)/n)/sigma. At n to infinity the
Jacobian is 1/sigma. `norm_gain` has the first order in 1/n of |J^T g|^2, derived here; orders 1/n^2
are neglected:

- The Jacobian takes the gradient's part along y, 1/n of |g|^2, and with a mean one more 1/n, which
  the mean's 1/n in sigma^2 balances. With r = n Var(sigma^2)/(E sigma^2)^2, E 1/sigma^2 exceeds
  1/E sigma^2 by r/n. Normal x has r = 2: the gain is 1 + (2 - 1)/n.
- Norm after a shortcut, u = x + f, |x|^2 = (1 - s) n fixed by the norm before and E |f|^2 = s n:
  sigma^2 varies by 2 x.f/n and |f|^2/n, so r = 4 s (1 - s) + 2 s^2 = 2 s (2 - s). The gradient that
  comes through the shortcut was made orthogonal to u, which leaves it s/n along x in place of 1/n;
  the branch's part, whose share in |g|^2 is taken for s, has 1/n. The Jacobian of the norm before
  takes (1 - s) s + s = s (2 - s), and the gain is 1 + s (2 - s)/n = 1 + (1 - (1 - s)^2)/n.
- x = phi(z), z normal, and the gradient goes on through phi': of
  E phi'^2 (1 - 1/n - y^2/n)/sigma^2, sigma^2 adds its variance (kappa - 1)/n,
  kappa = E x^4/(E x^2)^2, and its covariance with phi'^2 takes (w - 1)/n,
  w = E phi'^2 x^2/(E phi'^2 E x^2); the part along y takes w/n. The gain is 1 + (kappa - 2 w)/n.

Limits: n >> 1, moments of x concentrated. Checked against measurement.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gradflow.specs.block_kinds import GROUPS
from gradflow.theory.maths import Number, sqrt
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS
from gradflow.theory.mean_field.layouts import Layout, Moments, scaled_moments, times_moments
from gradflow.theory.template import NORM_EPS, StreamShape

ROW_NORMS = ("layernorm", "groupnorm", "rmsnorm")
CENTRED_NORMS = ("layernorm", "groupnorm")
POINTWISE_PHI = {"dyt": "tanh", "derf": "erf"}  # phi(alpha x) in place of a norm
KNOWN_NORMS = (*ROW_NORMS, "batchnorm", *POINTWISE_PHI)

_SAMPLES = 1 << 21
_MANY_ROWS = 1024

# An activation, and the variance of its argument.
_Source = tuple[str, float]


class Stream(NamedTuple):
    """Moments of the stream.

    Attributes:
        s: second moments.
        mean: average over a row's features.
        source: phi and q where the stream is phi(N(0, q)), else None.
        normed: kind of the norm whose output the stream is, else None.
        common: average over r' of E x_r x_r' for each kind of pixel r; None where it is not known.
    """

    s: Moments
    mean: Number = 0.0
    source: _Source | None = None
    normed: str | None = None
    common: Number | None = None


class NormTape(NamedTuple):
    """What the way back through a norm needs.

    Attributes:
        kind: of norm.
        scale: 1 / (sigma_r sigma_s) for each class of entries.
        gain: factor on |g|^2 by the finite number of elements that the norm averages.
        number: how many independent elements the norm averages.
    """

    kind: str
    scale: Moments
    gain: float = 1.0
    number: float = math.inf


def normalise(
    kind: str | None, x: Stream, layout: Layout, fixed: float = 0.0, alpha: float = 0.5
) -> tuple[Stream, NormTape | None]:
    """Return the normalised stream, and what the way back needs.

    Args:
        kind: of `KNOWN_NORMS`, or None for the identity. A groupnorm is taken for a layernorm: its
            groups are alike.
        x: the stream.
        layout: of its moments.
        fixed: share of the variance that an earlier norm has fixed, 1 - s in the derivation.
        alpha: of the pointwise kinds.
    """
    if kind is None:
        return x, None
    if kind in POINTWISE_PHI:
        return _pointwise(kind, x, layout, alpha)
    y, scale = _batchnorm(x, layout) if kind == "batchnorm" else _by_rows(kind, x, layout)
    alike = layout.cosine(y.s) if layout.shape.side > 1 else 0.0
    count = _elements(kind, layout.shape, alike)
    return y, NormTape(kind, scale, norm_gain(kind, count, fixed, x.source), count)


def _by_rows(kind: str, x: Stream, layout: Layout) -> tuple[Stream, Moments]:
    """Return (x - m)/sigma over a row's features, or a whole image; m = 0 for rmsnorm."""
    q, mean, s = layout.diagonal(x.s), x.mean, x.s
    over_image = layout.shape.domain == "images"
    if over_image:
        q = layout.mean(q)
    if kind in CENTRED_NORMS and not is_zero(mean):
        centre = layout.mean(mean) if over_image else mean
        q, mean = q - centre * centre, mean - centre
        s = tuple([e - c for e, c in zip(s, _common(x.mean, centre, layout), strict=True)])
    inverse = 1 / sqrt(q + NORM_EPS)
    scale = layout.outer(inverse)
    s = times_moments(scale, s)
    mean = 0.0 if is_zero(mean) else mean * inverse
    return Stream(s, mean, normed=kind), scale


def _common(mean: Number, centre: Number, layout: Layout) -> Moments:
    """Return what subtracting `centre` from every feature takes from the second moments."""
    if layout.shape.domain == "images":
        return tuple([2 * centre * mean - centre * centre for _ in range(2)])
    return layout.outer(centre)


def is_zero(mean: Number) -> bool:
    """Tell whether a mean is the number 0; arrays are not looked at."""
    return isinstance(mean, float) and mean == 0.0


def _pointwise(kind: str, x: Stream, layout: Layout, alpha: float) -> tuple[Stream, NormTape]:
    """Return phi(alpha x) of normal x of mean 0: DyT (Zhu et al. 2025, arXiv:2503.10622), Derf.

    The Jacobian's square alpha^2 E phi'^2 falls as q^-1/2, where a norm's falls as q^-1: gradients
    grow as a stretched exponential of the depth.
    """
    hidden = tuple([alpha**2 * entry for entry in x.s])
    values, slopes = layout.activate(POINTWISE_PHI[kind], hidden)
    return Stream(values), NormTape(kind, tuple([alpha**2 * entry for entry in slopes]))


def _batchnorm(x: Stream, layout: Layout) -> tuple[Stream, Moments]:
    """Normalise each feature over all rows: their common part goes, the variance becomes 1."""
    if x.common is None:
        taken = layout.batch_common(x.s)
    else:
        taken = (2 * x.common - layout.mean(x.common),) * 2
    centred = tuple([entry - c for entry, c in zip(x.s, taken, strict=True)])
    variance = layout.mean(layout.diagonal(centred)) + NORM_EPS
    s = tuple([entry / variance for entry in centred])
    centre = 0.0 if is_zero(x.mean) else layout.mean(x.mean)
    mean = (x.mean - centre) / variance**0.5
    return Stream(s, mean, normed="batchnorm"), tuple([1 / variance for _ in x.s])


def pull_norm(tape: NormTape | None, g: Moments, layout: Layout) -> Moments:
    """Return the moments of J^T g."""
    if tape is None:
        return g
    if tape.kind == "batchnorm":
        common = layout.batch_mean(g)
        g = tuple([entry - common for entry in g])
    return scaled_moments(tape.gain, times_moments(tape.scale, g))


def _elements(kind: str, shape: StreamShape, alike: float = 0.0) -> float:
    """Return how many independent numbers one statistic of the norm averages.

    `alike` is the cosine c between the pixels of an image, whose squares correlate by c^2.
    """
    if kind == "batchnorm":
        return shape.rows
    features = shape.width // GROUPS if kind == "groupnorm" else shape.width
    pixels = shape.side**2
    if pixels == 1:
        return features
    return features * pixels / (1 + (pixels - 1) * alike * alike)


def norm_gain(kind: str, count: float, fixed: float, source: _Source | None) -> float:
    """Return the factor on |J^T g|^2, as derived at the top of the module.

    `count` is n, the independent elements that the norm averages, and `fixed` the share 1 - s of
    the variance that an earlier norm has fixed. `source` is phi and q where the norm's input is
    phi(N(0, q)) and the gradient goes on through phi'; None for a normal input.
    """
    if source is None:
        return 1 + (1 - fixed * fixed) / count
    if kind == "batchnorm":
        return _batch_gain(source, int(count)) if count < _MANY_ROWS else 1.0
    return 1 + _fourth_moments(source, kind != "rmsnorm") / count


@lru_cache(maxsize=256)
def _fourth_moments(source: _Source, centred: bool) -> float:
    """Return kappa - 2 w of the derivation; x = phi, or phi - E phi where the norm centres."""
    phi, q = ACTIVATION_MOMENTS[source[0]], source[1]
    mean = float(phi.mean(q)) if centred else 0.0
    variance = float(phi.square(q)) - mean**2
    fourth = float(phi.expect(lambda f, _: (f - mean) ** 4, q))
    joint = float(phi.expect(lambda f, d: (d * (f - mean)) ** 2, q))
    return fourth / variance**2 - 2 * joint / (variance * float(phi.slope_square(q)))


@lru_cache(maxsize=64)
def _batch_gain(source: _Source, rows: int) -> float:
    """Return |J^T g|^2 of y = BN(phi(W x)), x a batchnorm's output, over what `pull_norm` has.

    A feature's rows are normal with covariance q (I - 1/B) B/(B - 1), the fixed point of Yang et
    al. 2019 (arXiv:1902.08129). Its Jacobian's moments are means over a fixed random sample.
    """
    name, q = source
    phi = ACTIVATION_MOMENTS[name]
    h = np.random.default_rng(0).standard_normal((max(_SAMPLES // rows, 256), rows))
    h = (h - h.mean(1, keepdims=True)) * np.sqrt(q * rows / (rows - 1))
    f, d = phi.phi(h), phi.slope(h)
    f = f - f.mean(1, keepdims=True)
    variance = np.maximum((f * f).mean(1), 1e-5)
    joint = ((d * f).sum(1)) ** 2 / variance
    own = (d * d * (1 - 1 / rows)).sum(1) - (d * d * f * f).sum(1) / variance / rows
    # Sum over all pairs of rows of d_b d_b' (delta - 1/B - y_b y_b'/B), less the diagonal.
    cross = (d * d).sum(1) - (d.sum(1) ** 2 + joint) / rows - own
    exact = float(((own - cross / (rows - 1)) / variance).mean()) / rows
    off = -q / (rows - 1)
    value, slope = (float(each) for each in phi.pair(q, q, off))
    spread = (float(phi.square(q)) - value) * (1 - 1 / rows)
    slope = (1 - 1 / rows) * float(phi.slope_square(q)) + slope / rows
    return exact * spread / slope
