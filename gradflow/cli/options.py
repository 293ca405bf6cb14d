"""Command-line options made from the fields of `StackSpec`, `ModelRequest` and `RunOptions`.

Every field is an option with the same name and help text, so a new field needs no line here, and
`run`, `compare` and `check` cannot drift apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from itertools import product
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from gradflow.errors import UsageError
from gradflow.specs.fields import Option, flag, options_of
from gradflow.specs.grid import expand_range
from gradflow.specs.model_spec import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import from_file, names_file_object

_PANELS = {StackSpec: "Stack", ModelRequest: "Model", RunOptions: "Measurement"}
_Command = Callable[..., None]


def with_fields(*, lists: bool = False) -> Callable[[_Command], _Command]:
    """Give a command an option for every field of the three classes that is one.

    The command gets those that were given, with their values, as its first argument, a dictionary
    by field name; its other parameters stay as they are. With `lists` the options take several
    values, joined by commas, and the dictionary holds lists.
    """
    made = [_parameter(name, lists=lists) for name in _options()]
    names = {parameter.name for parameter in made}

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def wrapper(**values: Any) -> None:
            given = {k: v for k, v in values.items() if k in names and v not in (None, [])}
            rest = {k: v for k, v in values.items() if k not in names}
            command(parse_lists(given) if lists else parse(given), **rest)

        hints = get_type_hints(command, include_extras=True)
        own = list(inspect.signature(command).parameters.values())[1:]
        parameters = made + [p.replace(annotation=hints[p.name]) for p in own]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer's
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def parse(given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of options, from text but for flags; UsageError for one of another type."""
    texts = {k: " ".join(v) if _options()[k].about.repeated else v for k, v in given.items()}
    return {k: _value(k, v) if isinstance(v, str) else v for k, v in texts.items()}


def parse_lists(given: dict[str, Any]) -> dict[str, list[Any]]:
    """Return lists of values from comma-separated text; whole numbers may be ranges.

    A UsageError tells of an empty value, or of one that is not of the field's type.
    """
    return {name: _list(name, value) for name, value in given.items()}


def _list(name: str, value: Any) -> list[Any]:
    about = _options()[name].about
    if about.repeated:
        return _settings_product(value)
    if about.whole or not isinstance(value, str):
        return [_value(name, value) if isinstance(value, str) else value]
    return [v for word in value.split(",") for v in _values(name, word)]


def _settings_product(given: Sequence[str]) -> list[str]:
    """Return every combination of settings: `["n_layer=12,24", "n_head=4"]` has two."""
    lists = []
    for text in given:
        name, equals, values = text.partition("=")
        lists.append([f"{name}{equals}{value}" for value in values.split(",")])
    return [" ".join(words) for words in product(*lists)]


def _values(name: str, word: str) -> list[Any]:
    """The value of a word, or the values of a range of whole numbers."""
    if _options()[name].kind is int and ".." in word:
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
    known = _options()[name]
    _, meaning, example, convert = _KINDS[known.kind]
    word = text.strip()
    if known.about.from_file and names_file_object(word):
        return from_file(word)
    try:
        if not word:
            raise ValueError
        return convert(word)
    except (ValueError, KeyError):
        usual = (known.about.fill, known.default, example)
        example = next(value for value in usual if value is not None)
        remedy = f"use for example {flag(name)} {example}"
        raise UsageError(f"{flag(name)} takes {meaning}", repr(text), remedy) from None


@dataclass(frozen=True)
class _CommandOption:
    """An option with the type of its value and the panel of the help that shows it."""

    about: Option
    default: Any
    kind: type
    panel: str


@cache
def _options() -> dict[str, _CommandOption]:
    """Every option by name, in the order of the help."""
    hints = {cls: get_type_hints(cls) for cls in _PANELS}
    return {
        field.name: _CommandOption(about, field.default, _plain_type(hints[cls][field.name]), panel)
        for cls, panel in _PANELS.items()
        for field, about in options_of(cls)
    }


def _parameter(name: str, *, lists: bool) -> inspect.Parameter:
    known = _options()[name]
    # A network is causal or not, so both can be compared; other flags say how all are measured.
    is_flag = known.kind is bool and not (lists and known.panel == _PANELS[StackSpec])
    more = ",..." if lists else ""
    info = typer.Option(
        f"{flag(name)}/{flag('no_' + name)}" if is_flag else flag(name),
        help=_help(name, known),
        show_default=False,  # Typer sees None: only then is a default known to be one
        rich_help_panel=known.panel,
        metavar=None if is_flag else known.about.metavar or _KINDS[known.kind][0] + more,
    )
    arrives_as: Any = list[str] if known.about.repeated else bool if is_flag else str
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(
        name, only, default=None, annotation=Annotated[arrives_as | None, info]
    )


def _help(name: str, known: _CommandOption) -> str:
    meaning, choices = known.about.meaning, known.about.choices
    names = "" if all(choice in meaning for choice in choices) else f": {', '.join(choices)}"
    value = flag(name) if known.kind is bool else known.default
    silent = known.default is None or known.default is False
    return meaning + names + ("" if silent else f"  [default: {value}]")


def _plain_type(hint: Any) -> Any:
    """`int` from `int | None`."""
    if isinstance(hint, UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint
