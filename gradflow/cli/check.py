"""`gradflow check`: the gate for CI.

Exit 0 passed, 1 with the reasons, 2 where a run could not be read, 4 without a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradflow.cli.common import (
    Json,
    Out,
    Plain,
    Quiet,
    Residual,
    RunFolders,
    check_target,
    one_shortcut,
    read_runs,
    run_name,
    say,
    write_text,
)
from gradflow.cli.options import with_fields
from gradflow.errors import FindingError, UsageError
from gradflow.text import json_text

if TYPE_CHECKING:
    from gradflow.judging.gate import Bounds, Judgement
    from gradflow.runs.records import Run

_RTOL = 0.1

_MaxDecades = Annotated[float | None, typer.Option(help="largest change from output to input")]
_MinGain = Annotated[float | None, typer.Option(help="smallest gain of any unit")]
_MaxGain = Annotated[float | None, typer.Option(help="largest gain of any unit")]
_NoNonfinite = Annotated[bool, typer.Option("--no-nonfinite", help="no NaN or infinity anywhere")]
_BaselineFolder = Annotated[Path | None, typer.Option(help="run folder to hold the norms against")]
_Rtol = Annotated[
    float | None,
    typer.Option(help=f"relative difference from the baseline that passes  [default: {_RTOL}]"),
]


@with_fields()
def check_command(
    given: dict[str, Any],
    *,
    runs: RunFolders = None,
    max_decades: _MaxDecades = None,
    min_gain: _MinGain = None,
    max_gain: _MaxGain = None,
    no_nonfinite: _NoNonfinite = False,
    baseline: _BaselineFolder = None,
    rtol: _Rtol = None,
    residual: Residual = False,
    plain: Plain = False,
    out: Out = Path("results"),
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Hold runs against bounds or a baseline; with options instead of runs: measure, then judge."""
    from gradflow.judging.gate import DEFAULT_BOUNDS, Bounds, check_limits, load_baseline

    check_target(json)
    given |= one_shortcut(given, residual, plain)
    _check_source(runs, given)
    bounds = Bounds(max_decades, min_gain, max_gain, no_nonfinite)
    if bounds.empty and baseline is None:
        bounds = DEFAULT_BOUNDS
    if rtol is not None and baseline is None:
        raise UsageError("--rtol needs a --baseline", rtol, "give one, or leave --rtol out")
    rtol = _RTOL if rtol is None else rtol
    check_limits(bounds, rtol, _as_option)
    expected = load_baseline(baseline) if baseline else None  # before anything is measured
    found, unreadable = _wanted(runs, given, out, quiet)
    for line in unreadable:
        say(f"not judged: {line}", style="red")
    judged: list[tuple[str, Judgement]] = []
    for run in found:
        judged.append((run_name(run), _judge(run, bounds, expected, rtol)))
        if json != "-":
            _say_judgement(*judged[-1])
    if json is not None:
        write_text(json, _judged_json(judged, unreadable))
    failed = [name for name, judgement in judged if not judgement.passed]
    _conclude(failed, len(unreadable))


def _check_source(runs: list[str] | None, given: dict[str, Any]) -> None:
    """Refuse runs and options together, and neither.

    Raises:
        UsageError: with neither, an empty glob in a script would pass as a check of the default.
    """
    if bool(runs) == bool(given):
        rule = "runs are either given as folders or made from options"
        remedy = "give run folders, or options as for `gradflow run`"
        raise UsageError(rule, "both" if runs else "neither", remedy)


def _conclude(failed: list[str], unreadable: int) -> None:
    """End with the exit code that the findings have; a run that nobody could read is no pass.

    Raises:
        FindingError: a run has failed.
        UsageError: none has, but some could not be read.
    """
    if failed:
        raise FindingError(f"check failed for {', '.join(failed)}")
    if unreadable:
        got = f"{unreadable} that cannot, named above"
        raise UsageError("every run of a check can be read", got, "mend it, or leave it out")


def _as_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _wanted(
    runs: list[str] | None, given: dict[str, Any], out: Path, quiet: bool
) -> tuple[list[Run], list[str]]:
    """The runs to judge, and a line for each run that cannot be read."""
    if runs:
        return read_runs(runs)
    from gradflow.cli.run import measure_and_store

    return [measure_and_store({"timing": False} | given, out, quiet)], []


def _judge(run: Run, bounds: Bounds, baseline: Run | None, rtol: float) -> Judgement:
    from gradflow.judging.gate import against_baseline, judge_run

    found = judge_run(run, bounds)
    return found if baseline is None else found + against_baseline(run, baseline, rtol)


def _say_judgement(name: str, judgement: Judgement) -> None:
    """Print whether a run passed, what was compared, and the reasons of a failure."""
    typer.echo(f"{'ok' if judgement.passed else 'FAILED'}  {name}")
    for line in judgement.compared:
        typer.echo(f"    compared: {line}")
    for reason in judgement.reasons:
        typer.echo(f"    reason: {reason}")


def _judged_json(judged: Sequence[tuple[str, Judgement]], unreadable: Sequence[str]) -> str:
    """One JSON object: whether all has passed, each run, and what could not be read."""
    runs = [
        {
            "run": name,
            "passed": judgement.passed,
            "compared": judgement.compared,
            "reasons": judgement.reasons,
        }
        for name, judgement in judged
    ]
    passed = not unreadable and all(judgement.passed for _, judgement in judged)
    content = {"passed": passed, "runs": runs, "unreadable": unreadable}
    return json_text(content)
