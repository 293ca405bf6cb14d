"""Values from a JSON file, held against the types of a dataclass before it is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints


def typed(cls: type, values: object) -> dict[str, Any]:
    """The values of a dataclass' fields, by name; unknown names are the constructor's business.

    Raises:
        TypeError: no JSON object, or a value of another type than its field.
    """
    hints = get_type_hints(cls)
    known = expect(f"what makes a {cls.__name__}", values, dict)
    for name in known.keys() & hints.keys():
        kinds = get_args(hints[name]) or (hints[name],)
        # JSON writes a float without decimals as a whole number.
        expect(name, known[name], *kinds, *((int,) if float in kinds else ()))
    return known


def expect(name: str, value: Any, *kinds: type) -> Any:
    """The value, if it is of one of these types; a bool is no int.

    Raises:
        TypeError: it is of none of them.
    """
    if type(value) in kinds:
        return value
    wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
    raise TypeError(f"{name} is {type(value).__name__}, not {wanted}")


def expect_items(name: str, values: Any, *kinds: type) -> Any:
    """A list or a dictionary, if all its values are of these types.

    Raises:
        TypeError: it is neither, or holds other values.
    """
    items = values.values() if isinstance(values, Mapping) else expect(name, values, list)
    for item in items:
        expect(f"a value in {name}", item, *kinds)
    return values
