"""`gradflow report`: one safe page of any size of results, pictures, words; and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from records import ENVIRONMENT, layer_rows, run_of, spec_of
from rich.console import Console

from gradflow.cli.app import run_app
from gradflow.errors import UsageError
from gradflow.runs import store
from gradflow.runs.naming import names, shared
from gradflow.runs.records import Summary
from gradflow.runs.results import Results, read_results
from gradflow.showing.formats import results_markdown
from gradflow.showing.page import html_page, report
from gradflow.showing.page.chart_parts import CHART_WIDTH
from gradflow.showing.page.chart_tables import NamedRuns, chart_tables
from gradflow.showing.page.charts import CHARTS
from gradflow.showing.page.html_page import ShownRuns, words
from gradflow.showing.page.report import PageLimits, pick, selection
from gradflow.showing.sentences import (
    answer,
    design_by_design,
    designs_through,
    factor_in_words,
    run_sentence,
)
from gradflow.showing.terminal.many_runs import results_view
from gradflow.specs.run_options import RunOptions

NASTY = "</script><script>alert(1)</script><!-- \"'&]]> ünï ∂ \u2028 \U0001f600"


def save(out: Path, *, slope: float = 0.0, depth: int = 3, **options: Any) -> Path:
    spec = spec_of(depth=depth, **options)
    logs = [slope * (depth - i) for i in range(depth + 1)]
    path = store.save(run_of(spec, list(layer_rows(spec, logs))), out).path
    assert path is not None
    return path


def save_grid(out: Path) -> None:
    for depth in (4, 8):
        save(out, depth=depth)
        save(out, depth=depth, norm="none", slope=1.0)
        save(out, depth=depth, norm="none", shortcut="plain", slope=-0.5)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("grid")
    save_grid(out)
    return read_results(out)


@pytest.fixture(scope="module")
def grid_page(results: Results) -> str:
    return report.page(results)


@pytest.fixture
def short_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the file matters, the page is short: a real one takes seconds."""
    monkeypatch.setattr(report, "page", lambda _: f"<!doctype html>{report.MARK.decode()}")


class Parsed(HTMLParser):
    """The page as a parser sees it: tags with their attributes, and the text outside scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# Words


def summary(verdict: str, decades: float | None = None, **fields: Any) -> Summary:
    known = run_of().summary
    changed = {"verdict": verdict, "total_log10_gain": decades, "advice": "Do this.", **fields}
    return replace(known, **changed)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            summary("healthy", -0.38),
            (
                "The gradient reaches the first layer: "
                "on its way back through 3 layers it becomes 2.4 times smaller."
            ),
        ),
        (
            summary("healthy", 0.01),
            (
                "The gradient reaches the first layer: "
                "on its way back through 3 layers it keeps its size."
            ),
        ),
        (
            summary("vanishing", -7.3),
            (
                "The gradient vanishes: on its way back through 3 layers "
                "it becomes about 10⁷ times smaller. Do this."
            ),
        ),
        (
            summary("exploding", 3.5),
            (
                "The gradient explodes: on its way back through 3 layers "
                "it becomes 3,200 times larger. Do this."
            ),
        ),
        (
            summary("dead", first_layer=2, first_unit="mlp", first_pass="backward"),
            "The gradient is lost at layer 2, on its way back from the output. Do this.",
        ),
        (
            summary("nonfinite", first_layer=0, first_unit="input", first_pass="forward"),
            "The numbers break down in the input, on the way forward. Do this.",
        ),
        (
            summary("unstable", -2.0),
            (
                "The seeds disagree: on its way back through 3 layers "
                "it becomes 100 times smaller. Do this."
            ),
        ),
    ],
)
def test_a_run_in_a_sentence(tmp_path: Path, found: Summary, told: str) -> None:
    store.save(replace(run_of(), summary=found), tmp_path)
    assert run_sentence(read_results(tmp_path).runs[0]) == told


@pytest.mark.parametrize(
    ("decades", "told"),
    [
        (0.11, "1.3 times"),
        (0.9999, "10.0 times"),
        (1.08, "12 times"),
        (2.25, "180 times"),
        (3.99, "9,800 times"),
        (4.0, "about 10⁴ times"),
        (414.6, "about 10⁴¹⁵ times"),
    ],
)
def test_factors_in_words(decades: float, told: str) -> None:
    assert factor_in_words(decades) == told


def test_the_answer_comes_first(results: Results) -> None:
    assert answer(results.runs) == (
        "In 3 of 6 runs the gradient reaches the first layer; in 2 it explodes, in 1 it vanishes."
    )
    healthy = [run for run in results.runs if run.summary.verdict == "healthy"]
    others = [run for run in results.runs if run.summary.verdict != "healthy"]
    assert answer(healthy) == "In all 3 runs the gradient reaches the first layer."
    assert answer(others).startswith("In none of 3 runs does the gradient reach")
    assert answer(others[:1]) == "One run: it vanishes."


def test_the_shorter_list_of_designs_is_given(results: Results) -> None:
    called = names(results.runs)
    told = designs_through(results.runs, called)
    assert told == (
        "It gets through in: residual, pre-norm (depths 4 and 8); plain, no norm (depth 4)."
    )
    fewer = [run for run in results.runs if run.summary.verdict != "vanishing"]
    healthy = names(fewer)
    assert designs_through(fewer, healthy) == (
        "It gets through in all but these: residual, no norm (depths 4 and 8)."
    )
    assert designs_through(results.runs[:1], called[:1]) == ""


def test_names_say_only_what_differs(results: Results) -> None:
    designs = {name.design for _, name in design_by_design(results)}
    assert designs == {"residual, pre-norm", "residual, no norm", "plain, no norm"}
    assert "width 128" in shared(results.runs)


def test_the_summary_fits_80_columns(results: Results) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_view(results))
    text = console.export_text()
    assert "In 3 of 6 runs" in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("exploding") == 2


def many(results: Results, count: int) -> Results:
    """The same runs over and over, under new numbers."""
    size = len(results.runs)
    runs = [replace(results.runs[i % size], number=i, name=f"run-{i}") for i in range(count)]
    return replace(results, runs=tuple(runs))


def test_a_long_summary_is_cut_in_the_middle(results: Results) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_view(many(results, 1_000)))
    text = console.export_text()
    assert "970 more" in text
    assert len(text.splitlines()) < 60


def test_markdown_is_a_table_in_which_nothing_is_markup(results: Results) -> None:
    nasty = replace(results.runs[0].summary, verdict="a|b<c>", advice="d\\|e `f`")
    changed = replace(results, runs=(replace(results.runs[0], summary=nasty),))
    lines = results_markdown(changed).splitlines()
    row = lines[-1]
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", lines[-2]))
    assert "<c>" not in row
    assert "&lt;c&gt;" in row


# Choosing what is shown


def test_every_design_and_verdict_comes_in_turn(results: Results) -> None:
    runs = design_by_design(many(results, 600))
    chosen = pick(runs, 8)
    kinds = [(run.summary.verdict, name.design) for run, name in chosen]
    assert len(set(kinds)) == 4
    assert {kinds.count(kind) for kind in kinds} == {2}
    assert {run.spec.depth for run, _ in chosen if run.spec.norm == "pre"} == {8}
    assert in_same_order(chosen, runs)
    assert pick(runs, 600) == runs


def test_rare_verdicts_and_all_kinds_of_designs_are_shown(results: Results) -> None:
    found = many(results, 600)
    changed = [
        replace(run, spec=replace(run.spec, width=8 + run.number // 6)) for run in found.runs
    ]
    changed[311] = replace(changed[311], summary=summary("dead"))
    chosen = pick(design_by_design(replace(found, runs=tuple(changed))), 24)
    assert len(chosen) == 24
    assert {run.summary.verdict for run, _ in chosen} == {
        "healthy",
        "exploding",
        "vanishing",
        "dead",
    }
    assert len({(run.spec.shortcut, run.spec.norm) for run, _ in chosen}) == 3
    assert len({run.spec.width for run, _ in chosen}) > 12


def in_same_order(chosen: NamedRuns, runs: NamedRuns) -> bool:
    places = [runs.index(pair) for pair in chosen]
    return places == sorted(places)


def test_runs_with_times_are_chosen_before_their_equals(results: Results) -> None:
    without = results.runs[0]
    timed = replace(without, number=1, summary=replace(without.summary, forward_s=1.0))
    runs = design_by_design(replace(results, runs=(without, timed)))
    assert [run.number for run, _ in pick(runs, 1)] == [1]


def test_what_is_left_out_is_said(results: Results) -> None:
    shown = selection(many(results, 3_000), PageLimits(listed=1_500, charted=100, drawn=24))
    lines = words(many(results, 3_000), shown)["left_out"]
    assert "lists 1,500 of 3,000 runs" in lines[0]
    assert "hold 100 of 3,000 runs" in lines[1]
    assert "24 of 100 runs" in lines[2]
    assert words(results, selection(results, PageLimits()))["left_out"] == []


def test_thinned_layers_are_said(tmp_path: Path) -> None:
    save(tmp_path, depth=300)
    found = read_results(tmp_path)
    lines = words(found, selection(found, PageLimits()))["left_out"]
    assert lines == [
        (
            "Of stacks deeper than 120 layers, lines show about 120: evenly spaced, and those with "
            "the largest and the smallest values."
        )
    ]
    assert 100 < len(found.units) < 140


def test_the_page_shrinks_until_it_fits(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ShownRuns] = []

    def render(_: Results, shown: ShownRuns) -> str:
        seen.append(shown)
        return "x" * 100 * len(shown.listed)

    monkeypatch.setattr(report, "render", render)
    monkeypatch.setattr(report, "MOST_BYTES", 40_000)
    assert len(report.page(many(results, 3_000))) < 40_000
    assert [len(shown.listed) for shown in seen] == [1_500, 750, 375]
    assert [len(shown.charted) for shown in seen] == [100, 50, 25]


# The page


def test_the_page_needs_nothing_else(grid_page: str) -> None:
    parsed = Parsed(grid_page)
    assert all("src" not in attributes for _, attributes in parsed.tags)
    hrefs = [attributes.get("href") or "" for _, attributes in parsed.tags]
    assert all(not href or href.startswith(("#", "data:")) for href in hrefs)
    targets = {attributes.get("id") for _, attributes in parsed.tags}
    assert {href[1:] for href in hrefs if href.startswith("#")} <= targets
    assert "@import" not in grid_page
    assert len(grid_page.encode()) < 1_500_000


def test_only_the_page_s_own_scripts_may_run(grid_page: str) -> None:
    parsed = Parsed(grid_page)
    policy = next(a["content"] for a in parsed.all("meta") if "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    code = [s for s, a in zip(parsed.scripts, parsed.all("script"), strict=True) if "type" not in a]
    assert len(code) == 2
    for script in code:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_names_and_texts_are_shown_as_text(tmp_path: Path) -> None:
    run = run_of(
        environment=ENVIRONMENT | {"device_name": NASTY, "device": NASTY, "git": {"commit": NASTY}},
        warnings=(NASTY,),
    )
    path = store.save(replace(run, summary=summary(NASTY, advice=NASTY)), tmp_path).path
    assert path is not None
    save(tmp_path, width=8)
    path.rename(tmp_path / NASTY.replace("/", "\\"))
    (tmp_path / (NASTY.replace("/", "|") + "2")).mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("")
    page = report.page(read_results(tmp_path))
    parsed = Parsed(page)
    assert len(parsed.all("script")) == 3
    assert "alert(1)" not in "".join(parsed.scripts[1:])
    for place in ("td", "th", "p", "li", "label", "span", "option"):
        assert place in {tag for tag, _ in parsed.tags}
    assert parsed.text.count("</script><script>alert(1)</script>") >= 4
    data = json.loads(parsed.scripts[0])
    assert any("alert(1)" in run["design"] for run in data["runs"])
    # Nor does the page say where it was made, and on whose machine.
    assert "skipped bad, which is damaged" in parsed.text
    assert str(tmp_path) not in page
    assert socket.gethostname() not in parsed.text.split()
    assert f"{Path.home()}/" not in page


def test_the_page_can_be_read_by_a_screen_reader(grid_page: str) -> None:
    parsed = Parsed(grid_page)
    assert parsed.all("html")[0]["lang"] == "en"
    for landmark in ("header", "nav", "main", "footer", "form"):
        assert len(parsed.all(landmark)) == 1, landmark
    assert len(parsed.all("h1")) == 1
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    pictures = [a for _, a in parsed.tags if a.get("role") == "img"]
    assert len(pictures) == len(CHARTS)
    assert all(a.get("aria-label") for a in pictures)
    scrolled = [a for _, a in parsed.tags if "scroll" in (a.get("class") or "").split()]
    assert all(a["tabindex"] == "0" for a in scrolled)
    labels = {a.get("for") for a in parsed.all("label")}
    boxes = [a for a in parsed.all("input") if a.get("type") == "checkbox"]
    assert {a["id"] for a in boxes} <= labels
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_the_page_tells_the_verdict_of_every_run(grid_page: str) -> None:
    text = Parsed(grid_page).text
    assert "In 3 of 6 runs the gradient reaches the first layer; in 2 it explodes, in 1" in text
    assert text.count("The gradient explodes: on its way back through") == 2
    assert text.count("The gradient reaches the first layer: on its way back") == 3
    assert "a processor" in text


def test_missing_numbers_are_empty_and_no_number_is_lost(tmp_path: Path) -> None:
    rows = list(layer_rows(spec_of(), [float("nan"), 1.0, 0.5, 0.0]))
    store.save(run_of(layers=rows), tmp_path)
    found = read_results(tmp_path)
    shown = selection(found, PageLimits())
    table = chart_tables(found, shown.charted)["units"].to_dict(as_series=False)
    assert table["log10_grad_norm"] == [None, 1.0, 0.5, 0.0]
    assert words(found, shown)["rows"][0]["cells"][1] == ("", None)
    json.dumps(table, allow_nan=False)


def test_environments_are_grouped(tmp_path: Path) -> None:
    for i, torch in enumerate(["2.12", "2.13", "2.13"]):
        spec = spec_of(width=8 + i)
        store.save(run_of(spec, environment=ENVIRONMENT | {"torch": torch}), tmp_path)
    found = words(read_results(tmp_path), ShownRuns((), (), ()))["environments"]
    assert found["counts"] == ["2 runs", "1 run"]
    assert ("torch", ["2.13", "2.12"]) in found["rows"]
    assert ("threads", ["1", "1"]) in found["rows"]
    assert ("git commit", ["unknown", "unknown"]) in found["rows"]


# Files


@pytest.mark.usefixtures("short_page")
def test_the_page_replaces_only_an_older_page(tmp_path: Path, results: Results) -> None:
    page = tmp_path / "page.html"
    report.write_page(results, page)
    first = page.read_bytes()
    report.write_page(results, page)
    assert page.read_bytes() == first
    assert not list(tmp_path.glob(".page*"))
    page.write_text("my notes")
    with pytest.raises(UsageError, match="which is neither"):
        report.write_page(results, page)
    assert page.read_text() == "my notes"


def test_a_page_is_never_written_into_a_run_folder(tmp_path: Path, results: Results) -> None:
    folder = save(tmp_path / "more")
    with pytest.raises(UsageError, match="in a run folder"):
        report.write_page(results, folder / "page.html")
    assert not (folder / "page.html").exists()


@pytest.mark.usefixtures("short_page")
def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    report.write_page(results, page)
    before = page.read_bytes()
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(UsageError, match="No space left"):
        report.write_page(results, page)
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".page*"))


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("short_page")
@pytest.mark.parametrize("name", ["a folder", "file/page.html"])
def test_what_cannot_be_written_is_one_line(tmp_path: Path, results: Results, name: str) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        report.write_page(results, tmp_path / name)


def test_pictures_of_what_was_measured(tmp_path: Path, results: Results) -> None:
    written = report.write_pictures(results, tmp_path / "new" / "folder", "svg")
    drawn = {"gradient", "skip-gain", "branch-gain", "depth", "activation"}
    assert {file.stem for file in written} == drawn  # no cosines, no times in these runs
    for file in written:
        assert file.read_text().startswith("<svg")


# The command


def command(*argv: object) -> int:
    return run_app(["report", *map(str, argv)])


@pytest.mark.usefixtures("short_page")
def test_the_command_makes_the_page_and_shows_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_grid(tmp_path)
    (tmp_path / "foreign").mkdir()
    assert command("--results", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "In 3 of 6 runs" in out
    assert err == "gradflow: skipped what holds no run.json: foreign\n"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def save_lying(out: Path) -> Path:
    """A run that is stored as healthy, with a row that is not finite."""
    rows = list(layer_rows(spec_of(), [0.0, 0.0, math.nan, 0.0]))
    path = store.save(run_of(layers=rows, summary=run_of().summary), out).path
    assert path is not None
    return path


def test_rows_that_contradict_the_verdict_are_named_on_stderr_and_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_page, "vega", lambda: "")  # it takes seconds to make
    line = f"{save_lying(tmp_path).name} is stored as healthy, but its layers.csv is not finite"
    assert command("--results", tmp_path, "--quiet") == 0
    assert capsys.readouterr().err == f"note: {line} at layer 2 (mlp)\n"
    page = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert line in page.text
    assert "notes" in [section.get("id") for section in page.all("section")]


@pytest.mark.usefixtures("short_page")
def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    assert command("--results", tmp_path, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("short_page")
def test_markdown_on_stdout_is_nothing_but_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_grid(tmp_path)
    assert command("--results", tmp_path, "--markdown", "-") == 0
    out = capsys.readouterr().out
    assert out == results_markdown(read_results(tmp_path))


@pytest.mark.usefixtures("short_page")
def test_every_output_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: list[tuple[Path, str]] = []
    monkeypatch.setattr(report, "write_pictures", lambda _, *where: pictures.append(where))
    save(tmp_path / "runs")
    places = {f"--{name}": tmp_path / name for name in ("out", "png", "svg", "markdown")}
    words = [word for pair in places.items() for word in pair]
    assert command("--results", tmp_path / "runs", *words) == 0
    assert pictures == [(tmp_path / "png", "png"), (tmp_path / "svg", "svg")]
    assert (tmp_path / "markdown").read_text().startswith("One run: it reaches the first layer.")
    assert (tmp_path / "out").exists()
    assert not (tmp_path / "runs" / "report.html").exists()


@pytest.mark.slow
def test_pictures_are_twice_as_fine_as_the_screen(tmp_path: Path, results: Results) -> None:
    for file in report.write_pictures(results, tmp_path, "png"):
        with Image.open(file) as image:
            assert image.width > 2 * CHART_WIDTH, file


@pytest.mark.parametrize("made", [True, False])
def test_nothing_to_report_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: bool
) -> None:
    folder = tmp_path / "results"
    if made:
        folder.mkdir()
    assert command("--results", folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "gradflow run" in err
    assert not (folder / "report.html").exists()


def test_what_was_skipped_is_named_where_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, name in ((save(tmp_path), "layers.csv"), (save(tmp_path), "run.json")):
        (path / name).write_text("")
    assert command("--results", tmp_path) == 2
    out, err = capsys.readouterr()
    *skipped, last = err.splitlines()
    assert out == ""
    assert [line.split(",")[0] for line in skipped] == [
        f"gradflow: skipped {path.name}" for path in sorted(tmp_path.iterdir(), reverse=True)
    ]
    assert "of which all is skipped" in last


def in_fresh_process(code: str, *argv: object) -> str:
    words = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def loaded(argv: Sequence[object], *names: str) -> list[str]:
    code = (
        "import sys; from gradflow.cli.app import run_app; assert run_app(sys.argv[1:]) == 0;"
        f"print([name for name in {names!r} if name in sys.modules])"
    )
    found: list[str] = json.loads(in_fresh_process(code, *argv).splitlines()[-1].replace("'", '"'))
    return found


@pytest.mark.slow
def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    save(tmp_path)
    assert loaded(["report", "--results", tmp_path, "--quiet"], "torch", "scipy", "pandas") == []


def test_help_imports_nothing_that_only_a_report_needs() -> None:
    heavy = ("torch", "altair", "polars", "pandas", "vl_convert", "jinja2", "numpy")
    assert loaded(["report", "--help"], *heavy) == []


def test_options_are_kept(tmp_path: Path) -> None:
    store.save(run_of(options=RunOptions(vanishing=2.0)), tmp_path)
    found = read_results(tmp_path)
    table = chart_tables(found, design_by_design(found))["depths"]
    assert table["vanishing", "exploding"].rows() == [(-2.0, 3.0)]
