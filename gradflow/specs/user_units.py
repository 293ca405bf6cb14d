"""What the kinds of unit ask of a user's scheme: their settings, their blocks, and their streams.

Units that carry several streams bear the name of the published scheme that has them. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import TypeGuard

from gradflow.errors import UsageError
from gradflow.schemes import SCHEMES, Scheme
from gradflow.schemes.wiring import READOUTS, UNIT_SETTINGS, Place, Wiring
from gradflow.specs.fields import check_choice

# Kinds that compute the template's sum; the others have a shortcut of weight 1.
SUMS = ("template", "stochastic", "pb-relax", "normformer", "fixup")
STREAMED = (
    *("b2t", "residual-dual", "siamesenorm", "hyper-connections", "mhc"),
    *("attnres", "denseformer", "value-residual"),
)


def check_kind(wiring: Wiring, place: Place, block: str, where: str) -> None:
    """Refuse a unit whose kind is unknown, or not defined on the block, or lacks a setting.

    Args:
        wiring: of the unit.
        place: where it stands.
        block: of the stack.
        where: the same in words.

    Raises:
        UsageError: the first rule that is broken.
    """
    kind = wiring.unit
    check_choice("unit of a Wiring", kind, tuple(UNIT_SETTINGS))
    if kind in SCHEMES:
        check_choice(f"--block for units of the kind {kind}", block, SCHEMES[kind].blocks)
    if kind not in SUMS and wiring.a != 1:
        rule = f"a {where} is 1, for units of the kind {kind} have a shortcut of their own"
        raise UsageError(rule, wiring.a, "leave it out")
    for name in UNIT_SETTINGS[kind]:
        if not is_number(wiring.settings.get(name), flag_too=True):
            rule = f"settings {where} have {', '.join(UNIT_SETTINGS[kind])} for {kind}"
            raise UsageError(rule, repr(dict(wiring.settings)), f"give {name}")
    _check_settings(wiring, place, where)


def _check_settings(wiring: Wiring, place: Place, where: str) -> None:
    """Settings that depend on the place, or on one another."""
    settings, kind = wiring.settings, wiring.unit
    known = {"first": place.index == 1} if "first" in UNIT_SETTINGS[kind] else {}
    if kind == "denseformer":
        known["averaged"] = SCHEMES[kind].wire(place).settings["averaged"]
    for name, value in known.items():
        if settings[name] != value:
            raise UsageError(f"{name} {where} is {value}", repr(settings[name]), "mend it")
    if kind in ("hyper-connections", "mhc"):
        _check_count(f"streams {where}", settings["streams"], 1)
    if kind == "hyper-connections":
        _check_count(f"stream {where}", settings["stream"], 0, settings["streams"] - 1)


def _check_count(what: str, value: object, least: int, most: float = math.inf) -> None:
    if not is_count(value) or not least <= value <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UsageError(f"{what} is a whole number {limits}", repr(value), "mend it")


def is_number(value: object, *, flag_too: bool = False) -> bool:
    """Whether it is a finite real number; True and False are none unless they may be."""
    if isinstance(value, bool):
        return flag_too
    return isinstance(value, Real) and math.isfinite(value)


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, of Python's kind."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_streams(scheme: Scheme, wiring: Wiring, place: Place, where: str) -> None:
    """Refuse a number of streams that is not what the unit gives.

    Raises:
        UsageError: says how many it gives.
    """
    given, true = scheme.streams(place), _streams(wiring, place)
    if given != true:
        rule = f"streams {where} is {true}, what units of the kind {wiring.unit} give"
        raise UsageError(rule, given, "mend it")


def _streams(wiring: Wiring, place: Place) -> int:
    if wiring.unit not in STREAMED:
        return 1
    if "streams" in UNIT_SETTINGS[wiring.unit]:
        return int(wiring.settings["streams"])
    return SCHEMES[wiring.unit].streams(place)


def check_whole(scheme: Scheme, title: str, kinds: Collection[str], last: Place) -> None:
    """Refuse kinds that do not go together, and a readout that does not fit the last state.

    Args:
        scheme: whose units were all checked.
        title: of it.
        kinds: of its units.
        last: the last place.

    Raises:
        UsageError: the first rule that is broken.
    """
    streamed = [kind for kind in kinds if kind in STREAMED]
    if streamed and len(kinds) > 1:
        rule = f"all units of {title} are of one kind where one carries several streams"
        raise UsageError(rule, ", ".join(kinds), f"use {streamed[0]} everywhere")
    if scheme.profiled != ("admin" in kinds) or (scheme.profiled and len(kinds) > 1):
        rule = f"{title} is profiled where all its units are of the kind admin, and only there"
        raise UsageError(rule, f"profiled={scheme.profiled} with {', '.join(kinds)}", "mend it")
    _check_readout(scheme, title, scheme.streams(last))


def _check_readout(scheme: Scheme, title: str, streams: int) -> None:
    if scheme.readout is not None:
        check_choice(f"readout of {title}", scheme.readout, tuple(READOUTS))
    if (scheme.readout is None) != (streams == 1):
        rule = f"{title} has a readout where its last unit gives several streams, and only there"
        got = f"readout={scheme.readout!r} with {streams} of them"
        remedy = f"use one of {', '.join(READOUTS)}" if streams > 1 else "leave it out"
        raise UsageError(rule, got, remedy)
    if scheme.readout is not None and READOUTS[scheme.readout] not in (None, streams):
        rule = f"the readout {scheme.readout} takes {READOUTS[scheme.readout]} streams"
        raise UsageError(rule, f"{streams} in {title}", "choose another readout")
