"""What the views of the terminal share: printing, plain tables, styles, names that are cut."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gradflow.text import can_draw, in_ascii

# Columns that the name of a unit may be cut to.
_LEAST = 18


def print_view(view: RenderableType, console: Console) -> None:
    """Print a view, in ASCII where the console's encoding lacks the block characters."""
    if can_draw(console.encoding):
        console.print(view)
        return
    with console.capture() as captured:
        console.print(view)
    console.file.write(in_ascii(captured.get()))


def plain_table(*, gap: int = 1, header: bool = True, width: int | None = None) -> Table:
    """A table without lines, its columns a `gap` apart; a `width` makes it fill a line."""
    return Table(
        box=None,
        padding=(0, gap, 0, 0),
        pad_edge=False,
        show_header=header,
        header_style="bold",
        width=width,
    )


@dataclass(frozen=True)
class UnitCell:
    """The name of a unit, cut in front: `encoder.layers.0#12` becomes `…layers.0#12`.

    Its end is what tells it apart from the others.
    """

    name: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The name, or as much of its end as there is room for."""
        del console
        room, end = options.max_width, self.name
        if cell_len(end) > room:
            while cell_len(end) >= room and end:
                end = end[1:]
            end = "…" + end
        yield Text(end)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """From `_LEAST` columns, or fewer if the name is shorter, to all of it."""
        del console
        whole = cell_len(self.name)
        return Measurement(min(_LEAST, whole), min(whole, options.max_width))
