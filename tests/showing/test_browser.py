"""The page in a real browser: it loads in silence, filters, sorts, draws; text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser, chromium
from PIL import Image
from records import ENVIRONMENT, layer_rows, run_of, spec_of

from gradflow.runs import store
from gradflow.runs.results import read_results
from gradflow.showing.page import report
from gradflow.showing.page.chart_parts import DARK, LIGHT
from gradflow.showing.page.charts import CHARTS
from gradflow.specs.run_options import RunOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        chromium() is None, reason="no Chromium: apt-get install chromium to run these tests"
    ),
]
NASTY = "<script>document.title='owned'</script><b>\"'&amp;"
TIMES = {"forward_s": 1e-3, "forward_s_iqr": 1e-4, "backward_s": 2e-3, "backward_s_iqr": 1e-4}


def save(out: Path, slope: float, warning: str = "", **options: Any) -> None:
    spec = spec_of(**options)
    units = spec.depth * spec.units_per_block
    rows = []
    for seed in range(2):
        logs = [slope * (units - i) + 0.1 * seed for i in range(units + 1)]
        places = range(1, units + 1)
        times = {name: dict.fromkeys(places, value) for name, value in TIMES.items()}
        theory = {f"theory_log10_grad_norm{end}": slope for end in ("", "_low", "_high")}
        made = {"act_cos": 0.5, "grad_cos": 0.1, **theory, **times}
        rows += list(layer_rows(spec, logs, seed, **made))
    run = run_of(spec, rows, options=RunOptions(seeds=2), warnings=(warning,) if warning else ())
    environment = ENVIRONMENT | {"device_name": NASTY}
    store.save(replace(run, environment=environment), out)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    for depth in (4, 8):
        save(out, 0.0, depth=depth, warning=NASTY)
        save(out, 1.0, depth=depth, norm="none")
        save(out, -0.5, depth=depth, norm="none", shortcut="plain")
    save(out, 0.1, depth=4, block="transformer")
    save(out, 40.0, depth=12, block="transformer", norm="none")
    (out / NASTY.replace("/", "\\")).mkdir()
    page = out / "report.html"
    report.write_page(read_results(out), page)
    return page


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(tab: Page, file: Path) -> Page:
    tab.look()
    tab.open(file)
    return tab


def image(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def has_colour(picture: np.ndarray, colour: str, pixels: int = 20) -> bool:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(picture - rgb).max(axis=-1) < 25).sum() >= pixels)


def listed(page: Page) -> list[str]:
    found: list[str] = page.js(
        "[...document.querySelectorAll('#table tbody tr:not([hidden]) label')]"
        ".map((label) => label.textContent)"
    )
    return found


def column(page: Page, number: int) -> list[str]:
    found: list[str] = page.js(
        "[...document.querySelectorAll('#table tbody tr')]"
        f".map((r) => r.cells[{number}].textContent)"
    )
    return found


def marks(page: Page, chart: str, kind: str = "mark-line") -> int:
    found: int = page.js(f"document.querySelectorAll('#{chart} .{kind} path').length")
    return found


def centre(page: Page, expression: str) -> tuple[float, float]:
    """Where the middle of an element is in the window, once it is in sight."""
    page.js(f"({expression}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = page.js(
        f"(() => {{ const r = ({expression}).getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    return box[0], box[1]


# Silence


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_loads_in_silence(tab: Page, file: Path, scheme: str, width: int) -> None:
    tab.look(width=width, scheme=scheme)
    tab.open(file)
    assert tab.complaints() == []
    assert tab.requests() == [file.as_uri()]
    assert tab.js("document.documentElement.scrollWidth") <= width  # nothing sticks out


def test_silence_would_be_broken(page: Page, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    address = (tmp_path / "picture.png").as_uri()
    page.js(f"document.body.append(Object.assign(new Image(), {{src: {address!r}}}))")
    page.js("console.error('a complaint')")
    page.wait("true")
    complaints = " ".join(page.complaints())
    assert "a complaint" in complaints
    assert "Content Security Policy" in complaints  # which stops the picture


def test_names_are_shown_as_text(page: Page) -> None:
    assert page.js("document.title").startswith("Gradient flow: In ")
    assert page.js("document.querySelectorAll('script').length") == 3
    text = page.js("document.body.innerText")
    assert text.count(NASTY) == 3  # two warnings and the device
    assert page.js("document.querySelectorAll('main b').length") == 0


# Charts


@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_no_picture_is_blank(tab: Page, file: Path, scheme: str, palette: tuple[str, ...]) -> None:
    tab.look(scheme=scheme)
    tab.open(file)
    for name in CHARTS:
        picture = image(tab.picture(f"#{name} .picture"))
        assert len(np.unique(picture @ [65536, 256, 1])) > 100, name
        for colour in palette[:2] if name == "time" else palette[:4]:
            assert has_colour(picture, colour), (name, colour)
        background = picture[0, 0]
        assert (background.mean() > 128) == (scheme == "light"), name


def test_one_line_per_run_and_kind_of_unit(page: Page) -> None:
    assert marks(page, "depth") == 5  # designs
    bands, lines = marks(page, "gradient", "mark-area"), marks(page, "gradient")
    assert (bands, lines) == (16, 16)  # runs; with as many lines and bands of theory
    assert marks(page, "skip-gain") >= 8


def test_a_point_shows_its_values(page: Page) -> None:
    x, y = centre(page, "document.querySelector('#gradient .mark-symbol.role-mark path')")
    page.mouse("mouseMoved", x - 30, y - 30)
    page.mouse("mouseMoved", x, y)
    page.wait("document.querySelector('#vg-tooltip-element.visible')")
    shown = page.js("document.querySelector('#vg-tooltip-element').innerText")
    for part in ("run", "layer", "unit", "log10 |dL/dy|", "theory", "depth"):
        assert part in shown
    page.mouse("mouseMoved", 5, 5)
    page.wait("!document.querySelector('#vg-tooltip-element.visible')")


def opacities(page: Page, chart: str) -> list[float]:
    found: list[float] = page.js(
        f"[...document.querySelectorAll('#{chart} .mark-line path')]"
        ".map((p) => Number(getComputedStyle(p).opacity))"
    )
    return found


def test_a_click_in_a_legend_chooses_in_all_charts(page: Page) -> None:
    before = {name: opacities(page, name) for name in ("gradient", "activation", "depth")}
    assert all(min(found) > 0.5 for found in before.values())
    label = "document.querySelectorAll('#gradient .role-legend-label text')[1]"
    page.click(*centre(page, label))
    for name in before:
        page.wait(
            f"[...document.querySelectorAll('#{name} .mark-line path')]"
            ".some((p) => Number(getComputedStyle(p).opacity) < 0.1)"
        )
        assert max(opacities(page, name)) > 0.5


def test_the_wheel_zooms_with_ctrl_only(page: Page) -> None:
    def ticks() -> str:
        return str(page.js("document.querySelector('#gradient .role-axis-label').textContent"))

    where = centre(page, "document.querySelector('#gradient .picture')")
    before = ticks()
    page.mouse("mouseWheel", *where, deltaX=0, deltaY=200)
    page.js("new Promise((done) => setTimeout(done, 300))")
    assert ticks() == before
    where = centre(page, "document.querySelector('#gradient .picture')")
    page.mouse("mouseWheel", *where, deltaX=0, deltaY=-400, modifiers=2)
    page.wait(f"document.querySelector('#gradient .role-axis-label').textContent !== {before!r}")


def test_far_out_runs_are_named(page: Page) -> None:
    note = page.js("document.querySelector('#gradient .note').textContent")
    assert "Beyond the picture: residual transformer, no norm, depth 12." in note


def test_unticked_runs_are_not_drawn(page: Page) -> None:
    bands = marks(page, "gradient", "mark-area")
    page.js("document.querySelector('#table tbody input').click()")
    left = bands - 2  # that of its seeds, and that of theory
    page.wait(f"document.querySelectorAll('#gradient .mark-area path').length === {left}")
    assert page.complaints() == []


def test_the_numbers_of_a_chart_are_a_table(page: Page) -> None:
    page.js("document.querySelector('#gradient details summary').click()")
    page.wait("document.querySelector('#gradient details table')")
    cells = page.js(
        "[...document.querySelectorAll('#gradient details tr')]"
        ".map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert cells[0][:4] == ["run", "layer", "unit", "log10 |dL/dy|"]
    rows = {(row[0], row[1]): row for row in cells[1:]}
    # slope -0.5 over 8 layers, and the mean of two seeds 0.1 apart
    assert float(rows["plain mlp, no norm, depth 8", "0"][3]) == pytest.approx(-3.95)
    assert float(rows["plain mlp, no norm, depth 8", "8"][3]) == pytest.approx(0.05)
    label = page.js("document.querySelector('#gradient .picture').getAttribute('aria-label')")
    assert re.fullmatch(
        r"Gradient norm over the layers\. 8 runs; log10 \|dL/dy\| from -3\.95 to 960\.05\."
        r" The numbers are in the table below\.",
        label,
    )


# The table


def test_the_text_filter_filters(page: Page) -> None:
    everything = listed(page)
    page.js("document.getElementById('find').focus()")
    page.type("PLAIN vanishes")
    assert listed(page) == ["plain mlp, no norm"]
    assert page.js("document.getElementById('listed').textContent") == "1 of 8 runs listed"
    page.js(
        "{ const f = document.getElementById('find'); f.value = ''; "
        "f.dispatchEvent(new Event('input')); }"
    )
    assert listed(page) == everything


def test_the_verdict_filter_filters(page: Page) -> None:
    page.js(
        "{ const v = document.getElementById('verdict'); v.value = 'exploding';"
        " v.dispatchEvent(new Event('change')); }"
    )
    assert set(listed(page)) == {"residual mlp, no norm", "residual transformer, no norm"}
    page.click(*centre(page, "document.getElementById('draw')"))
    page.wait("document.querySelectorAll('#gradient .mark-area path').length === 6")


def test_headings_sort_by_keyboard(page: Page) -> None:
    assert page.js("document.querySelectorAll('#table [aria-sort=none]').length") == 8
    page.js("document.querySelectorAll('#table th button')[4].focus()")
    page.press("Enter", 13)
    decades = [float(text) for text in column(page, 4) if text]
    assert decades == sorted(decades)
    heading = "document.querySelectorAll('#table thead th')[4].getAttribute('aria-sort')"
    assert page.js(heading) == "ascending"
    page.press("Enter", 13)
    assert [float(text) for text in column(page, 4) if text] == decades[::-1]
    assert page.js(heading) == "descending"
    page.js("document.querySelectorAll('#table th button')[3].click()")
    depths = [int(text) for text in column(page, 3)]
    assert depths == sorted(depths)
    assert page.js(heading) == "none"


def test_the_prime_of_the_equation_stands_on_the_row_of_its_letter(page: Page) -> None:
    """As a superscript under a brace Chromium puts it far above."""
    leaves = "[...document.querySelectorAll('math munder *')].filter(e => !e.children.length)"
    tops = {
        letter: page.js(
            f"{leaves}.find(e => e.textContent === '{letter}').getBoundingClientRect().top"
        )
        for letter in ("\u2032", "f", "x")
    }
    assert abs(tops["\u2032"] - tops["f"]) <= abs(tops["x"] - tops["f"]) + 1


def test_text_columns_sort_as_text(page: Page) -> None:
    page.js("document.querySelectorAll('#table th button')[2].click()")
    verdicts = column(page, 2)
    assert verdicts == sorted(verdicts)


def test_everything_can_be_reached_by_keyboard(page: Page) -> None:
    reached = set()
    for _ in range(60):
        page.press("Tab", 9)
        reached.add(
            page.js(
                "(() => { const e = document.activeElement;"
                " return e.id || e.className || e.tagName; })()"
            )
        )
    assert {"skip", "A", "find", "verdict", "draw", "BUTTON", "scroll tall", "SUMMARY"} <= reached


def test_the_page_can_be_printed(page: Page) -> None:
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    page.look(media="print")
    assert page.js("getComputedStyle(document.querySelector('.filters')).display") == "none"
    assert page.js("getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"


def test_the_page_works_where_nothing_was_timed(tab: Page, tmp_path: Path) -> None:
    store.save(run_of(), tmp_path)
    file = tmp_path / "report.html"
    report.write_page(read_results(tmp_path), file)
    tab.look()
    tab.open(file)
    assert tab.complaints() == []
    note = tab.js("document.querySelector('#time .note').textContent")
    assert note == "None of the drawn runs has these numbers."
    assert tab.js("getComputedStyle(document.querySelector('#time .picture')).display") == "none"
