"""Schemes by name, published or a user's own, and what a user's scheme must keep to. Torch-free.

A published scheme is covered by tests; a user's is held against the interface when it is used, so
that a slip is one line and not a wrong number. Kinds of units ask for their settings, their blocks,
and their streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeGuard

from gradflow.errors import UsageError
from gradflow.schemes import READOUTS, UNIT_KINDS, Place, Scheme, Wiring, published_scheme
from gradflow.schemes.wiring import LEARNED, NORM_PLACES
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.fields import check_choice
from gradflow.specs.user_files import is_user_name, loaded, told, without_digest


def scheme_named(name: str) -> Scheme:
    """Return a published scheme, or a user's whose file was loaded, else raise UsageError."""
    if not is_user_name(name):
        return published_scheme(name)
    scheme = loaded(name)
    if not isinstance(scheme, Scheme):
        rule = f"{without_digest(name)} is a gradflow.schemes.Scheme"
        raise UsageError(rule, type(scheme).__name__, "make one, or give another name of the file")
    title = without_digest(name)
    return replace(
        scheme,
        wire=_Guarded(f"wire of {title} gives a gradflow.schemes.Wiring", scheme.wire, Wiring),
        constants=_Guarded(
            f"constants of {title} gives a dictionary of numbers by name",
            scheme.constants,
            Mapping,
            _are_numbers,
        ),
        input_scale=_Guarded(f"input_scale of {title} gives a number", scheme.input_scale, Real),
        streams=_Guarded(
            f"streams of {title} gives a whole number", scheme.streams, int, _is_count
        ),
    )


@dataclass(frozen=True)
class _Guarded:
    """A user's function; an error in it, or a value that it should not return, is one line."""

    rule: str
    call: Callable[[Any], Any]
    kind: Any
    holds: Callable[[Any], bool] = lambda _: True

    def __call__(self, where: Any) -> Any:
        try:
            value = self.call(where)
        except UsageError:  # a place that the scheme is not defined for
            raise
        except Exception as error:  # noqa: BLE001 (a user's code may raise anything)
            got = f"{told(error)}, for {where}"
            raise UsageError(self.rule, got, "mend it") from None
        if not isinstance(value, self.kind):
            raise UsageError(self.rule, type(value).__name__, "mend it")
        if not self.holds(value):
            raise UsageError(self.rule, repr(value), "mend it")
        return value


def _are_numbers(values: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and _is_number(x) for name, x in values.items())


def check_scheme(name: str, fields: Collection[str], blocks: Collection[str]) -> None:
    """Raise a UsageError where attributes of a user's scheme break the interface.

    Args:
        name: of the scheme.
        fields: of `StackSpec` that a scheme may bring.
        blocks: the known ones.
    """
    scheme, title = scheme_named(name), without_digest(name)
    for text in ("equation", "init", "paper", "claim"):
        _expect(isinstance(getattr(scheme, text), str), f"{text} of {title} is text", scheme, text)
    # A string is a collection too, of its letters.
    for switch in ("plain", "normalises", "final_norm", "final_activation", "profiled"):
        given = getattr(scheme, switch)
        _expect(isinstance(given, bool), f"{switch} of {title} is True or False", scheme, switch)
    if scheme.input_norm is not None:
        _expect_known(f"input_norm of {title}", (scheme.input_norm,), ("norm", "unit"))
    listed = isinstance(scheme.blocks, tuple | list) and bool(scheme.blocks)
    _expect(listed, f"blocks of {title} is a tuple of names", scheme, "blocks")
    _expect_known(f"blocks of {title}", scheme.blocks, blocks)
    brings = isinstance(scheme.defaults, Mapping)
    _expect(brings, f"defaults of {title} is a dictionary", scheme, "defaults")
    _expect_known(f"defaults of {title}", scheme.defaults, fields)


def check_wirings(
    name: str, block: str, wirings: Iterable[tuple[Place, Wiring]], norm_kinds: Collection[str]
) -> None:
    """Raise a UsageError for the first value of the wrong kind in the wirings of all places.

    Args:
        name: of the scheme.
        block: of the stack.
        wirings: those of all places.
        norm_kinds: defined on the stream.
    """
    own = _OwnUnits(name, block) if is_user_name(name) else None
    for place, wiring in wirings:
        where = f"of {without_digest(name)} at layer {place.layer} ({place.kind})"
        _check_numbers(wiring, where)
        _check_parts(wiring, where, place.kind)
        _check_norms(wiring, where, norm_kinds, place.kind)
        if own:
            own.check(wiring, place, where)
    if own:
        own.check_all()


class _OwnUnits:
    """The units of a user's scheme, one after the other, and then all together."""

    def __init__(self, name: str, block: str) -> None:
        self.scheme, self.title, self.block = scheme_named(name), without_digest(name), block
        self.kinds: dict[str, Place] = {}
        self.has_norms, self.has_shortcut = self.scheme.final_norm, False

    def check(self, wiring: Wiring, place: Place, where: str) -> None:
        """Refuse a unit that breaks the rules of its kind."""
        _check_kind(wiring, place, self.block, where)
        _check_streams(self.scheme, wiring, place, where)
        self.scheme.constants(place)
        self.has_norms |= bool(wiring.norms)
        self.has_shortcut |= wiring.a != 0
        self.kinds[wiring.unit] = self.last = place

    def check_all(self) -> None:
        """Refuse a scheme whose own words do not hold for its units: titles rely on them."""
        if self.has_shortcut == self.scheme.plain:
            rule = f"{self.title} is plain where no unit has a shortcut (a = 0), and only there"
            got = f"plain={self.scheme.plain}"
            raise UsageError(rule, got, f"say plain={not self.scheme.plain}")
        if self.has_norms != self.scheme.normalises:
            rule = f"{self.title} normalises where a unit has norms, and only there"
            got = f"normalises={self.scheme.normalises}"
            raise UsageError(rule, got, f"say normalises={not self.scheme.normalises}")
        self.scheme.input_scale(self.last.depth)
        _check_whole(self.scheme, self.title, tuple(self.kinds), self.last)


def _check_numbers(wiring: Wiring, where: str) -> None:
    for name in ("a", "b", "c", "alpha", "logit_power"):
        _expect(_is_number(getattr(wiring, name)), f"{name} {where} is a number", wiring, name)
    known = wiring.learned is None or wiring.learned in tuple(LEARNED)
    _expect(known, f"learned {where} is None, or one of {', '.join(LEARNED)}", wiring, "learned")


def _check_parts(wiring: Wiring, where: str, branch: str) -> None:
    for name in ("gains", "kinds", "settings"):
        named = isinstance(getattr(wiring, name), Mapping)
        _expect(named, f"{name} {where} is a dictionary", wiring, name)
    scaled = all(_is_number(gain) and gain >= 0 for gain in wiring.gains.values())
    _expect(scaled, f"gains {where} are numbers of at least 0", wiring, "gains")
    if branch not in BLOCKS and wiring.unit != "template":
        rule = f"units of the kind {wiring.unit} are made of gradflow's own branches"
        raise UsageError(rule, branch, "choose another scheme, or a --block that is listed")
    if branch in BLOCKS:  # the matrices of a user's branch are its own business
        matrices = [matrix for kind in BLOCKS.values() for matrix in kind.matrices]
        _expect_known(f"gains {where}", wiring.gains, matrices)


def _check_norms(wiring: Wiring, where: str, kinds: Collection[str], branch: str) -> None:
    _expect(isinstance(wiring.norms, tuple), f"norms {where} is a tuple", wiring, "norms")
    _expect_known(f"norms {where}", wiring.norms, NORM_PLACES)
    _expect_known(f"kinds {where}", wiring.kinds, wiring.norms)
    _expect_known(f"kinds {where}", wiring.kinds.values(), kinds)
    for place in wiring.norms:
        branches = [name for name, kind in BLOCKS.items() if place in kind.inner_norms]
        if branches and branch not in branches:
            rule = f"a norm at {place} stands inside {' or '.join(branches)}"
            raise UsageError(rule, f"norms {where}: {wiring.norms!r}", "leave it out there")


def _expect(holds: bool, rule: str, owner: object, name: str) -> None:
    if not holds:
        raise UsageError(rule, repr(getattr(owner, name)), "mend it")


def _expect_known(what: str, names: Iterable[object], known: Collection[str]) -> None:
    for name in names:
        if name not in tuple(known):
            raise UsageError(f"{what} are known names", repr(name), f"use {', '.join(known)}")


def _check_kind(wiring: Wiring, place: Place, block: str, where: str) -> None:
    """Refuse a unit whose kind is unknown, or not defined on the block, or lacks a setting."""
    check_choice("unit of a Wiring", wiring.unit, tuple(UNIT_KINDS))
    kind = UNIT_KINDS[wiring.unit]
    if kind.blocks is not None:
        check_choice(f"--block for units of the kind {wiring.unit}", block, kind.blocks)
    if kind.has_own_shortcut and wiring.a != 1:
        rule = f"a {where} is 1, for units of the kind {wiring.unit} have a shortcut of their own"
        raise UsageError(rule, wiring.a, "leave it out")
    for name in kind.settings:
        if not _is_number(wiring.settings.get(name), flag_too=True):
            rule = f"settings {where} have {', '.join(kind.settings)} for {wiring.unit}"
            raise UsageError(rule, repr(dict(wiring.settings)), f"give {name}")
    for name, value in kind.placed(place).items():
        if wiring.settings[name] != value:
            raise UsageError(f"{name} {where} is {value}", repr(wiring.settings[name]), "mend it")
    for name, limits in kind.counts.items():
        _check_count(f"{name} {where}", wiring.settings[name], *limits(wiring.settings))


def _check_count(what: str, value: object, least: int, most: float) -> None:
    if not _is_count(value) or not least <= value <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UsageError(f"{what} is a whole number {limits}", repr(value), "mend it")


def _is_number(value: object, *, flag_too: bool = False) -> bool:
    """Whether a value is a finite real number; a bool is none unless `flag_too`."""
    if isinstance(value, bool):
        return flag_too
    return isinstance(value, Real) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a Python int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_streams(scheme: Scheme, wiring: Wiring, place: Place, where: str) -> None:
    """Refuse a number of streams that is not what the unit gives."""
    given, true = scheme.streams(place), UNIT_KINDS[wiring.unit].streams_after(place, wiring)
    if given != true:
        rule = f"streams {where} is {true}, what units of the kind {wiring.unit} give"
        raise UsageError(rule, given, "mend it")


def _check_whole(scheme: Scheme, title: str, kinds: Collection[str], last: Place) -> None:
    """Refuse kinds that do not go together, and a readout that does not fit the last state."""
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
