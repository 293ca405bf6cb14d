"""The zoo: published residual, normalisation and initialisation schemes, as data.

A scheme is a choice of the template's scalars, norms and weight gains (`wiring`), place by place,
with the initialisation that its paper states. Sources are those of the papers named; what is
known to go wrong in public re-implementations stands in `pitfalls`.

`Scheme`, `Wiring` and `Place` are what a user's own scheme is made of.
"""

from __future__ import annotations

from gradflow.errors import UsageError
from gradflow.schemes.classic import CLASSIC_KINDS, CLASSIC_SCHEMES
from gradflow.schemes.deep import DEEP_KINDS, DEEP_SCHEMES
from gradflow.schemes.layernorm import LAYERNORM_KINDS, LAYERNORM_SCHEMES
from gradflow.schemes.scheme import Scheme
from gradflow.schemes.streams import READOUTS, STREAM_KINDS, STREAM_SCHEMES
from gradflow.schemes.unit_kinds import Readout, UnitKind
from gradflow.schemes.wiring import Place, Wiring

__all__ = [
    "READOUTS",
    "SCHEMES",
    "UNIT_KINDS",
    "Place",
    "Readout",
    "Scheme",
    "UnitKind",
    "Wiring",
    "published_scheme",
]

SCHEMES: dict[str, Scheme] = CLASSIC_SCHEMES | LAYERNORM_SCHEMES | DEEP_SCHEMES | STREAM_SCHEMES

UNIT_KINDS: dict[str, UnitKind] = {
    kind.name: kind for kind in (*CLASSIC_KINDS, *LAYERNORM_KINDS, *DEEP_KINDS, *STREAM_KINDS)
}


def published_scheme(name: str) -> Scheme:
    """Return the published scheme of that name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in SCHEMES:
        rule = "--scheme is one of the known names"
        raise UsageError(rule, name, f"use {', '.join(SCHEMES)}")
    return SCHEMES[name]
