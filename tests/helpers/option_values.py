"""Values of options, found by what the options say, so that a new option is tried at once."""

from __future__ import annotations

from typing import Any

from gradflow.specs.fields import Option, Real, Switch, Whole, options_of
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

ABOUT: dict[str, Option] = {
    field.name: about for cls in (StackSpec, RunOptions) for field, about in options_of(cls)
}


def another(name: str, value: Any) -> Any:
    """A value that the option takes, other than this one."""
    about = ABOUT[name]
    if about.choices:
        return next(choice for choice in about.choices if choice != value)
    rules = {Switch: not value, Whole: (value or 0) + 1, Real: (value or 0.0) + 1.0}
    return rules[type(about.values)]
