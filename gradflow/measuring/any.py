"""Stacks and models behind one door: each is measured and timed by its own engine."""

from __future__ import annotations

from pathlib import Path

import torch

from gradflow.engine.build import build_timed
from gradflow.engine.compiled import compiled_join
from gradflow.engine.cuda_graphs import graphs_on
from gradflow.engine.memory import footprint, make_plan, resident_bytes
from gradflow.engine.timing import Timer, stack_timer
from gradflow.measuring.progress import Progress
from gradflow.measuring.stack import measure_stack
from gradflow.runs.records import Run
from gradflow.specs.model_spec import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec


def measure_any(
    spec: StackSpec | ModelRequest,
    options: RunOptions,
    *,
    progress: Progress = lambda *_: None,
    scratch: Path | None = None,
) -> Run:
    """Measure a stack as trained by `measure_stack`, or a model by `measure_model`.

    Errors are theirs. `scratch` is the folder for rows of a stack that do not fit into memory; the
    system's if None.
    """
    if isinstance(spec, ModelRequest):
        from gradflow.measuring.models.run import measure_model  # a stack need not wait for it

        return measure_model(spec, options, progress)
    return measure_stack(spec, options, progress=progress, scratch=scratch)


def timer_for(spec: StackSpec | ModelRequest, options: RunOptions, device: torch.device) -> Timer:
    """Return the timer of the first seed, which is built on the device.

    Raises:
        UsageError: the stack or model cannot be built.
        MeasurementError: it does not fit into memory.
    """
    if isinstance(spec, ModelRequest):
        from gradflow.measuring.models.run import model_timer

        return model_timer(spec, options, device)
    plan = make_plan(spec, options, device)
    join = compiled_join() if options.compile else None
    # Only where all networks that take turns are captured can their times be divided.
    repeat = graphs_on(device, options) if options.cuda_graphs else None
    return stack_timer(build_timed(spec, options.seed, device, plan, join), repeat)


def timed_bytes(spec: StackSpec | ModelRequest, options: RunOptions, device: torch.device) -> int:
    """Return an upper bound of the bytes that stay taken between two passes of a timer."""
    if isinstance(spec, ModelRequest):
        from gradflow.measuring.models.run import model_bytes

        return model_bytes(spec, options)
    plan = make_plan(spec, options, device)
    return resident_bytes(footprint(spec, options.seed, device), plan.timed)
