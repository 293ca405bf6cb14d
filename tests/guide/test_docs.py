"""What exists is documented: columns, options, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import gradflow
from gradflow.cli.app import app
from gradflow.errors import EXIT_INTERRUPTED, EXIT_OK, GradflowError
from gradflow.runs.records import TABLES, columns
from gradflow.runs.summary import Summary
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.checkpoint_formats import ARCHITECTURES
from gradflow.specs.fields import flag
from gradflow.specs.published_shapes import SHAPES
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
COLUMNS = [(table, name) for table, record in TABLES.items() for name in columns(record)]


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by name, as it is parsed."""
    return dict(typer.main.get_command(app).commands)


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


# The README: a person learns of everything from it.


@pytest.mark.parametrize("command", commands())
def test_the_readme_shows_every_command(command: str) -> None:
    assert f"gradflow {command}" in README


@pytest.mark.parametrize("option", sorted({option for _, option, _ in OPTIONS}))
def test_the_readme_names_every_option(option: str) -> None:
    assert re.search(rf"{option}(?![\w-])", README)


@pytest.mark.parametrize("column", sorted({column for _, column in COLUMNS}))
def test_the_readme_names_every_column(column: str) -> None:
    assert f"`{column}`" in README


@pytest.mark.parametrize("field", [field.name for field in fields(Summary)])
def test_the_readme_names_every_number_of_the_summary(field: str) -> None:
    assert f"`{field}`" in README


@pytest.mark.parametrize("name", [*SHAPES, *ARCHITECTURES])
def test_the_readme_names_every_shape_and_architecture(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize("name", [*BLOCKS, *gradflow.__all__])
def test_the_readme_names_every_block_and_every_name_of_the_package(name: str) -> None:
    assert name in README


def test_the_readme_names_every_exit_code_and_no_other() -> None:
    table = README.partition("| exit code | meaning |")[2].partition("\n\n")[0]
    kinds = [GradflowError, *GradflowError.__subclasses__()]
    codes = {EXIT_OK, EXIT_INTERRUPTED, *(kind.exit_code for kind in kinds)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == codes
    (usage,) = re.findall(r"^\| 2 \| (.*) \|$", table, re.MULTILINE)
    assert "`check`: no bound is broken, but a run could not be read" in usage


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_what_the_readme_links_to_is_there(link: str) -> None:
    assert (Path(__file__).parent.parent.parent / link).exists()
