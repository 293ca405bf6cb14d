"""Wirings of their own that are the template at initialisation, once it is put in their terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from gradflow.schemes.wiring import Place, Wiring
from gradflow.specs.block_kinds import POINTWISE
from gradflow.theory.template import NoTheoryError, TemplateUnit, WeightMoments

NGPT_ALPHA = 0.05
# Times the mean square of what a norm normalises, so that nothing is left of its eps.
LARGE = 1e30


def _residual(unit: TemplateUnit, *_: object) -> TemplateUnit:
    """Its units have a shortcut, whatever the wiring's a is; equal units stay one object."""
    return unit if unit.a == 1.0 else replace(unit, a=1.0)


def _mhc(unit: TemplateUnit, _: Place, wiring: Wiring) -> TemplateUnit:
    """All streams are copies of Pre-LN's, of which the branch reads n sigma(pre)."""
    gate = 1 / (1 + math.exp(-float(wiring.settings["pre"])))
    return _reading(unit, int(wiring.settings["streams"]) * gate)


@lru_cache(maxsize=256)
def _reading(unit: TemplateUnit, read: float) -> TemplateUnit:
    return replace(unit, a=1.0, read=read)


def _attnres(unit: TemplateUnit, place: Place, _: Wiring) -> TemplateUnit:
    """The mean of as many streams as there are units before, and the input, is read."""
    return replace(unit, a=1.0, read=1 / place.index)


def _siamesenorm(unit: TemplateUnit, _: Place, wiring: Wiring) -> TemplateUnit:
    """b is the branch's weight in the stream with norms."""
    return replace(unit, a=1.0, b=1 / float(wiring.settings["divisor"]))


def _pb_relax(unit: TemplateUnit, *_: object) -> TemplateUnit:
    """Every norm is of 8 x / max|x|, about 1.6 x / sqrt(E x^2): its eps never counts.

    Ding et al. 2021 (arXiv:2105.13290). Here both norms' inputs are large in its place.
    """
    norms = unit.norm_in, unit.norm_branch
    if None in norms or set(norms) & set(POINTWISE):
        raise NoTheoryError("no formula for 8 x / max|x| but under norms of rows, in and out")
    return replace(unit, read=LARGE**0.5, w_out=_enlarged(unit.w_out))


def _enlarged(weights: WeightMoments) -> WeightMoments:
    return WeightMoments(LARGE * weights.scale, LARGE * weights.bias)


@lru_cache(maxsize=256)
def _ngpt(unit: TemplateUnit) -> TemplateUnit:
    """x' = N((1 - alpha) x + alpha N(f(x))), in units of x/sqrt(d), d the width.

    Loshchilov et al. 2024 (arXiv:2410.01131). Rows of every matrix have length 1, so it keeps mean
    squares; queries and keys of length 1 times sqrt(d_head) are those of a qk-norm; the ffn is
    gated, u phi(v).
    """
    one = WeightMoments(1.0)
    alike = replace(unit, a=1 - NGPT_ALPHA, b=NGPT_ALPHA, norm_branch="rmsnorm", norm_out="rmsnorm")
    alike = replace(
        alike, w_in=one, w_out=WeightMoments(LARGE), w_query=one, w_key=one, qk_norm=True
    )
    return alike if unit.kind == "attention" else replace(alike, w_gate=one)


Restate = Callable[[TemplateUnit, Place, Wiring], TemplateUnit]

RESTATED: dict[str, Restate] = {
    "hyper-connections": _residual,
    "denseformer": _residual,
    "mhc": _mhc,
    "attnres": _attnres,
    "b2t": _residual,
    "residual-dual": _residual,
    "siamesenorm": _siamesenorm,
    "value-residual": _residual,
    "pb-relax": _pb_relax,
    "admin": lambda unit, place, wiring: unit,
    "ngpt": lambda unit, place, wiring: _ngpt(unit),
}
