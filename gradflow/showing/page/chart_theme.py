"""The colours, letters and sizes of charts, on a page and as pictures."""

from __future__ import annotations

from typing import Any

import altair as alt

from gradflow.showing.page.chart_parts import Drawing, Table

# Six hues that dichromats can tell apart, each at least 3:1 against its background. Shapes repeat
# what colours say and go on where these come round again: 6 and 7 have no common divisor.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#8a2be2", "#6d0a1f", "#14145a")
DARK = ("#2aa7e8", "#d56400", "#009e73", "#b066ff", "#ffcdd6", "#d9e35a")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
INK, PAPER = "#24292f", "white"
WIDTH, HEIGHT, BAR = 720, 320, 20
FONT = "system-ui, 'DejaVu Sans', sans-serif"
DASH = [5, 4]


def themed(
    chart: alt.LayerChart, ink: str = INK, paper: str = PAPER, colours: tuple[str, ...] = LIGHT
) -> alt.LayerChart:
    """The same chart in these colours."""
    text: dict[str, Any] = {"labelColor": ink, "titleColor": ink, "titleFontWeight": "normal"}
    axis = alt.AxisConfig(
        **text,
        labelFontSize=12,
        titleFontSize=12,
        gridColor=ink,
        gridOpacity=0.12,
        domainColor=ink,
        tickColor=ink,
    )
    legend = alt.LegendConfig(
        **text,
        labelFontSize=12,
        labelLimit=330,
        orient="bottom",
        columnPadding=16,
        symbolOpacity=1,
        symbolLimit=0,
    )
    # In one go: every configure_... of Altair copies the chart.
    return chart.configure(
        background=paper,
        font=FONT,
        aria=False,
        range=alt.RangeConfig(category=list(colours), symbol=list(SHAPES)),
        axis=axis,
        legend=legend,
        title=alt.TitleConfig(color=ink, subtitleColor=ink, anchor="start", fontSize=16),
        rule=alt.MarkConfig(color=ink),
        view=alt.ViewConfig(stroke=None),
    )


def picture_of(drawing: Drawing, table: Table) -> alt.LayerChart:
    """The same for a chart of any kind."""
    title = alt.TitleParams(drawing.title, subtitle=drawing.text.split(". ")[0], limit=WIDTH)
    chart = drawing.draw(table).properties(title=title, width=WIDTH)
    if not drawing.bars:
        chart = chart.properties(height=HEIGHT)
    return themed(chart)
