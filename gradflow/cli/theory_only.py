"""`--theory-only` of `run` and `compare`: predict, show, store nothing; torch stays unloaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradflow.cli.common import Targets, show_view, write_targets, write_text
from gradflow.errors import UsageError
from gradflow.specs.grid import Grid
from gradflow.specs.requests import Asked, specification
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

TheoryOnly = Annotated[
    bool, typer.Option("--theory-only", help="predict without measuring; store nothing")
]


def predict_run(given: dict[str, Any], target: str | None, *, quiet: bool) -> None:
    """Predict one stack; write JSON to the target, show the view unless it would be in the way."""
    from gradflow.judging.outlook import outlook
    from gradflow.showing.formats import prediction_json
    from gradflow.showing.terminal.predictions import prediction_view

    predicted = outlook(*_stack(*specification(given)))
    if target is not None:
        write_text(target, prediction_json(predicted))
    if target != "-" and not quiet:
        show_view(prediction_view(predicted))


def predict_grid(grid: Grid, targets: Targets, *, quiet: bool) -> None:
    """Predict every cell of a grid; write the targets, show the table unless one is stdout."""
    from gradflow.judging.outlook import outlook
    from gradflow.showing.formats import PREDICTION_FORMATS
    from gradflow.showing.terminal.predictions import predictions_view

    predicted = [outlook(*_stack(cell.spec, cell.options)) for cell in grid.cells]
    write_targets(targets, PREDICTION_FORMATS, predicted)
    if not quiet and "-" not in targets.values():
        show_view(predictions_view(predicted))


def _stack(asked: Asked, options: RunOptions) -> tuple[StackSpec, RunOptions]:
    if not isinstance(asked, StackSpec):
        rule = "theory predicts stacks that gradflow builds"
        raise UsageError(rule, f"--model {asked.title}", "leave out --model, or --theory-only")
    return asked, options
