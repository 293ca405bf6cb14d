"""The command line: parse, call, print, exit code. No logic, and torch only inside commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gradflow.cli.check import check_command
from gradflow.cli.compare import compare_command
from gradflow.cli.guide import guide_command
from gradflow.cli.process import exit_code, run_process
from gradflow.cli.report import report_command
from gradflow.cli.run import run_command
from gradflow.cli.schemes import schemes_command
from gradflow.errors import EXIT_OK, UsageError
from gradflow.specs.fields import check_choice
from gradflow.version import __version__


class Commands(TyperGroup):
    """The commands by name; an unknown one is answered with the list of them."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if not ctx.resilient_parsing:  # a shell that completes a line wants no complaint
            check_choice("the command", cmd_name, tuple(self.commands))
        return super().get_command(ctx, cmd_name)


class HelpByPanel(TyperCommand):
    """A command whose help lists the options under the title of their panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                name = "Arguments" if param.param_type_name == "argument" else "Options"
                title = getattr(param, "rich_help_panel", None) or name
                panels.setdefault(title, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


app = typer.Typer(
    cls=Commands,
    name="gradflow",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help pages take a quarter of a second to import
    context_settings={"help_option_names": ["-h", "--help"]},
)


_COMPLETING = {"--install-completion", "--show-completion"}


def main() -> None:
    """Run the command line and exit with its code; errors are one line on stderr."""
    run_process(lambda: run_app(sys.argv[1:]))


def run_app(argv: list[str]) -> int:
    """Run a command line; returns the exit code."""
    words = _with_bare_json(argv or ["--help"])
    if "_GRADFLOW_COMPLETE" in os.environ:  # a shell takes each line for a word to offer
        os.environ["COLUMNS"] = "1000"
    return exit_code(lambda: _answer(words))


def _answer(words: list[str]) -> int:
    """Run a command; return its exit code, which for a shell unknown to Typer is no finding's."""
    code = int(app(words, prog_name="gradflow", standalone_mode=False) or EXIT_OK)
    return UsageError.exit_code if code and _COMPLETING.intersection(words) else code


def _with_bare_json(argv: list[str]) -> list[str]:
    """Read `--json` without a value as `--json -`."""
    bare = [
        word == "--json" and after.startswith("-") and after != "-"
        for word, after in pairwise([*argv, "--"])
    ]
    return ["--json=-" if is_bare else word for word, is_bare in zip(argv, bare, strict=True)]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradflow {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Does the gradient reach my first layer, is that normal, and what does each layer cost?"""


_COMMANDS: dict[str, Callable[..., None]] = {
    "run": run_command,
    "compare": compare_command,
    "report": report_command,
    "check": check_command,
    "schemes": schemes_command,
    "guide": guide_command,
}
for _name, _command in _COMMANDS.items():
    # As the short help too, which Typer would cut off.
    app.command(_name, cls=HelpByPanel, short_help=_command.__doc__)(_command)
