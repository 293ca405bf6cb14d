"""`gradflow guide`: the pages of the guide in the terminal; imports neither torch nor numpy."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from gradflow.specs.fields import check_choice

TOPICS = (
    *("start", "read-the-answer", "schemes", "your-own", "compare", "theory", "deep", "train"),
    *("models", "watch", "distributed", "guard", "files", "reference", "limits"),
)
# Lines of prose longer than this are hard to follow.
_WIDEST = 100
_LINK = re.compile(r"!?\[([^\]]+)\]\((?!https?:)([^)]+)\)")

_Topic = Annotated[str | None, typer.Argument(help="a topic of the list; without one, the list")]


def guide_page(topic: str) -> str:
    """The Markdown text of one page, as it is shipped with the package.

    Raises:
        UsageError: the topic is unknown.
    """
    from importlib.resources import files  # 3 ms, which `--help` need not wait for

    check_choice("the topic", topic, TOPICS)
    return files("gradflow").joinpath("guide", f"{topic}.md").read_text(encoding="utf-8")


def page_summary(topic: str) -> str:
    """The one line below a page's title, which says what the page is about."""
    return guide_page(topic).splitlines()[2]


def guide_command(topic: _Topic = None) -> None:
    """List the topics of the guide, or show the page of one, in a pager where there is one."""
    text = _contents() if topic is None else guide_page(topic)
    from rich.console import Console
    from rich.markdown import Markdown

    from gradflow.showing.terminal.printing import print_view

    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    view = Markdown(_for_terminal(text), hyperlinks=False)
    if topic is None or not console.is_terminal or not _has_pager():
        print_view(view, console)
        return
    os.environ.setdefault("LESS", "FRX")  # what git sets: colours, and no pager for a short page
    with console.pager(styles=True):
        print_view(view, console)


def _has_pager() -> bool:
    """Whether the pager that PAGER names, if it names one, is a command that can be run."""
    import shlex
    import shutil

    words = shlex.split(os.environ.get("PAGER", ""))
    return not words or shutil.which(words[0]) is not None


def _contents() -> str:
    rows = [f"| {topic} | {page_summary(topic)} |" for topic in TOPICS]
    table = "\n".join(["| topic | what it tells |", "| --- | --- |", *rows])
    return f"{table}\n\n`gradflow guide TOPIC` shows a page.\n"


def _for_terminal(text: str) -> str:
    """The text with each link to a page as its command, and to another file as the file's path."""
    return _LINK.sub(lambda link: f"{link[1]} (`{_target(link[2])}`)", text)


def _target(link: str) -> str:
    name, is_page, _ = link.partition(".md")
    return f"gradflow guide {name}" if is_page and name in TOPICS else link.removeprefix("../../")
