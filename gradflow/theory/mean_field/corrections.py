"""What a norm over few elements adds to the gradient: the first order in 1 / count.

Over n elements E 1/sigma^2 exceeds 1/E sigma^2 by r/n, r = n Var(sigma^2)/(E sigma^2)^2, and the
Jacobian takes the gradient's part along y, 1/n of it. Derived here; checked against measurement.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gradflow.specs.block_kinds import GROUPS
from gradflow.theory.mean_field.kernels import PAIRS
from gradflow.theory.mean_field.moments import ACTIVATIONS
from gradflow.theory.template import Shape

_SAMPLES = 1 << 21
_MANY_ROWS = 1024

# An activation and the variance of its argument.
Source = tuple[str, float]


def elements(kind: str, shape: Shape, alike: float = 0.0) -> float:
    """How many independent numbers one statistic of the norm averages.

    Args:
        kind: of the norm.
        shape: of the stream.
        alike: cosine between the pixels of an image, c: squares correlate by c^2.
    """
    if kind == "batchnorm":
        return shape.rows
    features = shape.width // GROUPS if kind == "groupnorm" else shape.width
    pixels = shape.side**2
    if pixels == 1:
        return features
    return features * pixels / (1 + (pixels - 1) * alike * alike)


def norm_gain(kind: str, count: float, fixed: float, source: Source | None) -> float:
    """Factor on |J^T g|^2.

    Args:
        kind: of the norm.
        count: `elements`.
        fixed: share of the variance that fluctuates no more: the shortcut of a post-norm unit.
            The rest, s, is taken for normal, and the shortcut's gradient has lost its part along
            the last unit's output already: 2 (1 - (1-s)^2) - s - s (2 - s) + s = 1 - fixed^2.
        source: phi and q where the norm's input is phi(N(0, q)) and the gradient goes on through
            phi': their fourth moments count.
    """
    if source is None:
        return 1 + (1 - fixed * fixed) / count
    if kind == "batchnorm":
        return _batch_gain(source, int(count)) if count < _MANY_ROWS else 1.0
    return 1 + _fourth_moments(source, kind != "rmsnorm") / count


@lru_cache(maxsize=256)
def _fourth_moments(source: Source, centred: bool) -> float:
    """kappa - 2 w: kappa = E x^4/(E x^2)^2, w = E phi'^2 x^2/(E phi'^2 E x^2), x = phi (- mean).

    E phi'^2 (1 - 1/n - y^2/n)/sigma^2 to first order in the fluctuation of sigma^2.
    """
    phi, q = ACTIVATIONS[source[0]], source[1]
    mean = float(phi.mean(q)) if centred else 0.0
    variance = float(phi.square(q)) - mean**2
    fourth = float(phi.expect(lambda f, _: (f - mean) ** 4, q))
    joint = float(phi.expect(lambda f, d: (d * (f - mean)) ** 2, q))
    return fourth / variance**2 - 2 * joint / (variance * float(phi.slope_square(q)))


@lru_cache(maxsize=64)
def _batch_gain(source: Source, rows: int) -> float:
    """Exact factor of y = BN(phi(W x)) over that of `pull_norm`, x a BN's output before it.

    A feature's rows are normal with covariance q (I - 1/B) B/(B - 1), the fixed point of Yang et
    al. 2019 (arXiv:1902.08129). Its Jacobian's moments are means over a fixed random sample.
    """
    name, q = source
    phi, pair = ACTIVATIONS[name], PAIRS[name]
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
    spread = (float(phi.square(q)) - float(pair.value(q, q, off))) * (1 - 1 / rows)
    slope = (1 - 1 / rows) * float(phi.slope_square(q)) + float(pair.slope(q, q, off)) / rows
    return exact * spread / slope
