"""Options as dataclass fields: how an option is declared, spelt and checked. Imports no torch.

An option is one field, `name: type = option(default, meaning, ...)`. Its `Option` says what it
decides; keys, names, tables, comparisons and the command line are derived from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, Self, get_args, get_type_hints

from gradflow.errors import UsageError

# What an option decides: the measured numbers, the verdict on them, the measured seconds, the
# memory that the measurement takes, or the device that it runs on.
Decides = Literal["numbers", "verdict", "times", "memory", "place"]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    """Raise a UsageError that lists the known names for a value that is none of them."""
    if value not in known:
        raise UsageError(f"{what} is one of the known names", value, f"use {', '.join(known)}")


@dataclass(frozen=True)
class Whole:
    """Values that are whole numbers of at least `least`; True and False are none."""

    least: int

    def check(self, name: str, value: object) -> None:
        """Raise a UsageError for the value of a field that is smaller, or no whole number."""
        if not isinstance(value, int) or isinstance(value, bool) or value < self.least:
            rule = f"{flag(name)} is a whole number of at least {self.least}"
            raise UsageError(rule, value, f"use {flag(name)} {max(self.least, 1)} or more")


@dataclass(frozen=True)
class Real:
    """Values that are finite numbers above 0, or also 0 itself where `zero` is true."""

    zero: bool = False

    def check(self, name: str, value: object) -> None:
        """Raise a UsageError for the value of a field that is negative, infinite, or no number."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and (value > 0 or (value == 0 and self.zero)):  # type: ignore[arg-type, operator]
            return
        rule = f"{flag(name)} is a finite number {'of at least' if self.zero else 'above'} 0"
        raise UsageError(rule, value, f"use for example {flag(name)} 1.0")


@dataclass(frozen=True)
class Switch:
    """Values that are True or False."""

    rule: str = "is true or false"

    def check(self, name: str, value: object) -> None:
        """Raise a UsageError for the value of a field that is neither."""
        if not isinstance(value, bool):
            remedy = f"use {flag(name)} or {flag('no_' + name)}"
            raise UsageError(f"{flag(name)} {self.rule}", value, remedy)


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a command-line option says of itself.

    Attributes:
        meaning: its help text.
        choices: the names that it takes; empty where its values are no names from a list.
        decides: what changes with its value.
        values: what its values have to be, where that is neither a name nor any text.
        fill: the value where it is not given and has a meaning; None where others decide that.
        of_block: it means something for some blocks only; their `BlockKind.options` name it.
        unkeyed_default: keys of runs hold it only where its value is not the default, so that an
            option can be added without another key for the runs that are stored already.
        built_only: it applies to the layers that gradflow builds, not to a given model.
        metavar: its value in the help, where the type says too little.
        from_file: its value may name an object in a user's file.
        whole: commas in its value do not part a list.
        repeated: it may be given several times.
    """

    meaning: str
    choices: tuple[str, ...] = ()
    decides: Decides = "numbers"
    values: Whole | Real | Switch | None = None
    fill: Any = None
    of_block: bool = False
    unkeyed_default: bool = False
    built_only: bool = False
    metavar: str | None = None
    from_file: bool = False
    whole: bool = False
    repeated: bool = False


def option(default: Any, meaning: str, choices: tuple[str, ...] = (), **facts: Any) -> Any:
    """A dataclass field that is also a command-line option; `facts` are those of `Option`."""
    about = Option(meaning=meaning, choices=choices, **facts)
    return field(default=default, metadata={"option": about})


@cache
def options_of(cls: type) -> tuple[tuple[Field[Any], Option], ...]:
    """Every field of a dataclass that is a command-line option, in order."""
    return tuple((f, f.metadata["option"]) for f in fields(cls) if "option" in f.metadata)


def deciding(cls: type, *decides: Decides) -> tuple[str, ...]:
    """Names of the options of a class that decide one of these things, in their order."""
    return tuple(f.name for f, about in options_of(cls) if about.decides in decides)


def keyed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record of this class by field, less those that its key does not hold."""
    unheld = {
        f.name
        for f, about in options_of(cls)
        if about.decides != "numbers" or (about.unkeyed_default and values[f.name] == f.default)
    }
    return {name: value for name, value in values.items() if name not in unheld}


def check_values(cls: type, values: Mapping[str, Any]) -> None:
    """Raise a UsageError for the first value that breaks its rule; a default of None passes."""
    for f, about in options_of(cls):
        value = values[f.name]
        if about.values and not (value is None and f.default is None):
            about.values.check(f.name, value)


def check_names(cls: type, values: Mapping[str, Any]) -> None:
    """Raise a UsageError for the first name that is none of the choices; None passes."""
    for f, about in options_of(cls):
        if about.choices and values[f.name] is not None:
            check_choice(flag(f.name), values[f.name], about.choices)


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by field; UsageError for a field that the class does not have."""
    known = tuple(f.name for f in fields(cls))
    for name in values:
        check_choice(f"a field of {cls.__name__}", name, known)
    return dict(values)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A record that runs are stored with: plain values by field, in a JSON file."""

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of plain values that `from_json` takes."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """Return the values that decide the numbers, by field."""
        return keyed(type(self), self.to_json())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `to_json` wrote; UsageError for an unknown field."""
        return cls(**known_fields(cls, values))


def typed(cls: type, values: object) -> dict[str, Any]:
    """Return values of a dataclass's fields by name, if each has the type of its field.

    Names that the class does not have pass: its constructor refuses them. A TypeError tells of a
    value of another type, or of one that is no JSON object.
    """
    hints = get_type_hints(cls)
    known = expect(f"what makes a {cls.__name__}", values, dict)
    for name in known.keys() & hints.keys():
        kinds = get_args(hints[name]) or (hints[name],)
        # JSON writes a float without decimals as a whole number.
        expect(name, known[name], *kinds, *((int,) if float in kinds else ()))
    return known


def expect(name: str, value: Any, *kinds: type) -> Any:
    """Return the value if it is of one of these types, else raise TypeError; a bool is no int."""
    if type(value) in kinds:
        return value
    wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
    raise TypeError(f"{name} is {type(value).__name__}, not {wanted}")


def expect_items(name: str, values: Any, *kinds: type) -> Any:
    """Return a list or a dictionary whose values are all of these types, else raise TypeError."""
    items = values.values() if isinstance(values, Mapping) else expect(name, values, list)
    for item in items:
        expect(f"a value in {name}", item, *kinds)
    return values
