"""What a user's own branch says of itself: class attributes, read without torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs import user_code


def branch_class(name: str) -> Any:
    """The class of a user's branch.

    Raises:
        UsageError: its file was not loaded, or it is no class of modules.
    """
    found = user_code.loaded(name)
    if not isinstance(found, type) or not any(map(_is_module, found.__mro__)):
        what = found.__name__ if isinstance(found, type) else type(found).__name__
        rule = f"{user_code.shown(name)} is a class of torch.nn.Module"
        raise UsageError(rule, what, "derive it from nn.Module, or give another name of the file")
    return found


def _is_module(base: type) -> bool:
    return (base.__module__, base.__name__) == ("torch.nn.modules.module", "Module")


def declared(name: str, attribute: str, default: str, known: Collection[str]) -> str:
    """A class attribute that is one of the known names.

    Raises:
        UsageError: it is none of them.
    """
    value = getattr(branch_class(name), attribute, default)
    _check(name, attribute, value, known)
    return str(value)


def declared_options(name: str, known: Collection[str]) -> tuple[str, ...]:
    """The class attribute `options`: fields of the spec that mean something for the branch.

    Raises:
        UsageError: it is no tuple, or names a field that is no option of blocks.
    """
    values = getattr(branch_class(name), "options", ())
    if not isinstance(values, tuple):
        rule = f"options of {user_code.shown(name)} is a tuple of names"
        raise UsageError(rule, repr(values), "use for example ('heads',)")
    for value in values:
        _check(name, "options", value, known)
    return values


def _check(name: str, attribute: str, value: object, known: Collection[str]) -> None:
    if value not in tuple(known):
        rule = f"{attribute} of {user_code.shown(name)} is one of the known names"
        raise UsageError(rule, repr(value), f"use {', '.join(known)}")
