"""Terminals without the block characters: the same in ASCII, and nothing becomes `?`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from commandline import finish, start
from compared_runs import comparisons, seed_grid, timed_run
from hypothesis import given, settings
from records import layer_rows, run_of, spec_of
from rich.console import Console, RenderableType

import gradflow
from gradflow.cli.common import write_text
from gradflow.judging.comparison import Comparison
from gradflow.runs import store
from gradflow.showing.formats import comparison_markdown
from gradflow.showing.terminal.many_runs import (
    comparison_view,
    cost_columns,
    design_table,
    gradient_columns,
)
from gradflow.showing.terminal.one_run import run_view
from gradflow.showing.terminal.printing import print_view
from gradflow.text import ASCII_BARS, BARS, can_draw, in_ascii

DRAWN = sorted(Path(gradflow.__file__).parent.glob("showing/**/*.py"))
PACKAGE = Path(gradflow.__file__).parent
SAYING = [*sorted(PACKAGE.glob("judging/*.py")), PACKAGE / "text.py"]


def console_of(encoding: str) -> Console:
    """A terminal of that encoding that takes nothing else."""
    return Console(width=80, file=io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))


def printed(view: RenderableType, encoding: str) -> str:
    console = console_of(encoding)
    print_view(view, console)
    console.file.seek(0)
    return console.file.read()


@pytest.mark.parametrize(
    ("encoding", "draws"),
    [("utf-8", True), ("utf-16", True), (None, True), ("gb18030", True)]
    + [(name, False) for name in ("ascii", "latin-1", "cp437", "cp1252", "no-such-encoding")],
)
def test_encodings_that_can_draw(encoding: str | None, draws: bool) -> None:
    assert can_draw(encoding) is draws


def test_what_stands_for_what() -> None:
    assert in_ascii(BARS) == ASCII_BARS == " .:-=+*#"
    assert in_ascii("0.28 ±0.02, about 10⁻¹² times") == "0.28 +/-0.02, about 10^-12 times"
    assert in_ascii("\u2800\u28ff┤·…▲▼") == " *+':^v"
    assert in_ascii("ünï") == "ünï"  # a name is not drawn; what becomes of it is the stream's


@pytest.mark.parametrize("file", [*DRAWN, *SAYING], ids=lambda file: file.name)
def test_every_character_that_is_drawn_has_one_in_ascii(file: Path) -> None:
    drawn = {c for c in file.read_text(encoding="utf-8") if not c.isascii()}
    assert in_ascii("".join(drawn)).isascii()
    assert all(len(in_ascii(c)) == 1 for c in drawn - set("±⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def test_a_run_is_drawn_in_ascii() -> None:
    theory = {"theory_log10_grad_norm": {i: 0.5 * i for i in range(6)}}
    run = run_of(
        spec_of(depth=5), list(layer_rows(spec_of(depth=5), [0.7 * i for i in range(6)], **theory))
    )
    with pytest.raises(UnicodeEncodeError):
        console_of("ascii").print(run_view(run))
    text = printed(run_view(run), "ascii")
    assert "+/- " in text
    assert "'' " in text  # theory
    assert text.count("*") > 50  # the line
    assert "?" not in text
    assert printed(run_view(run), "utf-8").count("±") == text.count("+/-")


def test_a_comparison_is_drawn_in_ascii_and_its_columns_stay() -> None:
    text = printed(comparison_view(seed_grid(), drawn=False), "ascii")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "#*+=-:." in text
    assert "per layer +/-" in lines[0]
    rows = [line for line in lines[1:] if " +/-0." in line]
    assert len(rows) == 18
    ends = {line.index("+/-") for line in rows}
    assert {line.find("healthy") for line in rows} - {-1} == {lines[0].index("verdict")}
    assert len(ends) == 1


@settings(max_examples=20)
@given(result=comparisons())
def test_80_columns_in_ascii_whatever_the_numbers_are(result: Comparison) -> None:
    for columns in (gradient_columns(result)[0], cost_columns(0.01)):
        text = design_table(result, columns, in_ascii).plain
        assert max(map(len, text.split("\n"))) <= 80
        assert text.isascii()


def test_the_commands_draw_in_ascii(tmp_path: Path) -> None:
    for depth in (4, 8):
        store.save(timed_run(spec_of(depth=depth), -0.1), tmp_path)
    found = finish(start("compare", f"{tmp_path}/*", PYTHONIOENCODING="ascii"))
    assert found.code == 0
    assert "+/-" in found.out
    assert "?" not in found.out


def test_markdown_on_such_a_stdout_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = console_of("ascii").file
    monkeypatch.setattr(sys, "stdout", stdout)
    write_text("-", comparison_markdown(seed_grid()))
    stdout.seek(0)
    assert "+/-" in stdout.read()
