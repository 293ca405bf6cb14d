"""What a norm does to the moments of a stream, and its Jacobian to those of a gradient.

y = (x - mean) / sigma; J^T g = (g - mean of g - y mean of y g) / sigma. Over n elements the last
two terms take a share of about 2/n of |g|^2, and E 1/sigma^2 exceeds 1 / E sigma^2 by about as
much; for normal x they cancel to (n - 2)/(n - 3). So the Jacobian is 1 / sigma here, and
`corrections` has what is left where it counts. Limits: n >> 1, moments of x concentrated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from gradflow.theory.maths import Number, sqrt
from gradflow.theory.mean_field.corrections import Source, elements, norm_gain
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.moment_sums import Moments, scaled, times
from gradflow.theory.template import EPS

ROW_NORMS = ("layernorm", "groupnorm", "rmsnorm")
CENTRED = ("layernorm", "groupnorm")
POINTWISE = {"dyt": "tanh", "derf": "erf"}  # f(alpha x) in place of a norm
KNOWN = (*ROW_NORMS, "batchnorm", *POINTWISE)


class Stream(NamedTuple):
    """Moments of the stream.

    Attributes:
        s: the second ones.
        mean: average over a row's features.
        source: phi and q where the stream is phi(N(0, q)), else None.
        normed: the kind of norm that it just left, else None.
        common: of pixels, average over r' of E x_r x_r' per kind of row r; None where it is not
            known.
    """

    s: Moments
    mean: Number = 0.0
    source: Source | None = None
    normed: str | None = None
    common: Number | None = None


class NormTape(NamedTuple):
    """What the Jacobian of a norm needs.

    Attributes:
        kind: of norm.
        scale: 1 / (sigma_r sigma_s) per class.
        gain: correction of |g|^2 for the finite number of elements that the norm averages.
        number: of these elements, as far as they are independent.
    """

    kind: str
    scale: Moments
    gain: float = 1.0
    number: float = math.inf


def normalise(
    kind: str | None, x: Stream, layout: Layout, fixed: float = 0.0, alpha: float = 0.5
) -> tuple[Stream, NormTape | None]:
    """The normalised stream.

    Args:
        kind: of `KNOWN`, or None for the identity. A groupnorm is taken for a layernorm: its groups
            are alike.
        x: the stream.
        layout: of its moments.
        fixed: share of the variance that an earlier norm has fixed.
        alpha: of the pointwise kinds.
    """
    if kind is None:
        return x, None
    if kind in POINTWISE:
        return _pointwise(kind, x, layout, alpha)
    y, scale = _batchnorm(x, layout) if kind == "batchnorm" else _by_rows(kind, x, layout)
    alike = layout.cosine(y.s) if layout.shape.side > 1 else 0.0
    count = elements(kind, layout.shape, alike)
    return y, NormTape(kind, scale, norm_gain(kind, count, fixed, x.source), count)


def _by_rows(kind: str, x: Stream, layout: Layout) -> tuple[Stream, Moments]:
    """(x - m)/sigma over the features of each row, or over a whole image; m = 0 for rmsnorm."""
    q, mean, s = layout.diagonal(x.s), x.mean, x.s
    over_image = layout.shape.domain == "images"
    if over_image:
        q = layout.mean(q)
    if kind in CENTRED and not is_zero(mean):
        centre = layout.mean(mean) if over_image else mean
        q, mean = q - centre * centre, mean - centre
        s = tuple([e - c for e, c in zip(s, _common(x.mean, centre, layout), strict=True)])
    inverse = 1 / sqrt(q + EPS)
    scale = layout.outer(inverse)
    s = times(scale, s)
    mean = 0.0 if is_zero(mean) else mean * inverse
    return Stream(s, mean, normed=kind), scale


def _common(mean: Number, centre: Number, layout: Layout) -> Moments:
    """What subtracting `centre` from every feature takes from the second moments."""
    if layout.shape.domain == "images":
        return tuple([2 * centre * mean - centre * centre for _ in range(2)])
    return layout.outer(centre)


def is_zero(mean: Number) -> bool:
    """Whether a stream has no mean for certain; arrays are not looked at."""
    return isinstance(mean, float) and mean == 0.0


def _pointwise(kind: str, x: Stream, layout: Layout, alpha: float) -> tuple[Stream, NormTape]:
    """f(alpha x) for x normal: DyT (Zhu et al. 2025, arXiv:2503.10622), Derf.

    Its Jacobian's square alpha^2 E f'^2 falls as q^-1/2, not q^-1 as a norm's: the gradient grows
    as a stretched exponential. Only for streams without a mean.
    """
    hidden = tuple([alpha**2 * entry for entry in x.s])
    values, slopes = layout.activate(POINTWISE[kind], hidden)
    return Stream(values), NormTape(kind, tuple([alpha**2 * entry for entry in slopes]))


def _batchnorm(x: Stream, layout: Layout) -> tuple[Stream, Moments]:
    """Per feature over all rows: their common part goes, the variance becomes 1."""
    if x.common is None:
        taken = layout.batch_common(x.s)
    else:
        taken = (2 * x.common - layout.mean(x.common),) * 2
    centred = tuple([entry - c for entry, c in zip(x.s, taken, strict=True)])
    variance = layout.mean(layout.diagonal(centred)) + EPS
    s = tuple([entry / variance for entry in centred])
    centre = 0.0 if is_zero(x.mean) else layout.mean(x.mean)
    mean = (x.mean - centre) / variance**0.5
    return Stream(s, mean, normed="batchnorm"), tuple([1 / variance for _ in x.s])


def pull_norm(tape: NormTape | None, g: Moments, layout: Layout) -> Moments:
    """Moments of J^T g."""
    if tape is None:
        return g
    if tape.kind == "batchnorm":
        common = layout.batch_mean(g)
        g = tuple([entry - common for entry in g])
    return scaled(tape.gain, times(tape.scale, g))
