"""Command-line options made from the fields of `StackSpec` and `RunOptions`.

Every field is an option with the same name and help text, so a new field needs no line here, and
`run`, `compare` and `check` cannot drift apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import cache, wraps
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from gradflow.errors import UsageError
from gradflow.fields import flag
from gradflow.ranges import expand_range
from gradflow.recipe import as_trained
from gradflow.run_options import RunOptions
from gradflow.spec import StackSpec
from gradflow.stack_fields import SIZES
from gradflow.user_code import from_file, is_reference

PANELS = {StackSpec: "Stack", RunOptions: "Measurement"}
# Fields that may name a thing in a user's own file.
FROM_FILES = ("scheme", "block")
Command = Callable[..., None]


def with_fields(*, lists: bool = False) -> Callable[[Command], Command]:
    """Give a command an option for every field of `StackSpec` and `RunOptions`.

    The command gets those that were given, with their values, as its first argument, a dictionary
    by field name; its other parameters stay as they are.

    Args:
        lists: the options take several values, joined by commas; the dictionary holds lists.
    """
    made = [_parameter(cls, field, lists=lists) for cls in PANELS for field in fields(cls)]
    names = {parameter.name for parameter in made}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def wrapper(**values: Any) -> None:
            given = {k: v for k, v in values.items() if k in names and v is not None}
            rest = {k: v for k, v in values.items() if k not in names}
            command(parse_lists(given) if lists else parse(given), **rest)

        hints = get_type_hints(command, include_extras=True)
        own = list(inspect.signature(command).parameters.values())[1:]
        parameters = made + [p.replace(annotation=hints[p.name]) for p in own]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def split(given: dict[str, Any]) -> tuple[StackSpec, RunOptions]:
    """The spec and the options that the given fields make; the rest are defaults.

    Raises:
        UsageError: a value breaks a rule.
    """
    stack = {f.name for f in fields(StackSpec)}
    spec = StackSpec(**{k: v for k, v in given.items() if k in stack})
    options = RunOptions(**{k: v for k, v in given.items() if k not in stack})
    return as_trained(spec, options), options


def parse(given: dict[str, Any]) -> dict[str, Any]:
    """Typed values from text, field by field; flags have their values already.

    Raises:
        UsageError: a value that is not of the field's type.
    """
    return {k: _value(k, v) if isinstance(v, str) else v for k, v in given.items()}


def parse_lists(given: dict[str, Any]) -> dict[str, list[Any]]:
    """Typed values from comma-separated text, field by field; whole numbers may be ranges.

    Raises:
        UsageError: a value that is not of the field's type, or an empty one.
    """
    return {
        name: [v for word in value.split(",") for v in _values(name, word)]
        if isinstance(value, str)
        else [value]
        for name, value in given.items()
    }


def _values(name: str, word: str) -> list[Any]:
    """One value, or those of a range of whole numbers."""
    if _fields()[name][1] is int and ".." in word:
        try:
            found = expand_range(word.strip())
        except ValueError:
            found = None
        if found is None:
            remedy = f"use for example {flag(name)} 12..48:12 or {flag(name)} 10..1000:log"
            raise UsageError(f"{flag(name)} takes whole numbers or ranges", repr(word), remedy)
        return found
    return [_value(name, word)]


# Of each type of field: its name in the help, what a value is, an example, the way from text.
# Typer's own conversion does not say what it got.
_KINDS: dict[type, tuple[str, str, Any, Callable[[str], Any]]] = {
    bool: ("BOOL", "true or false", "true", {"true": True, "false": False}.__getitem__),
    int: ("INT", "a whole number", 4, int),
    float: ("FLOAT", "a number", 1.0, float),
    str: ("NAME", "a name", "", str),
}


def _value(name: str, text: str) -> Any:
    field, kind = _fields()[name]
    _, meaning, example, convert = _KINDS[kind]
    word = text.strip()
    if name in FROM_FILES and is_reference(word):
        return from_file(word)
    try:
        if not word:
            raise ValueError
        return convert(word)
    except (ValueError, KeyError):
        default = SIZES.get(name, field.default)
        example = example if default is None else default
        remedy = f"use for example {flag(name)} {example}"
        raise UsageError(f"{flag(name)} takes {meaning}", repr(text), remedy) from None


@cache
def _fields() -> dict[str, tuple[Field[Any], type]]:
    """Every field with its type, less the None of those that have no default."""
    hints = {name: hint for cls in PANELS for name, hint in get_type_hints(cls).items()}
    return {f.name: (f, _plain_type(hints[f.name])) for cls in PANELS for f in fields(cls)}


def _parameter(cls: type, field: Field[Any], *, lists: bool) -> inspect.Parameter:
    kind = _fields()[field.name][1]
    # A network is causal or not, so both can be compared; other flags say how all are measured.
    is_flag = kind is bool and not (lists and cls is StackSpec)
    name = flag(field.name)
    info = typer.Option(
        f"{name}/{flag('no_' + field.name)}" if is_flag else name,
        help=_help(field, kind),
        show_default=False,  # Typer sees None: only then is a default known to be one
        rich_help_panel=PANELS[cls],
        metavar=None if is_flag else _KINDS[kind][0] + (",..." if lists else ""),
    )
    arrives_as = bool if is_flag else str
    only = inspect.Parameter.KEYWORD_ONLY
    hint = Annotated[arrives_as | None, info]  # type: ignore[valid-type]  # made at run time
    return inspect.Parameter(field.name, only, default=None, annotation=hint)


def _help(field: Field[Any], kind: type) -> str:
    meaning, choices = field.metadata["help"], field.metadata["choices"]
    known = "" if all(name in meaning for name in choices) else f": {', '.join(choices)}"
    value = flag(field.name) if kind is bool else field.default
    silent = field.default is None or field.default is False
    default = "" if silent else f"  [default: {value}]"
    return str(meaning + known + default)


def _plain_type(hint: Any) -> Any:
    """`int` from `int | None`."""
    if isinstance(hint, UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint
