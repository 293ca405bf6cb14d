"""`measure`: one specification, all its seeds, one device; from a spec to a `Run`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from gradflow.engine import compiled
from gradflow.engine.environment import describe, resolve_device
from gradflow.engine.memory import (
    available_bytes,
    least_bytes,
    make_plan,
    out_of_memory,
    reset_peak,
)
from gradflow.engine.timing import Clock, clock_for
from gradflow.errors import MeasurementError, is_out_of_memory
from gradflow.judging.assembly import Measured, assembled_run
from gradflow.measuring.cost_columns import with_times
from gradflow.measuring.seed_passes import Found, Passes
from gradflow.measuring.theory_columns import with_theory
from gradflow.progress import Progress
from gradflow.runs.records import Run
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.training_spec import as_trained


def measure(
    spec: StackSpec,
    options: RunOptions | None = None,
    *,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
    scratch: Path | None = None,
) -> Run:
    """Measure gradient flow, and the time of each unit, in one stack.

    Args:
        spec: the network, its input and its loss; where the options train it, its input and its
            loss are those of a task, see `training_spec.as_trained`.
        options: seeds, device, timing, memory; the defaults of `RunOptions` if None.
        progress: called as the work goes on.
        clock: in place of the device's own.
        scratch: folder for rows that do not fit into memory; the system's if None.

    Returns:
        The run, not stored yet: `gradflow.save` does that.

    Raises:
        UsageError: the device is not there, or lacks the dtype, or there is no such training.
        MeasurementError: out of memory, or the disk of `scratch` is full.
    """
    options = options or RunOptions()
    spec = as_trained(spec, options)
    device = resolve_device(options.device, spec.dtype)
    started, begin = datetime.now(UTC), perf_counter()
    needed = least_bytes(spec)
    try:
        plan = make_plan(spec, options, device)
        needed = plan.needed
        reset_peak(device)
        work = Passes(spec, options, device, plan, progress, clock or clock_for(device))
        found = work.all_seeds(scratch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(needed, available_bytes(device), spec, options) from None
    except OSError as error:
        raise no_scratch(error) from None
    environment = describe(spec, device) | {
        "start_utc": started.isoformat(timespec="seconds"),
        "duration_s": perf_counter() - begin,
        "keep": plan.keep,
        "rebuild": plan.rebuild,
        "memory_policy": plan.sentence,
    }
    if options.compile:
        environment["compiled"] = compiled.BACKEND
    if work.graphs and work.graphs.captured:
        environment["cuda_graphs"] = True
    return _to_run(spec, options, environment, found)


def no_scratch(error: OSError) -> MeasurementError:
    """The error that says why rows found no place on disk."""
    return MeasurementError(
        f"the rows found no place on disk: {error.strerror or error}; "
        "free some space or choose another --out; nothing half-written remains"
    )


def _to_run(
    spec: StackSpec, options: RunOptions, environment: dict[str, object], found: Found
) -> Run:
    run = assembled_run(
        Measured(
            spec,
            options,
            environment,
            layers=found.tables.layers,
            params=found.tables.params,
            steps=found.steps,
            losses=() if spec.loss == "cotangent" else found.losses,
            warnings=found.warnings,
            peak_bytes=found.peak,
        )
    )
    run = with_theory(run)
    return with_times(run, found.timing, found.pass_s) if found.timing else run
