"""`gradflow guide`: the list of topics, the pages in a terminal and in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import CommandLine
from doc_blocks import GUIDE

from gradflow.cli import guide
from gradflow.cli.guide import TOPICS


def test_topics_are_the_pages_that_are_shipped() -> None:
    assert set(TOPICS) == {page.stem for page in GUIDE.glob("*.md")}
    assert len(TOPICS) == len(set(TOPICS))


@pytest.mark.parametrize("topic", TOPICS)
def test_a_page_has_a_title_and_a_summary_in_one_line(topic: str) -> None:
    title, empty, summary, then = guide.guide_page(topic).splitlines()[:4]
    assert title.startswith("# ")
    assert (empty, then) == ("", "")
    assert summary == guide.page_summary(topic)
    assert 20 < len(summary) <= 120
    assert summary.endswith((".", "?"))


def test_the_list_shows_every_topic_with_its_summary(cli: CommandLine) -> None:
    done = cli("guide")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    for topic in TOPICS:
        first = " ".join(guide.page_summary(topic).replace("`", "").split()[:4])
        assert f"{topic} {first}" in text


@pytest.mark.parametrize("topic", TOPICS)
def test_a_page_fits_80_columns_and_shows_no_markup(cli: CommandLine, topic: str) -> None:
    done = cli("guide", topic)
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out
    for markup in ("<!--", "-->", "```", "](", "| ---"):
        assert markup not in done.out


def test_links_between_pages_are_commands_and_others_are_paths(cli: CommandLine) -> None:
    text = " ".join(cli("guide", "theory").out.split())
    assert "results/theory (results/theory/README.md)" in text
    assert "with a theory (results/theory/predicted.svg)" in text
    assert "Distributed (gradflow guide distributed)" in " ".join(cli("guide", "watch").out.split())


def test_an_unknown_topic_is_answered_with_the_known_ones(cli: CommandLine) -> None:
    done = cli("guide", "sweeps")
    assert (done.code, done.out) == (2, "")
    assert done.complaint.endswith(f"got sweeps; use {', '.join(TOPICS)}")


def run_in_a_terminal(**environment: str) -> tuple[str, str]:
    """Stdout of `gradflow guide` for a page and for the list, where stdout is a terminal."""
    code = "import sys; from gradflow.cli.app import run_app; sys.exit(run_app(sys.argv[1:]))"
    found = []
    for words in (["guide", "watch"], ["guide"]):
        ours, theirs = os.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment}
        command = [sys.executable, "-c", code, *words]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, env=env)
        os.close(theirs)
        chunks = []
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.wait(60) == 0
        os.close(ours)
        found.append(b"".join(chunks).decode())
    return found[0], found[1]


def test_a_terminal_gets_a_pager_for_pages_alone(tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text('#!/bin/sh\necho "LESS is $LESS"\nsed "s/^/> /"\n', encoding="utf-8")
    pager.chmod(0o755)
    page, contents = run_in_a_terminal(PAGER=str(pager), LESS="", NO_COLOR="1")
    assert "LESS is" in page
    assert "> " in page
    assert "Watch your own model" in page
    assert "\x1b[3" not in page  # a colour
    assert "LESS is" not in contents
    assert "read-the-answer" in contents


def test_a_pager_that_is_not_there_is_done_without() -> None:
    page, _ = run_in_a_terminal(PAGER="/no/such/pager -x", NO_COLOR="1")
    assert "Watch your own model" in page
    assert "not found" not in page


def test_it_imports_no_torch_and_waits_for_rich_until_it_runs() -> None:
    code = (
        "import sys; from gradflow.cli.app import run_app;"
        "early = [m for m in ('rich', 'torch') if m in sys.modules];"
        "code = run_app(['guide', 'limits']);"
        "late = [m for m in ('torch', 'numpy', 'pandas', 'scipy') if m in sys.modules];"
        "print(early, code, late, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[] 0 []"
