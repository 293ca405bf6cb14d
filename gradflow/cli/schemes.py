"""`gradflow schemes`: the zoo, or one scheme of it; nothing is measured."""

from __future__ import annotations

from typing import Annotated

import typer

from gradflow.cli.common import Json, check_target, show_view, write_text
from gradflow.errors import UsageError

_Name = Annotated[
    str | None, typer.Argument(help="a scheme of the list, or yours: my_scheme.py:SCHEME")
]
_Depth = Annotated[
    int | None, typer.Option(help="constants at this depth only; without it, at several")
]


def schemes_command(name: _Name = None, *, depth: _Depth = None, json: Json = None) -> None:
    """List the published schemes, or tell all of one: equation, init, constants, claim, errors."""
    check_target(json)
    if depth is not None and depth < 1:
        raise UsageError("--depth is a whole number of at least 1", depth, "use --depth 1 or more")
    from gradflow.showing.terminal import schemes as pages

    depths = pages.CONSTANT_DEPTHS if depth is None else (depth,)
    scheme = None if name is None else pages.find_scheme(name)
    if json is not None:
        text = pages.zoo_json() if scheme is None else pages.scheme_json(*scheme, depths)
        write_text(json, text)
    if json != "-":
        show_view(pages.zoo_view() if scheme is None else pages.scheme_view(*scheme, depths))
