"""What the kinds of unit ask of a user's scheme: their settings, their blocks, and their streams.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import TypeGuard

from gradflow.errors import UsageError
from gradflow.schemes import READOUTS, UNIT_KINDS, Place, Scheme, Wiring
from gradflow.specs.fields import check_choice


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
    check_choice("unit of a Wiring", wiring.unit, tuple(UNIT_KINDS))
    kind = UNIT_KINDS[wiring.unit]
    if kind.blocks is not None:
        check_choice(f"--block for units of the kind {kind.name}", block, kind.blocks)
    if kind.has_own_shortcut and wiring.a != 1:
        rule = f"a {where} is 1, for units of the kind {kind.name} have a shortcut of their own"
        raise UsageError(rule, wiring.a, "leave it out")
    for name in kind.settings:
        if not is_number(wiring.settings.get(name), flag_too=True):
            rule = f"settings {where} have {', '.join(kind.settings)} for {kind.name}"
            raise UsageError(rule, repr(dict(wiring.settings)), f"give {name}")
    for name, value in kind.placed(place).items():
        if wiring.settings[name] != value:
            raise UsageError(f"{name} {where} is {value}", repr(wiring.settings[name]), "mend it")
    for name, limits in kind.counts.items():
        _check_count(f"{name} {where}", wiring.settings[name], *limits(wiring.settings))


def _check_count(what: str, value: object, least: int, most: float) -> None:
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
    given, true = scheme.streams(place), UNIT_KINDS[wiring.unit].streams_after(place, wiring)
    if given != true:
        rule = f"streams {where} is {true}, what units of the kind {wiring.unit} give"
        raise UsageError(rule, given, "mend it")


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
    streamed = [kind for kind in kinds if UNIT_KINDS[kind].has_streams]
    if streamed and len(kinds) > 1:
        rule = f"all units of {title} are of one kind where one carries several streams"
        raise UsageError(rule, ", ".join(kinds), f"use {streamed[0]} everywhere")
    profiled = any(UNIT_KINDS[kind].profiled for kind in kinds)
    if scheme.profiled != profiled or (profiled and len(kinds) > 1):
        known = " or ".join(name for name, kind in UNIT_KINDS.items() if kind.profiled)
        rule = f"{title} is profiled where all its units are of the kind {known}, and only there"
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
    taken = None if scheme.readout is None else READOUTS[scheme.readout].streams
    if taken not in (None, streams):
        rule = f"the readout {scheme.readout} takes {taken} streams"
        raise UsageError(rule, f"{streams} in {title}", "choose another readout")
