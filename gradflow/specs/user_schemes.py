"""Schemes by name, published or a user's own, and what a user's scheme must keep to.

A published scheme is covered by tests; a user's is held against the interface when it is used, so
that a slip is one line and not a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from gradflow.errors import UsageError
from gradflow.schemes import Place, Scheme, Wiring, published_scheme
from gradflow.schemes.wiring import LEARNED, NORM_PLACES
from gradflow.specs.user_files import is_user_name, loaded, told, without_digest
from gradflow.specs.user_units import check_kind, check_streams, check_whole, is_count, is_number

# Norms that stand inside a branch, with the branches that have room for them.
INSIDE: dict[str, tuple[str, ...]] = {
    "mid": ("attention", "ffn"),
    "query-key": ("attention",),
    "value": ("attention",),
}
# Matrices that a wiring can scale, by branch; those of a user's branch are its own business.
MATRICES: dict[str, tuple[str, ...]] = {
    "mlp": ("linear",),
    "conv": ("conv",),
    "resnet": ("conv1", "conv2"),
    "attention": ("q", "k", "v", "out"),
    "ffn": ("up", "down", "gate"),
}
_TEXTS = ("equation", "init", "paper", "claim")


def scheme_named(name: str) -> Scheme:
    """Return a published scheme, or a user's whose file was loaded.

    Raises:
        UsageError: the name is unknown, its file was not loaded, or it is no scheme.
    """
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
        streams=_Guarded(f"streams of {title} gives a whole number", scheme.streams, int, is_count),
    )


class _Guarded:
    """A user's function; an error in it, or a value that it should not return, is one line."""

    def __init__(
        self, rule: str, call: Any, kind: Any, holds: Callable[[Any], bool] = lambda _: True
    ) -> None:
        self.rule, self.call, self.kind, self.holds = rule, call, kind, holds

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
    return all(isinstance(name, str) and is_number(x) for name, x in values.items())


def check_scheme(name: str, fields: Collection[str], blocks: Collection[str]) -> None:
    """Refuse a user's scheme whose own attributes break the interface.

    Args:
        name: of the scheme.
        fields: of `StackSpec` that a scheme may bring.
        blocks: the known ones.

    Raises:
        UsageError: an attribute is of the wrong kind, or names what there is not.
    """
    scheme, title = scheme_named(name), without_digest(name)
    for text in _TEXTS:
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
    """Refuse a user's scheme that wires a unit by values of the wrong kind.

    Args:
        name: of the scheme.
        block: of the stack.
        wirings: those of all places.
        norm_kinds: defined on the stream.

    Raises:
        UsageError: the first value that breaks the interface, with its place.
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
        self.scheme, self.title, self.block = (
            scheme_named(name),
            without_digest(name),
            block,
        )
        self.kinds: dict[str, Place] = {}
        self.has_norms, self.has_shortcut = self.scheme.final_norm, False

    def check(self, wiring: Wiring, place: Place, where: str) -> None:
        """Refuse a unit that breaks the rules of its kind."""
        check_kind(wiring, place, self.block, where)
        check_streams(self.scheme, wiring, place, where)
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
        check_whole(self.scheme, self.title, tuple(self.kinds), self.last)


def _check_numbers(wiring: Wiring, where: str) -> None:
    for name in ("a", "b", "c", "alpha", "logit_power"):
        _expect(is_number(getattr(wiring, name)), f"{name} {where} is a number", wiring, name)
    known = wiring.learned is None or wiring.learned in tuple(LEARNED)
    _expect(known, f"learned {where} is None, or one of {', '.join(LEARNED)}", wiring, "learned")


def _check_parts(wiring: Wiring, where: str, branch: str) -> None:
    for name in ("gains", "kinds", "settings"):
        named = isinstance(getattr(wiring, name), Mapping)
        _expect(named, f"{name} {where} is a dictionary", wiring, name)
    scaled = all(is_number(gain) and gain >= 0 for gain in wiring.gains.values())
    _expect(scaled, f"gains {where} are numbers of at least 0", wiring, "gains")
    if branch not in MATRICES and wiring.unit != "template":
        rule = f"units of the kind {wiring.unit} are made of gradflow's own branches"
        raise UsageError(rule, branch, "choose another scheme, or a --block that is listed")
    if branch in MATRICES:
        matrices = [matrix for names in MATRICES.values() for matrix in names]
        _expect_known(f"gains {where}", wiring.gains, matrices)


def _check_norms(wiring: Wiring, where: str, kinds: Collection[str], branch: str) -> None:
    _expect(isinstance(wiring.norms, tuple), f"norms {where} is a tuple", wiring, "norms")
    _expect_known(f"norms {where}", wiring.norms, NORM_PLACES)
    _expect_known(f"kinds {where}", wiring.kinds, wiring.norms)
    _expect_known(f"kinds {where}", wiring.kinds.values(), kinds)
    for place in wiring.norms:
        if branch not in INSIDE.get(place, (branch,)):
            rule = f"a norm at {place} stands inside {' or '.join(INSIDE[place])}"
            raise UsageError(rule, f"norms {where}: {wiring.norms!r}", "leave it out there")


def _expect(holds: bool, rule: str, owner: object, name: str) -> None:
    if not holds:
        raise UsageError(rule, repr(getattr(owner, name)), "mend it")


def _expect_known(what: str, names: Iterable[object], known: Collection[str]) -> None:
    for name in names:
        if name not in tuple(known):
            raise UsageError(f"{what} are known names", repr(name), f"use {', '.join(known)}")
