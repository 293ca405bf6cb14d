"""Charts of many runs: a data frame in, an Altair chart out; nothing is drawn or written here.

Every chart takes one of the tables of `chart_tables`, all of which have the columns `run` and
`design`, so that a page can exchange the rows of all charts at once. A design has one colour and
one shape; runs of one design differ in depth, and that is where their lines end.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from gradflow.showing.page.chart_parts import (
    BAR,
    DASHED,
    Drawing,
    design_colour,
    design_shape,
    faded,
    hint,
    layer_axis,
    layered,
    number_axis,
    power_axis,
)

# Gradients beyond these powers of ten share a colour, or one dead run would hide the others.
_COLDEST, _HOTTEST = -12, 6


def _gradient(drawing: Drawing, units: pl.DataFrame) -> alt.LayerChart:
    """The gradient norm over the layers: a line per run with its seeds, theory with its band."""
    title = "gradient norm |dL/dy|"
    y = power_axis(drawing.value, title)
    series = {
        "x": layer_axis(),
        "color": design_colour(units),
        "detail": "run:N",
        "opacity": faded(1),
    }
    theory = alt.Chart(units).mark_line(strokeDash=[2, 5], strokeWidth=3, clip=True)
    expected = alt.Chart(units).mark_area(fillOpacity=0.08, clip=True)
    band = alt.Chart(units).mark_area(fillOpacity=0.2, clip=True)
    low, high = (f"theory_log10_grad_norm_{end}" for end in ("low", "high"))
    return layered(
        expected.encode(**series, y=power_axis(low, title), y2=f"{high}:Q"),
        band.encode(**series, y=power_axis("low", title), y2="high:Q"),
        theory.encode(**series, y=power_axis("theory_log10_grad_norm", title)),
        *_lines(drawing, units, y),
    )


def _values(drawing: Drawing, units: pl.DataFrame) -> alt.LayerChart:
    """One line per run over the layers."""
    y = number_axis(drawing.value, drawing.columns[drawing.value])
    return layered(*_lines(drawing, units, y))


def _values_by_unit(drawing: Drawing, units: pl.DataFrame) -> alt.LayerChart:
    """One line per run and kind of unit: attention and ffn have gains of their own."""
    kinds = units["unit"].unique(maintain_order=True).to_list()
    two = {"attention", "ffn"} <= set(kinds)
    scale = alt.Scale(domain=kinds, range=[DASHED if two and k == "ffn" else [1, 0] for k in kinds])
    legend = alt.Legend(orient="top", symbolType="stroke", values=["attention", "ffn"])
    dash = alt.StrokeDash("unit:N", title=None, scale=scale, legend=legend if two else None)
    y = number_axis(drawing.value, drawing.columns[drawing.value])
    return layered(*_lines(drawing, units, y, strokeDash=dash))


def _activation(drawing: Drawing, units: pl.DataFrame) -> alt.LayerChart:
    """The size of the stream over the layers."""
    return layered(*_lines(drawing, units, power_axis(drawing.value, "root mean square of y")))


def _depth(drawing: Drawing, depths: pl.DataFrame) -> alt.LayerChart:
    """The total gain against depth, a line per design; dashed lines bound what is healthy."""
    ticks = sorted(depths["depth"].unique())
    x = alt.X(
        "depth:Q", title="depth in layers", scale=alt.Scale(type="log", nice=False, padding=12)
    )
    title = "|dL/d(input)| / |dL/d(output)|"
    rules = [
        alt.Chart(depths)
        .mark_rule(strokeDash=[4, 4], strokeOpacity=0.6, clip=True)
        .encode(y=alt.Y(bound, title=title))
        for bound in ("min(vanishing):Q", "max(exploding):Q")
    ]
    series = {
        "x": x.axis(values=ticks, format=",d", grid=False),
        "y": power_axis("total_log10_gain", title),
        "color": design_colour(depths),
    }
    line = alt.Chart(depths).mark_line(clip=True)
    point = alt.Chart(depths).mark_point(size=60, filled=True, clip=True)
    hints = [alt.Tooltip("run:N"), alt.Tooltip("verdict:N"), hint("total_log10_gain", "decades")]
    points = point.encode(**series, shape=design_shape(depths), opacity=faded(1), tooltip=hints)
    line = line.encode(**series, opacity=faded(0.9))
    return layered(*rules, line, drawing.steered(points, depths))


def _time(_: Drawing, times: pl.DataFrame) -> alt.LayerChart:
    """The time of one unit, forward and backward: the median over the layers."""
    x = alt.X("ms:Q", title="milliseconds per unit", axis=alt.Axis(format="~g", tickCount=8))
    colour = alt.Color("pass:N", title=None, sort=["forward", "backward"])
    hints = [alt.Tooltip("bar:N", title="run"), alt.Tooltip("pass:N"), hint("ms", "ms")]
    bars = alt.Chart(times).mark_bar(height=alt.RelativeBandSize(0.7))
    order = alt.Order("pass:N", sort="descending")
    encoded = bars.encode(x=x, y=_bar_axis(), color=colour, order=order, tooltip=hints)
    return layered(encoded).properties(height=BAR * times["bar"].n_unique())


def _bar_axis() -> alt.Y:
    """A line of text for each bar, on a page at most about half of its width."""
    limit = alt.ExprRef("max(140, min(420, (containerSize()[0] || 1000) * 0.45))")
    return alt.Y("bar:N", title=None, sort=None, axis=alt.Axis(labelLimit=limit, ticks=False))


def _lines(
    drawing: Drawing, units: pl.DataFrame, y: alt.Y, **of_lines: Any
) -> tuple[alt.Chart, alt.Chart]:
    """A line per run with a few marks on it; all its points appear under the pointer."""
    series = {"x": layer_axis(), "y": y, "color": design_colour(units)}
    line = alt.Chart(units).mark_line(strokeWidth=1.8, clip=True)
    point = alt.Chart(units).mark_point(size=45, filled=True, clip=True)
    hover = alt.selection_point(
        name="hover", fields=["run"], on="pointerover", clear="pointerout", empty=False
    )
    # A dictionary, because Altair's own `|` forgets that an empty hover selects nothing.
    marked = {"or": ["datum.mark", {"param": "hover", "empty": False}]}
    seen = {"test": {"and": [{"param": "chosen"}, marked]}, "value": 1}
    where = [alt.Tooltip("run:N"), alt.Tooltip("layer:Q", format=",d"), alt.Tooltip("unit:N")]
    points = point.encode(
        **series,
        shape=design_shape(units),
        opacity=alt.OpacityValue(0, condition=seen),
        tooltip=[*where, *drawing.hints()],
    )
    return (
        line.encode(**series, **of_lines, detail="run:N", opacity=faded(0.9)),
        drawing.steered(points, units, hover),
    )


def _loss(drawing: Drawing, losses: pl.DataFrame) -> alt.LayerChart:
    """The loss over the steps: a line per run, a band over its seeds, its floor dashed."""
    title = "cross-entropy in nats"
    x = alt.X("step:Q", title="step", axis=alt.Axis(format=",d", grid=False, tickMinStep=1))
    series = {"x": x, "color": design_colour(losses), "detail": "run:N"}
    band = alt.Chart(losses).mark_area(fillOpacity=0.2, clip=True)
    floor = alt.Chart(losses).mark_line(strokeDash=DASHED, strokeWidth=1.5, clip=True)
    line = alt.Chart(losses).mark_line(strokeWidth=1.8, clip=True)
    drawn = line.encode(
        **series,
        y=number_axis("loss", title),
        opacity=faded(0.9),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("step:Q"), *drawing.hints()],
    )
    return layered(
        band.encode(**series, y=number_axis("low", title), y2="high:Q", opacity=faded(1)),
        floor.encode(**series, y=number_axis("loss_floor", title), opacity=faded(0.9)),
        drawing.steered(drawn, losses),
    )


def _heat(_: Drawing, heats: pl.DataFrame) -> alt.LayerChart:
    """The gradient norm by layer and step: a strip per run and layer."""
    x = alt.X("step:Q", title="step", axis=alt.Axis(format=",d"), scale=alt.Scale(nice=False))
    colour = alt.Color(
        "shown:Q", title="log10 |dL/dy|", scale=alt.Scale(scheme="viridis"), legend=alt.Legend()
    )
    hints = [
        alt.Tooltip("bar:N", title="run"),
        alt.Tooltip("step:Q"),
        hint("log10_grad_norm", "log10 |dL/dy|"),
    ]
    shown = f"clamp(datum.log10_grad_norm, {_COLDEST}, {_HOTTEST})"
    cells = alt.Chart(heats).transform_calculate(shown=shown).mark_rect()
    encoded = cells.encode(x=x, x2="until:Q", y=_bar_axis(), color=colour, tooltip=hints)
    return layered(encoded).properties(height=BAR * heats["bar"].n_unique())


CHARTS: dict[str, Drawing] = {
    "gradient": Drawing(
        "Gradient norm over the layers",
        "The gradient enters at the last layer, on the right, and goes back to the input, on the "
        "left. A flat line keeps its size; a slope is a factor in every layer. The band spans the "
        "seeds; a thick dotted line is theory, and the pale band what it expects of one seed.",
        "units",
        {
            "log10_grad_norm": "log10 |dL/dy|",
            "low": "lowest seed",
            "high": "highest seed",
            "theory_log10_grad_norm": "theory",
        },
        _gradient,
        near=12,
        seen=(-0.5, 0.5),
    ),
    "skip-gain": Drawing(
        "Skip gain: the 1",
        "The part of the gradient that passes a unit by its shortcut. It is 1 for a plain "
        "identity and 0 without a shortcut.",
        "units",
        {"skip_gain": "skip gain"},
        _values_by_unit,
        near=4,
    ),
    "branch-gain": Drawing(
        "Branch gain: the f\u2032",
        "The part of the gradient that passes a unit through its branch. In a deep residual stack "
        "it has to stay well below 1.",
        "units",
        {"branch_gain": "branch gain"},
        _values_by_unit,
        near=4,
    ),
    "depth": Drawing(
        "Total gain against depth",
        "How much larger or smaller the gradient at the input is than at the output. A straight "
        "fall or rise is exponential in depth; dashed lines bound the healthy range.",
        "depths",
        {"total_log10_gain": "log10 of the total gain"},
        _depth,
        near=12,
        seen=(-0.5, 0.5),
    ),
    "token-cosine": Drawing(
        "Cosine between tokens",
        "How alike the tokens of one sample are (samples, where there are no tokens). Near 1 all "
        "carry the same: the rank has collapsed.",
        "units",
        {"act_cos": "cosine between tokens"},
        _values,
    ),
    "gradient-cosine": Drawing(
        "Cosine between the gradients of samples",
        "How much the samples agree on the direction. Near 0 in early layers the gradient is "
        "noise: it has shattered.",
        "units",
        {"grad_cos": "cosine between gradients"},
        _values,
    ),
    "activation": Drawing(
        "Growth of the activations",
        "The root mean square of the stream after each unit. Fast growth drowns the branches of "
        "later layers and may leave the number format.",
        "units",
        {"log10_act_rms": "log10 rms of y"},
        _activation,
        near=12,
        seen=(-0.5, 0.5),
    ),
    "time": Drawing(
        "Time per unit",
        "Median over the layers, forward and backward. Compare only runs that were measured in "
        "the same environment.",
        "times",
        {"ms": "milliseconds"},
        _time,
        bars=True,
    ),
}
TRAINING_CHARTS: dict[str, Drawing] = {
    "loss": Drawing(
        "Loss over the steps",
        "Cross-entropy of batches that were not seen before, the mean over the seeds; the band "
        "spans them. The dashed line is the smallest loss that any model can have.",
        "losses",
        {"loss": "loss", "low": "lowest seed", "high": "highest seed", "loss_floor": "floor"},
        _loss,
        near=8,
        seen=(0, 1),
    ),
    "heat": Drawing(
        "Gradient norm by layer and step",
        "The input on top, the last layer below, steps to the right. A dark strip gets little "
        "gradient. Gaps are gradients that are zero or not finite.",
        "heats",
        {"log10_grad_norm": "log10 |dL/dy|"},
        _heat,
        bars=True,
    ),
}

# A chart of training is shown only where there was a training.
ALL_CHARTS = CHARTS | TRAINING_CHARTS
