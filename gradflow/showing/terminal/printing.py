"""Printing to a terminal that may lack the block characters: then the same in ASCII.

A character that an encoding does not have would become a question mark, and a profile of question
marks says nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#"
_BRAILLE = 0x2800
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
# All but ± keep their width, so that what stands in columns stays there.
_ASCII = str.maketrans(
    {
        **dict(zip(BARS, ASCII_BARS, strict=True)),
        **dict.fromkeys(map(chr, range(_BRAILLE + 1, _BRAILLE + 256)), "*"),
        chr(_BRAILLE): " ",
        **dict.fromkeys("┌┐└┘├┤┬┴┼", "+"),
        "─": "-",
        "│": "|",
        "·": "'",
        "…": ":",
        "▲": "^",
        "▼": "v",
        "±": "+/-",
        **dict(zip(_SUPERSCRIPTS, "0123456789-", strict=True)),
    }
)


def can_draw(encoding: str | None) -> bool:
    """Whether an encoding has the characters that profiles and bars are drawn with."""
    try:
        (BARS + "⣿±│┤").encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def in_ascii(text: str) -> str:
    """The same with ASCII in place of every character that is drawn here.

    Bars are ` .:-=+*#` from low to high, ± is `+/-`, 10⁷ is `10^7`; other text stays as it is.
    """
    return re.sub(f"[{_SUPERSCRIPTS}]+", r"^\g<0>", text).translate(_ASCII)


def print_view(view: RenderableType, console: Console) -> None:
    """Print, in ASCII where the console's encoding lacks the block characters."""
    if can_draw(console.encoding):
        console.print(view)
        return
    with console.capture() as captured:
        console.print(view)
    console.file.write(in_ascii(captured.get()))
