"""Names of units in a table: where room is short, the end is what tells them apart."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

# Columns that a name may be cut to.
LEAST = 18


@dataclass(frozen=True)
class UnitCell:
    """A name that loses its beginning: `encoder.layers.0#12` becomes `…layers.0#12`."""

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
        """From `LEAST` columns, or fewer if it is shorter, to all of it."""
        del console
        whole = cell_len(self.name)
        return Measurement(min(LEAST, whole), min(whole, options.max_width))
