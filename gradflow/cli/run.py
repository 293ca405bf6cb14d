"""`gradflow run`: measure one specification, store it, show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.cli.common import (
    Json,
    Out,
    Plain,
    Quiet,
    Residual,
    check_target,
    one_shortcut,
    progress_bar,
    say,
    show_view,
    write_text,
)
from gradflow.cli.options import with_fields
from gradflow.cli.theory_only import TheoryOnly, predict_run
from gradflow.specs.requests import specification
from gradflow.text import json_text

if TYPE_CHECKING:
    from gradflow.runs.records import Run


@with_fields()
def run_command(
    given: dict[str, Any],
    *,
    residual: Residual = False,
    plain: Plain = False,
    theory_only: TheoryOnly = False,
    out: Out = Path("results"),
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure one stack, or a model: gradient norms, gains and times per layer, and a verdict."""
    check_target(json)
    given |= one_shortcut(given, residual, plain)
    if theory_only:
        predict_run(given, json, quiet=quiet)
        return
    measured = measure_and_store(given, out, quiet)
    if json is not None:
        write_text(json, _run_json(measured))
    if json != "-" and not quiet:
        from gradflow.showing.terminal.one_run import run_view

        show_view(run_view(measured), numbers_coloured=True, then=f"stored in {measured.path}")
    for warning in measured.warnings:
        say(f"warning: {warning}", style="yellow")


def measure_and_store(given: dict[str, Any], out: Path, quiet: bool) -> Run:
    """Measure the given fields and store the run; bad values and a bad `out` are refused first."""
    with progress_bar(quiet) as progress:
        spec, options = specification(given)
        from gradflow.runs.staging import check_writable
        from gradflow.runs.store import save

        scratch = check_writable(out)
        progress("loading torch", 0, 0)
        from gradflow.measuring.any import measure_any

        return save(measure_any(spec, options, progress=progress, scratch=scratch), out)


def _run_json(run: Run) -> str:
    """One JSON object: folder, specification, summary and verdict of a run."""
    from gradflow.runs.store import run_json

    content = run_json(run)
    return json_text(
        {
            "run": str(run.path),
            "spec": content["spec"],
            "summary": content["summary"],
            "verdict": run.summary.verdict,
        }
    )
