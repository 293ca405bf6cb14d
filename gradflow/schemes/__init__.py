"""The zoo: published residual, normalisation and initialisation schemes, as data.

A scheme is a choice of the template's scalars, norms and weight gains (`wiring`), place by place,
with the initialisation that its paper states. Sources are those of the papers named; what is
known to go wrong in public re-implementations stands in `pitfalls`.

`Scheme`, `Wiring` and `Place` are what a user's own scheme is made of.
"""

from __future__ import annotations

from gradflow.errors import UsageError
from gradflow.schemes import classic, deep, layernorm, streams, unit_kinds
from gradflow.schemes.scheme import Scheme
from gradflow.schemes.streams import READOUTS
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

_FAMILIES = (unit_kinds, classic, layernorm, deep, streams)
# A row's constant is its registration: PRE_LN is the scheme pre-ln, MHC_UNIT the kind of unit mhc.
_NAMED = [
    (constant.lower().replace("_", "-"), row)
    for family in _FAMILIES
    for constant, row in vars(family).items()
]
SCHEMES = {name: row for name, row in _NAMED if isinstance(row, Scheme)}
UNIT_KINDS = {name.removesuffix("-unit"): row for name, row in _NAMED if isinstance(row, UnitKind)}


def published_scheme(name: str) -> Scheme:
    """Return the published scheme of that name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in SCHEMES:
        rule = "--scheme is one of the known names"
        raise UsageError(rule, name, f"use {', '.join(SCHEMES)}")
    return SCHEMES[name]
