"""The one place where what was measured becomes a `Run`: with summary, verdict and outcome.

Stacks, models of other people and watched trainings all come here. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from gradflow.judging.run_summary import summarise_run
from gradflow.judging.training_outcome import summary_of
from gradflow.runs.records import LayerRecord, ParamRecord, Run, StepRecord
from gradflow.specs.model_spec import Spec
from gradflow.specs.run_options import RunOptions


@dataclass(frozen=True)
class Measured:
    """Everything that a measurement leaves behind, as plain data.

    Attributes:
        spec: what was measured.
        options: how it was measured.
        environment: what it was measured on, as `run.json` has it.
        layers: rows of `layers.csv`, seed by seed, each from the input up.
        params: rows of `params.csv`.
        steps: rows of `steps.csv`; empty without training.
        losses: the loss of each seed at initialisation; empty where the loss is no number to show.
        warnings: lines that the run shows.
        peak_bytes: largest memory in use; None if unknown.
        judged_step: training step that verdict and summary go by; None is the first one.
    """

    spec: Spec
    options: RunOptions
    environment: dict[str, Any]
    layers: Sequence[LayerRecord]
    params: Sequence[ParamRecord]
    steps: Sequence[StepRecord] = ()
    losses: Sequence[float] = ()
    warnings: Sequence[str] = ()
    peak_bytes: int | None = None
    judged_step: int | None = None


def assembled_run(measured: Measured) -> Run:
    """Return the run of a measurement, without times and without theory.

    Verdict and summary are those of one training step over all seeds; `outcome` and what follows
    it in the summary are those of the whole training.
    """
    options = measured.options
    loss = mean(measured.losses) if measured.losses else None
    summary = summarise_run(_judged_rows(measured), measured.spec, options, loss)
    outcome = summary_of(measured.steps)
    return Run(
        spec=measured.spec,
        options=options,
        summary=replace(summary, peak_bytes=measured.peak_bytes, **outcome),
        environment=measured.environment,
        overhead=None,
        warnings=tuple(measured.warnings),
        layer_records=measured.layers,
        param_records=measured.params,
        time_records=(),
        step_records=measured.steps,
    )


def _judged_rows(measured: Measured) -> Sequence[LayerRecord]:
    step = measured.judged_step
    if step is None and not measured.options.steps:
        return measured.layers  # all of one step, and perhaps too many to hold
    if step is None:
        step = min((row.step for row in measured.layers), default=0)
    return [row for row in measured.layers if row.step == step]
