"""The tables of the guide's reference, made from the code; as a program it writes them anew."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from gradflow.cli.app import app
from gradflow.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, GradflowError
from gradflow.judging.training_outcome import TRAINING_CLASSES
from gradflow.judging.verdicts import VERDICTS
from gradflow.runs.records import TABLES
from gradflow.schemes import SCHEMES

REPOSITORY = Path(__file__).parent.parent.parent
PAGE = REPOSITORY / "gradflow" / "guide" / "reference.md"
# What users may import; everything else is inside.
PUBLIC_MODULES = (
    *("gradflow", "gradflow.schemes", "gradflow.networks", "gradflow.watching"),
    *("gradflow.watching.callbacks", "gradflow.pytest_plugin"),
)
INTERNAL = "An error of gradflow's own, in one line; `GRADFLOW_TRACEBACK=1` shows the traceback."
_MARKED = re.compile(r"<!-- table: ([\w .]+) -->\n.*?<!-- end -->", re.DOTALL)


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by name, as it is parsed."""
    return dict(typer.main.get_command(app).commands)


def options(command: str) -> Iterator[tuple[str, str, str]]:
    """The options of a command: spelling, panel, help text."""
    for parameter in commands()[command].params:
        if parameter.param_type_name == "option":
            spellings = [*parameter.opts, *parameter.secondary_opts]
            panel = getattr(parameter, "rich_help_panel", None) or ""
            yield " / ".join(spellings), panel, parameter.help or ""


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside of cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def option_table(panel: str) -> str:
    """The options of `run` that one panel of its help holds; `compare` and `check` share them."""
    return _options(row for row in options("run") if row[1] == panel)


def own_option_table(command: str) -> str:
    """The options of a command that do not describe a stack, a model or a measurement."""
    return _options(row for row in options(command) if not row[1])


def _options(rows: Iterable[tuple[str, str, str]]) -> str:
    return markdown(("option", "meaning"), [(f"`{name}`", text) for name, _, text in rows])


def column_table(table: str) -> str:
    """The columns of one CSV file, with unit and meaning."""
    fields = TABLES[table].__dataclass_fields__.items()
    rows = [(f"`{name}`", f.metadata["unit"], f.metadata["meaning"]) for name, f in fields]
    return markdown(("column", "unit", "meaning"), rows)


def verdict_table() -> str:
    """The verdicts on a gradient, with their meaning and what to look for in a user's own model."""
    rows = [(f"`{v.word}`", v.meaning, v.model_remedy) for v in VERDICTS.values()]
    return markdown(("verdict", "meaning", "in a model of your own"), rows)


def outcome_table() -> str:
    """The outcomes of a training, with a floor of the loss that is known and without."""
    rows = [(f"`{c.word}`", c.advice, c.advice_by_fall) for c in TRAINING_CLASSES.values()]
    return markdown(("outcome", "meaning", "where no floor of the loss is known"), rows)


def exit_codes() -> dict[int, list[type[GradflowError]]]:
    """The errors by the exit code that they end a command with."""
    kinds: list[type[GradflowError]] = [*GradflowError.__subclasses__()]
    return {code: [k for k in kinds if k.exit_code == code] for code in range(1, 5)}


def exit_code_table() -> str:
    """The exit codes; an error is told by the first line of its docstring."""
    rows = [(str(EXIT_OK), "The command did what it was asked for.")]
    for code, kinds in exit_codes().items():
        rows.append((str(code), " ".join(_first_line(kind) for kind in kinds)))
    rows.append((str(EXIT_INTERNAL), INTERNAL))
    rows.append((str(EXIT_INTERRUPTED), "Interrupted; nothing half-written remains."))
    return markdown(("exit code", "meaning"), rows)


def scheme_table() -> str:
    """The zoo: name, equation, paper."""
    rows = [(f"`{name}`", s.equation, s.paper) for name, s in SCHEMES.items()]
    return markdown(("scheme", "one unit", "paper"), rows)


def extra_table() -> str:
    """The extras with the packages that they bring."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return markdown(("extra", "it brings"), [(f"`{k}`", ", ".join(v)) for k, v in extras])


def public_names(module: str) -> list[str]:
    """The names of a public module that users may import: its `__all__`."""
    return list(import_module(module).__all__)


def api_table() -> str:
    """The public modules with their names."""
    rows = []
    for module in PUBLIC_MODULES:
        names = ", ".join(f"`{name}`" for name in public_names(module))
        rows.append((f"`{module}`", names, _first_line(import_module(module))))
    return markdown(("module", "names", "what it is for"), rows)


def _first_line(thing: Any) -> str:
    return str(thing.__doc__).partition("\n\n")[0]


MAKERS: dict[str, Callable[[], str]] = {
    **{f"options {name}": lambda name=name: option_table(name) for name in ("Stack", "Model")},
    "options Measurement": lambda: option_table("Measurement"),
    **{f"command {name}": lambda name=name: own_option_table(name) for name in commands()},
    **{f"{table}.csv": lambda table=table: column_table(table) for table in TABLES},
    "verdicts": verdict_table,
    "outcomes": outcome_table,
    "exit codes": exit_code_table,
    "schemes": scheme_table,
    "extras": extra_table,
    "public modules": api_table,
}


def marked(text: str) -> list[str]:
    """The names of the tables that a page has a place for."""
    return _MARKED.findall(text)


def with_tables(text: str) -> str:
    """The page with every marked table made anew."""
    return _MARKED.sub(
        lambda match: f"<!-- table: {match[1]} -->\n\n{MAKERS[match[1]]()}\n\n<!-- end -->", text
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
