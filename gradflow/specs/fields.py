"""Fields that are options too: how they are declared, spelt and checked. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from gradflow.errors import UsageError


def option(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line option, with its help text."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a name that is not among the known ones, and list those.

    Raises:
        UsageError: the name is unknown.
    """
    if value not in known:
        raise UsageError(f"{what} is one of the known names", value, f"use {', '.join(known)}")


def at_least(values: Any, name: str, least: int) -> None:
    """Refuse a field that is no whole number from `least` up.

    Raises:
        UsageError: the value is smaller, or no whole number.
    """
    value = getattr(values, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        rule = f"{flag(name)} is a whole number of at least {least}"
        raise UsageError(rule, value, f"use {flag(name)} {max(least, 1)} or more")


def positive(values: Any, name: str, *, zero: bool = False) -> None:
    """Refuse a field that is no finite number above (or at) 0.

    Raises:
        UsageError: the value is negative, not finite, or no number.
    """
    value = getattr(values, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        rule = f"{flag(name)} is a finite number {'of at least' if zero else 'above'} 0"
        raise UsageError(rule, value, f"use for example {flag(name)} 1.0")


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by field, if the class has all these fields.

    Raises:
        UsageError: an unknown field.
    """
    known = tuple(f.name for f in fields(cls))
    for name in values:
        check_choice(f"a field of {cls.__name__}", name, known)
    return dict(values)
