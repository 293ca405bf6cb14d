"""Charts of training: the loss with its floor, and a heat map of gradients by layer and step."""

from __future__ import annotations

import altair as alt

from gradflow.showing.page.chart_parts import (
    Drawing,
    Table,
    chosen,
    design_colour,
    faded,
    hint,
    layered,
    number_axis,
    steering,
    zoom,
)
from gradflow.showing.page.chart_theme import BAR, DASH
from gradflow.showing.page.charts import CHARTS

# Beyond these powers of ten all are the same colour, or one dead run would hide the others.
COLDEST, HOTTEST = -12, 6


def loss(losses: Table) -> alt.LayerChart:
    """The loss over the steps: a line per run, a band over its seeds, its floor dashed."""
    drawing, title = TRAINING_CHARTS["loss"], "cross-entropy in nats"
    x = alt.X("step:Q", title="step", axis=alt.Axis(format=",d", grid=False, tickMinStep=1))
    series = {"x": x, "color": design_colour(losses), "detail": "run:N"}
    band = alt.Chart(losses).mark_area(fillOpacity=0.2, clip=True)
    floor = alt.Chart(losses).mark_line(strokeDash=DASH, strokeWidth=1.5, clip=True)
    line = alt.Chart(losses).mark_line(strokeWidth=1.8, clip=True)
    hints = [hint(column, words) for column, words in drawing.columns.items()]
    drawn = line.encode(
        **series,
        y=number_axis("loss", title),
        opacity=faded(0.9),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("step:Q"), *hints],
    )
    return layered(
        band.encode(**series, y=number_axis("low", title), y2="high:Q", opacity=faded(1)),
        floor.encode(**series, y=number_axis("loss_floor", title), opacity=faded(0.9)),
        drawn.add_params(chosen(), zoom(), *steering(losses, drawing)),
    )


def heat(heats: Table) -> alt.LayerChart:
    """The gradient norm by layer and step: a strip per run and layer."""
    limit = alt.ExprRef("max(140, min(420, (containerSize()[0] || 1000) * 0.45))")
    y = alt.Y("bar:N", title=None, sort=None, axis=alt.Axis(labelLimit=limit, ticks=False))
    x = alt.X("step:Q", title="step", axis=alt.Axis(format=",d"), scale=alt.Scale(nice=False))
    colour = alt.Color(
        "shown:Q", title="log10 |dL/dy|", scale=alt.Scale(scheme="viridis"), legend=alt.Legend()
    )
    hints = [
        alt.Tooltip("bar:N", title="run"),
        alt.Tooltip("step:Q"),
        hint("log10_grad_norm", "log10 |dL/dy|"),
    ]
    shown = f"clamp(datum.log10_grad_norm, {COLDEST}, {HOTTEST})"
    cells = alt.Chart(heats).transform_calculate(shown=shown).mark_rect()
    encoded = cells.encode(x=x, x2="until:Q", y=y, color=colour, tooltip=hints)
    return layered(encoded).properties(height=BAR * heats["bar"].n_unique())


TRAINING_CHARTS: dict[str, Drawing] = {
    "loss": Drawing(
        "Loss over the steps",
        "Cross-entropy of batches that were not seen before, the mean over the seeds; the band "
        "spans them. The dashed line is the smallest loss that any model can have.",
        "losses",
        {"loss": "loss", "low": "lowest seed", "high": "highest seed", "loss_floor": "floor"},
        loss,
        near=8,
        seen=(0, 1),
    ),
    "heat": Drawing(
        "Gradient norm by layer and step",
        "The input on top, the last layer below, steps to the right. A dark strip gets little "
        "gradient. Gaps are gradients that are zero or not finite.",
        "heats",
        {"log10_grad_norm": "log10 |dL/dy|"},
        heat,
        bars=True,
    ),
}

# Those of training are shown where there was some.
ALL_CHARTS = CHARTS | TRAINING_CHARTS
