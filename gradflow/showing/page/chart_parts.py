"""What charts have in common: axes, legends, colours, and the parameters a page steers them by.

A page steers a chart by three parameters: `listed`, the designs in the legend; `bottom` and `top`,
the ends of the vertical axis, or null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import altair as alt
import polars as pl

from gradflow.showing.page.chart_tables import axis_ends

# Six hues that dichromats can tell apart, each at least 3:1 against its background. Shapes repeat
# what colours say and go on where colours come round again: 6 and 7 have no common divisor.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#8a2be2", "#6d0a1f", "#14145a")
DARK = ("#2aa7e8", "#d56400", "#009e73", "#b066ff", "#ffcdd6", "#d9e35a")
MARK_SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
)
_INK, _PAPER = "#24292f", "white"
CHART_WIDTH, CHART_HEIGHT, BAR = 720, 320, 20
_FONT = "system-ui, 'DejaVu Sans', sans-serif"
DASHED = [5, 4]
_FADED = 0.06
# Pixels of a legend entry, and of a letter in it.
_ENTRY, _LETTER = 40, 6


@dataclass(frozen=True)
class Drawing:
    """A chart with the words around it.

    Attributes:
        title: the heading of the chart.
        text: what the chart shows, and how to read it.
        table: a key of `chart_tables`.
        columns: the drawn columns with their headings, the first one on the vertical axis.
        draw: makes the chart of this drawing from its table.
        near, seen: arguments of `chart_tables.axis_ends` for the vertical axis.
        bars: the chart has a line of text for each value of the column `bar`, and grows with them.
    """

    title: str
    text: str
    table: str
    columns: dict[str, str]
    draw: Callable[[Drawing, pl.DataFrame], alt.LayerChart]
    near: float | None = None
    seen: tuple[float, float] = (0, 1.05)
    bars: bool = False

    @property
    def value(self) -> str:
        """The column on the vertical axis."""
        return next(iter(self.columns))

    @property
    def span(self) -> list[str]:
        """The columns that have to fit on the vertical axis."""
        return [name for name in (self.value, "low", "high") if name in self.columns]

    def hints(self) -> list[alt.Tooltip]:
        """A line of the tooltip for each column."""
        return [hint(column, title) for column, title in self.columns.items()]

    def steered(self, chart: alt.Chart, table: pl.DataFrame, *more: alt.Parameter) -> alt.Chart:
        """The top layer of the chart with the parameters by which people and pages steer it."""
        bottom, top = axis_ends(table, self.span, self.near, self.seen)
        ends = [alt.param(name="bottom", value=bottom), alt.param(name="top", value=top)]
        listed = alt.param(name="listed", value=_designs(table))
        return chart.add_params(chosen(), *more, _zoom(), listed, *ends)


def layered(*layers: alt.Chart) -> alt.LayerChart:
    """Charts on top of each other."""
    return alt.LayerChart(layer=list(layers))


def chosen() -> alt.Parameter:
    """The selection that a click in the legend makes: one design."""
    return alt.selection_point(name="chosen", fields=["design"], bind="legend")


def _zoom() -> alt.Parameter:
    """The selection that drags and zooms the axes of a chart."""
    # The wheel without a key scrolls the page.
    return alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.ctrlKey]")


def faded(opacity: float) -> Any:
    """An opacity for the chosen designs; all others are faint."""
    return alt.when(chosen()).then(alt.value(opacity)).otherwise(alt.value(_FADED))


def layer_axis() -> alt.X:
    """The horizontal axis of the layers."""
    # Vega moves the last label inwards, so labels need room between them.
    axis = alt.Axis(tickMinStep=1, format=",d", grid=False, labelOverlap=True, labelSeparation=8)
    return alt.X("x:Q", title="layer (0 is the input)", axis=axis, scale=alt.Scale(nice=False))


def _designs(table: pl.DataFrame) -> list[str]:
    return table["design"].unique(maintain_order=True).to_list()


def design_colour(table: pl.DataFrame) -> alt.Color:
    """A colour for each design, with a legend of the designs."""
    # The same domain for colour and shape makes one legend of the two.
    return alt.Color("design:N", title=None, scale=_scale(table), legend=_legend(table))


def design_shape(table: pl.DataFrame) -> alt.Shape:
    """A shape for each design, in the legend of the colours."""
    return alt.Shape("design:N", title=None, scale=_scale(table), legend=_legend(table))


def _scale(table: pl.DataFrame) -> alt.Scale:
    return alt.Scale(domain=_designs(table))


def _legend(table: pl.DataFrame) -> alt.Legend:
    entry = _ENTRY + _LETTER * max(map(len, _designs(table)), default=0)
    columns = alt.ExprRef(f"max(1, floor(width / {entry}))")
    return alt.Legend(values=alt.ExprRef("listed"), columns=columns)


def hint(column: str, title: str) -> alt.Tooltip:
    """The line of a tooltip that shows a number."""
    return alt.Tooltip(f"{column}:Q", title=title, format=".4~g")


def number_axis(column: str, title: str) -> alt.Y:
    """A vertical axis whose ends a page steers."""
    scale = alt.Scale(domain=[alt.ExprRef("bottom"), alt.ExprRef("top")], nice=True)
    return alt.Y(f"{column}:Q", title=title, scale=scale)


def power_axis(column: str, title: str) -> alt.Y:
    """An axis for a logarithm that is labelled in powers of ten, a decade high at least."""
    return number_axis(column, title).axis(labelExpr=power_of_ten("datum.value"), tickMinStep=0.1)


def power_of_ten(exponent: str) -> str:
    """A Vega expression: 10 to a whole exponent as `10⁻³`, small fractions as plain numbers."""
    digits = zip("0123456789-\u2212", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻", strict=True)
    high = reduce(
        lambda text, pair: f"replace({text}, /{pair[0]}/g, '{pair[1]}')",
        digits,
        f"format({exponent}, '.12~g')",
    )
    plain = f"abs({exponent}) < 4 && {exponent} % 1 != 0"
    return f"{plain} ? format(pow(10, {exponent}), '.2~g') : '10' + {high}"


def themed(
    chart: alt.LayerChart, ink: str = _INK, paper: str = _PAPER, colours: tuple[str, ...] = LIGHT
) -> alt.LayerChart:
    """The chart in the given colours, with the letters and lines of all charts."""
    text: dict[str, Any] = {"labelColor": ink, "titleColor": ink, "titleFontWeight": "normal"}
    text["labelFontSize"] = 12
    axis: dict[str, Any] = {"titleFontSize": 12, "gridColor": ink, "gridOpacity": 0.12}
    legend: dict[str, Any] = {"labelLimit": 330, "orient": "bottom", "columnPadding": 16}
    # One call, because every `configure_...` of Altair copies the chart.
    return chart.configure(
        background=paper,
        font=_FONT,
        aria=False,
        range=alt.RangeConfig(category=list(colours), symbol=list(MARK_SHAPES)),
        axis=alt.AxisConfig(**text, **axis, domainColor=ink, tickColor=ink),
        legend=alt.LegendConfig(**text, **legend, symbolOpacity=1, symbolLimit=0),
        title=alt.TitleConfig(color=ink, subtitleColor=ink, anchor="start", fontSize=16),
        rule=alt.MarkConfig(color=ink),
        view=alt.ViewConfig(stroke=None),
    )


def picture_of(drawing: Drawing, table: pl.DataFrame) -> alt.LayerChart:
    """The chart of a drawing as it stands alone: titled, on paper, far-out runs left out."""
    title = alt.TitleParams(drawing.title, subtitle=drawing.text.split(". ")[0], limit=CHART_WIDTH)
    chart = drawing.draw(drawing, table).properties(title=title, width=CHART_WIDTH)
    if not drawing.bars:
        chart = chart.properties(height=CHART_HEIGHT)
    return themed(chart)
