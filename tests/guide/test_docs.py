"""What exists is documented in README and guide: options, columns, commands, exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

import pytest
import reference_tables
from doc_blocks import GUIDE, REPOSITORY
from doc_blocks import PAGES as FILES
from reference_tables import commands

import gradflow
from gradflow.cli.guide import TOPICS
from gradflow.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, GradflowError
from gradflow.runs.records import TABLES, Summary, columns
from gradflow.schemes import SCHEMES
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.checkpoints import ARCHITECTURES
from gradflow.specs.fields import flag
from gradflow.specs.published_shapes import SHAPES
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

PAGES = {file.name: file.read_text(encoding="utf-8") for file in FILES}
TEXT = "\n".join(PAGES.values())
COLUMNS = [(table, name) for table, record in TABLES.items() for name in columns(record)]


def options() -> Iterator[tuple[str, str, str]]:
    """Command, option and help text."""
    for name, command in commands().items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                yield name, max(parameter.opts, key=len), parameter.help or ""


OPTIONS = list(options())


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_every_column_has_a_meaning_and_its_unit_in_the_name(table: str, column: str) -> None:
    field = TABLES[table].__dataclass_fields__[column]
    assert len(field.metadata["meaning"]) > 3
    unit = field.metadata["unit"]
    assert unit in ("", "s", "B", "decades")
    assert (unit == "s") == (column.endswith("_s") or column.endswith("_s_iqr"))
    assert (unit == "B") == column.endswith("_bytes")
    assert (unit == "decades") == ("log10_" in column)


@pytest.mark.parametrize(("command", "option", "text"), OPTIONS)
def test_every_option_has_a_help_text(command: str, option: str, text: str) -> None:
    assert option.startswith("--"), command
    assert len(text) > 3


@pytest.mark.parametrize("field", [f.name for cls in (StackSpec, RunOptions) for f in fields(cls)])
def test_every_field_is_an_option_of_run(field: str) -> None:
    assert ("run", flag(field)) in [(command, option) for command, option, _ in OPTIONS]


@pytest.mark.parametrize("command", commands())
def test_every_command_says_what_it_does(command: str) -> None:
    page = commands()[command].help
    assert page
    assert len(page.splitlines()[0]) > 20


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_has_a_meaning(block: str) -> None:
    assert BLOCKS[block].meaning


# README and guide: a person learns of everything from them.


@pytest.mark.parametrize("command", commands())
def test_the_guide_shows_every_command(command: str) -> None:
    assert f"gradflow {command}" in TEXT


@pytest.mark.parametrize("option", sorted({option for _, option, _ in OPTIONS}))
def test_the_guide_names_every_option(option: str) -> None:
    assert re.search(rf"{option}(?![\w-])", TEXT)


@pytest.mark.parametrize("field", [field.name for field in fields(Summary)])
def test_the_guide_names_every_number_of_the_summary(field: str) -> None:
    assert f"`{field}`" in PAGES["files.md"]


@pytest.mark.parametrize("name", [*SHAPES, *ARCHITECTURES])
def test_the_guide_names_every_shape_and_architecture(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", SCHEMES)
def test_the_page_of_schemes_sorts_every_one(name: str) -> None:
    assert f"`{name}`" in PAGES["schemes.md"].partition("## Schemes of several streams")[0]


@pytest.mark.parametrize("name", [*BLOCKS, *gradflow.__all__])
def test_the_first_page_names_every_block_and_every_name_of_the_package(name: str) -> None:
    assert name in PAGES["start.md"]


def test_the_guide_names_every_exit_code_and_no_other() -> None:
    table = PAGES["guard.md"].partition("| exit code | meaning |")[2].partition("\n\n")[0]
    kinds = [GradflowError, *GradflowError.__subclasses__()]
    codes = {EXIT_OK, EXIT_INTERNAL, EXIT_INTERRUPTED, *(kind.exit_code for kind in kinds)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == codes
    (usage,) = re.findall(r"^\| 2 \| (.*) \|$", table, re.MULTILINE)
    assert "`check`: no bound is broken, but a run could not be read" in usage


def test_the_readme_can_be_read_and_counts_the_schemes() -> None:
    assert len(PAGES["README.md"].encode()) <= 12 * 1024
    counts = re.findall(r"(\d+) published recipes", PAGES["README.md"])
    assert counts
    assert set(counts) == {str(len(SCHEMES))}


# The reference is made from the code.


def test_the_reference_is_what_the_code_says() -> None:
    text = reference_tables.PAGE.read_text(encoding="utf-8")
    again = "make the tables anew with `python tests/helpers/reference_tables.py`"
    assert reference_tables.with_tables(text) == text, again


def test_the_reference_has_every_table() -> None:
    found = reference_tables.marked(reference_tables.PAGE.read_text(encoding="utf-8"))
    assert len(found) == len(set(found))
    assert set(found) | {"command guide"} == set(reference_tables.MAKERS)


def test_tables_of_options_hold_every_option_of_every_command() -> None:
    text = reference_tables.PAGE.read_text(encoding="utf-8")
    for command, option, _ in OPTIONS:
        assert re.search(rf"`[^`]*{option}(?![\w-])", text), (command, option)


# Links


def links() -> list[tuple[str, str]]:
    """Page and target of every relative link."""
    pattern = r"\]\((?!https?:)([^)]+)\)"
    return sorted({(page, to) for page, text in PAGES.items() for to in re.findall(pattern, text)})


@pytest.mark.parametrize(("page", "link"), links())
def test_what_a_page_links_to_is_there(page: str, link: str) -> None:
    folder = REPOSITORY if page == "README.md" else GUIDE
    name, _, section = link.partition("#")
    assert (folder / name).exists()
    assert not section  # no page is so long that it needs one


@pytest.mark.parametrize("topic", TOPICS)
def test_the_readme_links_to_every_page_of_the_guide(topic: str) -> None:
    assert f"| [{topic}](gradflow/guide/{topic}.md) |" in PAGES["README.md"]
