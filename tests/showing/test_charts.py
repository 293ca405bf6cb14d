"""Charts: valid, not blank, readable by everybody; and their tables and axes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from records import layer_rows, run_of, spec_of

from gradflow.runs import store
from gradflow.runs.records import LayerRecord
from gradflow.runs.results import read_results
from gradflow.showing.page.chart_parts import (
    CHART_WIDTH,
    DARK,
    LIGHT,
    MARK_SHAPES,
    picture_of,
    power_of_ten,
)
from gradflow.showing.page.chart_tables import FAR, axis_ends, chart_tables
from gradflow.showing.page.charts import CHARTS
from gradflow.showing.sentences import design_by_design
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

PAGE_DARK = "#15181d"
TIMES = {"forward_s": 1e-3, "forward_s_iqr": 1e-4, "backward_s": 2e-3, "backward_s_iqr": 1e-4}

NO_TIMES: dict[str, Any] = dict.fromkeys(TIMES)


def rows(spec: StackSpec, slope: float, seeds: int = 2, **columns: Any) -> list[LayerRecord]:
    units = spec.depth * spec.units_per_block
    found: list[LayerRecord] = []
    for seed in range(seeds):
        profile = [slope * (units - i) + 0.1 * seed for i in range(units + 1)]
        found += layer_rows(spec, profile, seed, **columns)
    return [replace(row, **NO_TIMES) if row.layer == 0 else row for row in found]


def found_tables(out: Path, *specs: tuple[StackSpec, float], **columns: Any) -> dict[str, Any]:
    for spec, slope in specs:
        given = {"act_cos": 0.5, "grad_cos": 0.1, **TIMES} | columns
        store.save(run_of(spec, rows(spec, slope, **given), options=RunOptions(seeds=2)), out)
    results = read_results(out)
    return chart_tables(results, design_by_design(results))


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, pl.DataFrame]:
    return found_tables(
        tmp_path,
        (spec_of(depth=6), -0.5),
        (spec_of(depth=12), -0.5),
        (spec_of(depth=12, shortcut="plain", norm="none"), 0.25),
        (spec_of(depth=6, block="transformer"), 0.0),
        theory_log10_grad_norm=-1.0,
    )


def pixels(name: str, table: pl.DataFrame) -> np.ndarray:
    png = vl_convert.vegalite_to_png(picture_of(CHARTS[name], table).to_json())
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def share_of(image: np.ndarray, colour: str) -> float:
    """How many pixels have nearly this colour, per million."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(image.astype(int) - rgb).max(axis=-1) < 12).mean() * 1e6)


# Every chart


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_draws_every_design_in_its_colour(
    name: str, drawn: dict[str, pl.DataFrame]
) -> None:
    image = pixels(name, drawn[CHARTS[name].table])
    colours = LIGHT[:2] if name == "time" else LIGHT[:3]
    for colour in colours:
        assert share_of(image, colour) > 50, colour
    assert image.shape[1] > CHART_WIDTH


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_of_one_point_is_valid(name: str, tmp_path: Path) -> None:
    found = found_tables(tmp_path, (spec_of(depth=1), 0.0))
    spec = picture_of(CHARTS[name], found[CHARTS[name].table]).to_dict()
    assert spec["title"]["text"] == CHARTS[name].title


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_without_values_is_valid(name: str, tmp_path: Path) -> None:
    empty = dict.fromkeys(("act_rms", "act_cos", "grad_cos", "skip_gain", *TIMES), None)
    found = found_tables(tmp_path, (spec_of(), math.nan), **empty)
    vl_convert.vegalite_to_vega(picture_of(CHARTS[name], found[CHARTS[name].table]).to_dict())


def test_the_band_spans_the_seeds_and_theory_is_dashed(drawn: dict[str, pl.DataFrame]) -> None:
    layers = picture_of(CHARTS["gradient"], drawn["units"]).to_dict()["layer"]
    expected, band, theory, line, _ = layers
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]["field"]) == ("low", "high")
    ends = [expected["encoding"][axis]["field"] for axis in ("y", "y2")]
    assert ends == ["theory_log10_grad_norm_low", "theory_log10_grad_norm_high"]
    assert expected["mark"]["fillOpacity"] < band["mark"]["fillOpacity"]
    assert theory["mark"]["strokeDash"]
    assert "strokeDash" not in line["mark"]


def test_a_line_is_a_run_and_its_colour_a_design(drawn: dict[str, pl.DataFrame]) -> None:
    *_, line, points = picture_of(CHARTS["gradient"], drawn["units"]).to_dict()["layer"]
    assert line["encoding"]["detail"]["field"] == "run"
    for channel in ("color", "shape"):
        assert points["encoding"][channel]["field"] == "design"
    shown = {hint["field"] for hint in points["encoding"]["tooltip"]}
    assert {"run", "layer", "unit", "log10_grad_norm", "low", "high"} <= shown


def test_attention_and_ffn_have_dashes_of_their_own(drawn: dict[str, pl.DataFrame]) -> None:
    line = picture_of(CHARTS["branch-gain"], drawn["units"]).to_dict()["layer"][0]
    dashes = line["encoding"]["strokeDash"]
    assert dashes["legend"]["values"] == ["attention", "ffn"]
    by_unit = dict(zip(dashes["scale"]["domain"], dashes["scale"]["range"], strict=True))
    assert by_unit["ffn"] != by_unit["attention"] == by_unit["mlp"]


def test_stacks_of_one_unit_have_no_legend_of_units(tmp_path: Path) -> None:
    units = found_tables(tmp_path, (spec_of(), 0.0))["units"]
    line = picture_of(CHARTS["skip-gain"], units).to_dict()["layer"][0]
    assert line["encoding"]["strokeDash"]["legend"] is None


# Tables


def test_marks_are_few_and_at_both_ends(drawn: dict[str, pl.DataFrame]) -> None:
    for _, run in drawn["units"].group_by("number"):
        assert run["mark"][0]
        assert run["mark"][-1]
        assert run["mark"].sum() <= 10


def test_times_are_medians_in_milliseconds(drawn: dict[str, pl.DataFrame]) -> None:
    times = drawn["times"]
    assert set(times.filter(pl.col("pass") == "forward")["ms"]) == {1.0}
    assert set(times.filter(pl.col("pass") == "backward")["ms"]) == {2.0}
    bars = times.filter(pl.col("unit") == "ffn")["bar"].unique().to_list()
    assert [bar.endswith(": ffn") for bar in bars] == [True]
    assert not any(": mlp" in bar for bar in times["bar"])


def test_a_run_without_times_has_no_bar(tmp_path: Path) -> None:
    found = found_tables(tmp_path, (spec_of(), 0.0), **dict.fromkeys(TIMES, None))
    assert found["times"].is_empty()


# Axes


def spread(*reaches: float) -> pl.DataFrame:
    return pl.DataFrame({"number": range(len(reaches)), "y": reaches})


def test_far_out_runs_are_left_outside() -> None:
    assert axis_ends(spread(1, -2, 3, 400), ["y"], 12, (-0.5, 0.5)) == (-2, 3)
    assert axis_ends(spread(1, -2, 3, 400), ["y"], None, (-0.5, 0.5)) == (-2, 400)


def test_what_is_near_is_never_far_out() -> None:
    assert axis_ends(spread(0.1, 0.1, 0.1, 11.9), ["y"], 12, (0, 1)) == (0, 11.9)


def test_where_all_are_far_out_none_is() -> None:
    assert axis_ends(spread(400, 500), ["y"], 12, (-0.5, 0.5)) == (-0.5, 500)
    assert axis_ends(spread(), ["y"], 12, (-0.5, 0.5)) == (-0.5, 0.5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0.1, 100))
def test_at_least_half_of_the_runs_are_in_the_picture(values: list[float], near: float) -> None:
    low, high = axis_ends(spread(*values), ["y"], near, (0, 1))
    assert low <= 0 < 1 <= high
    assert 2 * sum(low <= value <= high for value in values) >= len(values)
    inner = [value for value in values if abs(value) <= near]
    assert all(low <= value <= high for value in inner)
    assert max(-low, high) <= max(1, near, FAR * max(map(abs, values)))


@pytest.mark.parametrize(
    ("exponent", "label"),
    [(0, "10⁰"), (-12, "10⁻¹²"), (414, "10⁴¹⁴"), (-0.5, "0.32"), (0.2, "1.6"), (3, "10³")],
)
def test_labels_are_powers_of_ten(exponent: float, label: str) -> None:
    axis = {"labelExpr": power_of_ten("datum.value"), "values": [exponent]}
    y = {"field": "y", "type": "quantitative", "axis": axis, "scale": {"zero": False}}
    data = {"values": [{"y": exponent}, {"y": exponent - 1}]}
    svg = vl_convert.vegalite_to_svg({"data": data, "mark": "point", "encoding": {"y": y}})
    assert f">{label}<" in svg


# Colours


def linear(colour: str) -> np.ndarray:
    """Linear light of an sRGB colour (IEC 61966-2-1)."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """Contrast ratio (WCAG 2.2)."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


# Machado, Oliveira, Fernandes 2009, severity 1: what is left of linear light.
SIGHTS = {
    "all colours": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x = np.array(to_xyz) @ light / [0.9505, 1, 1.089]
    f = np.where(x > 0.008856, np.cbrt(np.clip(x, 0, None)), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("palette", "paper"), [(LIGHT, "#ffffff"), (DARK, PAGE_DARK)])
def test_lines_stand_out_from_the_page(palette: Sequence[str], paper: str) -> None:
    assert min(contrast(colour, paper) for colour in palette) >= 3  # WCAG 1.4.11


@pytest.mark.parametrize("palette", [LIGHT, DARK])
@pytest.mark.parametrize("sight", SIGHTS)
def test_lines_can_be_told_apart(palette: Sequence[str], sight: str) -> None:
    seen = [lab(np.clip(SIGHTS[sight] @ linear(colour), 0, 1)) for colour in palette]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


def test_colour_and_shape_together_tell_many_designs_apart() -> None:
    many = len(LIGHT) * len(MARK_SHAPES)
    pairs = {(LIGHT[i % len(LIGHT)], MARK_SHAPES[i % len(MARK_SHAPES)]) for i in range(many)}
    assert len(pairs) == many
    assert len(LIGHT) == len(DARK)
