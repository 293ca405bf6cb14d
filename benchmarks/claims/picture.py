"""The chart of predicted against measured profiles: one small panel per scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import polars as pl

from claims.predicted import Held
from gradflow.showing.page.chart_parts import themed

COLUMNS, WIDTH, HEIGHT = 6, 100, 80
TITLE = "Gradient by layer, measured and predicted, for every scheme with a theory"


def picture(held: Sequence[Held]) -> Any:
    """Measured profiles as points, predicted ones as lines, in decades of |g|."""
    shown = [each for each in held if each.init == "he, relu" and not each.spec.causal]
    rows = pl.DataFrame([row for each in shown for row in _rows(each)])
    scale = alt.Scale(domain=["measured", "theory"])
    x = alt.X("layer:Q", title="layer", axis=alt.Axis(values=[0, 12, 24], grid=False))
    y = alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=4))
    colour = alt.Color("kind:N", title=None, scale=scale)
    points = alt.Chart(rows).mark_point(size=14, filled=True).transform_filter("datum.mark")
    lines = alt.Chart(rows).mark_line(strokeWidth=1.6).transform_filter("!datum.mark")
    layers = alt.layer(lines.encode(x=x, y=y, color=colour), points.encode(x=x, y=y, color=colour))
    names = [each.scheme for each in shown]
    facet = alt.Facet("scheme:N", title=None, sort=names, header=alt.Header(labelFontSize=12))
    panels = layers.properties(width=WIDTH, height=HEIGHT).facet(facet, columns=COLUMNS)
    return themed(panels.properties(title=alt.TitleParams(TITLE, subtitle="log10 |dL/dy|")))


def _rows(held: Held) -> Iterator[dict[str, Any]]:
    """A point at the input and after every second layer, a line through all rows."""
    units = held.spec.units_per_block
    for place, value in enumerate(held.told.log10_grad_norm or ()):
        row = {"scheme": held.scheme, "layer": place / units}
        yield {**row, "kind": "theory", "value": value, "mark": False}
        if place % (2 * units) == 0:
            mean = float(held.profiles[:, place].mean())
            yield {**row, "kind": "measured", "value": mean, "mark": True}
