"""The code blocks of the README and the guide, with what the tests change in them.

A comment before a block, `<!-- test: ... -->`, says how it is run:

- of a shell block: options that replace those of the same name or are added, one group for each
  gradflow command between bars, or one group for all;
- of a Python block: `old => new`, a replacement in its text, or `given NAME`, the names it needs;
- `not run, REASON`, or `needs a, b`: packages without which it is skipped.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
GUIDE = REPOSITORY / "gradflow" / "guide"
PAGES = (REPOSITORY / "README.md", *sorted(GUIDE.glob("*.md")))
_BLOCK = re.compile(
    r"(?P<notes>(?:<!-- test:.*? -->\n)*)```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL
)
_NOTE = re.compile(r"<!-- test: ?(.*?) ?-->")
_FILE = re.compile(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One code block of one page.

    Attributes:
        page: the name of the page's file.
        language: what stands behind the three backticks.
        text: the code.
        notes: what the comments before it say to the tests.
    """

    page: str
    language: str
    text: str
    notes: tuple[str, ...]

    @property
    def is_run(self) -> bool:
        """Whether a test runs it."""
        return not any(note.startswith("not run") for note in self.notes)

    @property
    def needs(self) -> list[str]:
        """The optional packages that it imports."""
        return [n for note in self.notes if note.startswith("needs ") for n in _listed(note)]

    @property
    def given(self) -> list[str]:
        """The names of what has to be there before it."""
        return [n.removeprefix("given ") for n in self.notes if n.startswith("given ")]

    @property
    def code(self) -> str:
        """A Python block with the replacements for the tests made."""
        text = self.text
        for note in self.notes:
            old, arrow, new = note.partition(" => ")
            assert not arrow or old in text, (self.page, old)
            text = text.replace(old, new) if arrow else text
        return text

    def commands(self) -> list[list[str]]:
        """The gradflow commands of a shell or workflow block as words, small."""
        text = self.text.replace("\\\n", " ")
        lines = re.findall(r"(?:^|&& |run: )gradflow\b(.*)$", text, re.MULTILINE)
        words = [shlex.split(line, comments=True) for line in lines]
        notes = [note for note in self.notes if not note.startswith(("needs ", "not run"))]
        groups = [shlex.split(group) for group in notes[0].split("|")] if notes else [[]]
        assert len(groups) in (1, len(words)), (self.page, self.text)
        groups = groups * len(words) if len(groups) == 1 else groups
        return [_replaced(line, group) for line, group in zip(words, groups, strict=True)]


def _listed(note: str) -> list[str]:
    return note.removeprefix("needs ").split(", ")


def _replaced(words: list[str], options: list[str]) -> list[str]:
    """The command with the options in place of its own of the same name."""
    kept = list(words)
    for name in {word for word in options if word.startswith("--")} & set(kept):
        if name in kept:
            place = kept.index(name)
            del kept[place : place + 2]
    return [*kept, *options]


def blocks(*languages: str) -> list[Block]:
    """Every block of these languages, page by page."""
    return [
        Block(page.name, match["language"], match["text"], tuple(_NOTE.findall(match["notes"])))
        for page in PAGES
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))
        if match["language"] in languages
    ]


def shown_files() -> dict[str, str]:
    """The files that the pages print in full, by name."""
    return {k: v for page in PAGES for k, v in _FILE.findall(page.read_text(encoding="utf-8"))}
