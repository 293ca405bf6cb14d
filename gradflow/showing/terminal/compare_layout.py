"""A table of runs in 80 characters: rows by design, its name beside them or above."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from textwrap import wrap

from rich.text import Text

from gradflow.judging.comparison import Comparison, Row
from gradflow.judging.overview import STYLES
from gradflow.showing.terminal.compare_columns import MARKS, Column

WIDTH = 80

# Longer tables are shown by their two ends.
MOST_ROWS, ENDS = 40, 15


def table(comparison: Comparison, columns: Sequence[Column]) -> Text:
    """Rows by design, each on one line of at most 80 characters.

    The name of a design stands beside its rows, folded over them; where it does not fit there, on
    lines of its own above. The middle of a long table is left out, and counted.
    """
    head, tail = _ends(comparison.rows)
    layout = _Layout.fitting(columns, [*head, *tail])
    lines = [layout.heading(), *_grouped(layout, head)]
    if tail:
        left_out = comparison.rows[len(head) : len(comparison.rows) - len(tail)]
        lines += [Text(_elided(left_out), style="dim"), *_grouped(layout, tail)]
    return Text("\n").join(lines)


def _ends(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    return (rows, ()) if len(rows) <= MOST_ROWS else (rows[:ENDS], rows[-ENDS:])


def _elided(rows: Sequence[Row]) -> str:
    verdicts = Counter(row.summary.verdict for row in rows).most_common()
    counted = ", ".join(f"{number_of} {verdict}" for verdict, number_of in verdicts)
    return f"… {len(rows):,} more: {counted}; --csv - has them all"


def _grouped(layout: _Layout, rows: Sequence[Row]) -> Iterator[Text]:
    for _, group in groupby(rows, key=attrgetter("design")):
        yield from layout.group(list(group))


@dataclass(frozen=True)
class _Layout:
    """Where things stand in a table. `room` is the width of the names; 0: they stand above."""

    columns: Sequence[Column]
    widths: Sequence[int]
    room: int

    @classmethod
    def fitting(cls, columns: Sequence[Column], rows: Sequence[Row]) -> _Layout:
        """Names beside their rows where all of them fit there."""
        texts = [[c.heading, *(c.cell(row) for row in rows)] for c in columns]
        widths = [max(map(len, column)) for column in texts]
        room = WIDTH - sum(widths) - len(widths)
        groups = [list(group) for _, group in groupby(rows, key=attrgetter("design"))]
        folded = [_fold(group[0].design, room) for group in groups]
        longest = max(len(line) for name in folded for line in name)
        fits = all(len(name) <= len(group) for name, group in zip(folded, groups, strict=True))
        return cls(columns, widths, max(longest, len("design")) if fits and longest <= room else 0)

    def heading(self) -> Text:
        """The names of the columns."""
        return Text(self._line("design", [c.heading for c in self.columns]), style="bold")

    def group(self, rows: Sequence[Row]) -> Iterator[Text]:
        """The lines of one design."""
        name = _fold(rows[0].design, self.room or WIDTH)
        if not self.room:
            yield from map(Text, name)
            name = []
        for i, row in enumerate(rows):
            beside = name[i] if i < len(name) else ""
            line = Text(self._line(beside, [column.cell(row) for column in self.columns]))
            line.highlight_words([row.summary.verdict], STYLES.get(row.summary.verdict, "red"))
            line.highlight_words([MARKS["slower"], MARKS["faster"]], "bold")
            yield line

    def _line(self, name: str, cells: Sequence[str]) -> str:
        placed = [
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(cells, self.widths, self.columns, strict=True)
        ]
        return " ".join([name.ljust(self.room)] * bool(self.room) + placed).rstrip()


def _fold(name: str, room: int) -> list[str]:
    """The name in lines; its phrases (`no norm`) stay whole if they can."""
    for text in (name.replace(" ", "\xa0").replace(",\xa0", ", "), name):
        lines = wrap(text, max(room, 1), break_on_hyphens=False, break_long_words=room >= WIDTH)
        if max(map(len, lines)) <= room:
            break
    return [line.replace("\xa0", " ") for line in lines]
