"""The published schemes as a person reads them, and as JSON: the list, and a page for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from gradflow.errors import UsageError, closest_first
from gradflow.schemes import SCHEMES, Place, Scheme
from gradflow.showing.terminal.printing import plain_table
from gradflow.specs.block_kinds import NORM_KINDS
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import block_kind
from gradflow.specs.user_files import from_file, names_file_object, without_digest
from gradflow.specs.user_schemes import scheme_named
from gradflow.text import json_text

# Depths of the table of constants: those of common nets, and two beyond.
CONSTANT_DEPTHS = (6, 12, 24, 48, 96, 1000)
_WIDTH = 80
# Options that papers publish as recipes too, with the way to ask for them.
_NORM_OPTIONS = {"qk-norm": "--qk-norm", **{kind: f"--norm-kind {kind}" for kind in NORM_KINDS}}


@dataclass(frozen=True)
class SchemeConstants:
    """The named numbers of a scheme in one kind of unit of one layer."""

    depth: int
    layer: int
    unit: str
    values: Mapping[str, float]


def find_scheme(name: str) -> tuple[str, Scheme]:
    """A scheme with its name: one of the zoo, or of a user's own file.

    Raises:
        UsageError: the name is unknown, or the file breaks the interface.
    """
    if names_file_object(name):
        name = from_file(name)
        StackSpec(scheme=name)  # checks the scheme against the interface
        return without_digest(name), scheme_named(name)
    if name in _NORM_OPTIONS:
        rule = "a scheme is a whole recipe; a norm is an option of any"
        raise UsageError(rule, name, f"use --scheme pre-ln {_NORM_OPTIONS[name]}")
    if name not in SCHEMES:
        known = ", ".join(closest_first(name, SCHEMES))
        raise UsageError("a scheme is one of the known names", name, f"use {known}")
    return name, SCHEMES[name]


def scheme_constants(scheme: Scheme, depths: Sequence[int]) -> list[SchemeConstants]:
    """The numbers of a scheme on its usual block, at the first and the last layer of each depth.

    Where they are the same in every layer, only those of the first are returned.

    Raises:
        UsageError: a scheme whose constants break the interface.
    """
    places = [(depth, layer) for depth in depths for layer in dict.fromkeys((1, depth))]
    rows = [row for place in places for row in _of_layer(scheme, *place)]
    return rows if _vary_by_layer(rows) else [row for row in rows if row.layer == 1]


def _of_layer(scheme: Scheme, depth: int, layer: int) -> Iterator[SchemeConstants]:
    kinds = block_kind(scheme.blocks[0]).units
    places = [Place(depth, layer, unit, len(kinds), kind) for unit, kind in enumerate(kinds)]
    values = [dict(scheme.constants(place)) for place in places]
    if all(other == values[0] for other in values):
        yield SchemeConstants(depth, layer, "", values[0])
        return
    for place, numbers in zip(places, values, strict=True):
        yield SchemeConstants(depth, layer, place.kind, numbers)


def _vary_by_layer(rows: Sequence[SchemeConstants]) -> bool:
    known: dict[tuple[int, str], Mapping[str, float]] = {}
    return any(known.setdefault((r.depth, r.unit), r.values) != r.values for r in rows)


def zoo_view() -> RenderableType:
    """Every scheme with its equation and its paper."""
    table = plain_table(width=_WIDTH)
    table.add_column("scheme", no_wrap=True)
    table.add_column("equation", ratio=5)
    table.add_column("paper", ratio=4, style="dim")
    for name, scheme in SCHEMES.items():
        table.add_row(Text(name, style="bold"), Text(scheme.equation), Text(scheme.paper))
    return Group(table, Text(), Text("gradflow schemes NAME tells more of one."))


def scheme_view(
    name: str, scheme: Scheme, depths: Sequence[int] = CONSTANT_DEPTHS
) -> RenderableType:
    """The facts of one scheme, and its constants at some depths."""
    facts = plain_table(header=False, width=_WIDTH)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for heading, text in _facts(scheme):
        facts.add_row(heading, Text(text))
    return Group(
        Text(name, style="bold"), facts, *_constants_view(scheme_constants(scheme, depths))
    )


def _facts(scheme: Scheme) -> Iterator[tuple[str, str]]:
    yield "equation", scheme.equation
    yield "init", scheme.init
    yield "paper", scheme.paper
    yield "blocks", ", ".join(scheme.blocks)
    if scheme.defaults:
        brings = (f"{key.replace('_', ' ')} {value}" for key, value in scheme.defaults.items())
        yield "brings", f"{', '.join(brings)}; options override it"
    yield "claim", scheme.claim
    for part in scheme.lacks:
        yield "not here", part
    for pitfall in scheme.pitfalls:
        yield "goes wrong", pitfall


def _constants_view(rows: Sequence[SchemeConstants]) -> Iterator[RenderableType]:
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    if not names:
        return
    shows = {"layer": _vary_by_layer(rows), "unit": any(row.unit for row in rows)}
    table = plain_table(gap=2)
    for heading in ("depth", *(h for h, shown_too in shows.items() if shown_too), *names):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for row in rows:
        places = [str(getattr(row, heading)) for heading, it_is in shows.items() if it_is]
        numbers = [_number(row.values.get(name)) for name in names]
        table.add_row(str(row.depth), *places, *numbers)
    yield Text()
    yield table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def zoo_json() -> str:
    """The list of schemes as JSON."""
    return json_text([_about(name, scheme) for name, scheme in SCHEMES.items()], ascii_only=False)


def scheme_json(name: str, scheme: Scheme, depths: Sequence[int] = CONSTANT_DEPTHS) -> str:
    """One scheme as JSON, with its constants."""
    rows = [
        {"depth": row.depth, "layer": row.layer, "unit": row.unit or None, **row.values}
        for row in scheme_constants(scheme, depths)
        if row.values
    ]
    return json_text({**_about(name, scheme), "constants": rows}, ascii_only=False)


def _about(name: str, scheme: Scheme) -> dict[str, Any]:
    return {
        "name": name,
        "equation": scheme.equation,
        "init": scheme.init,
        "paper": scheme.paper,
        "claim": scheme.claim,
        "blocks": list(scheme.blocks),
        "defaults": dict(scheme.defaults),
        "lacks": list(scheme.lacks),
        "pitfalls": list(scheme.pitfalls),
    }
