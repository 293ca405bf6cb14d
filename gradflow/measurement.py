"""`measure`: one specification, all its seeds, one device; from a spec to a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import mean, median
from time import perf_counter

import torch

from gradflow.cost import with_times
from gradflow.environment import describe, resolve_device
from gradflow.expected import with_theory
from gradflow.memory import (
    available_bytes,
    check_room,
    is_out_of_memory,
    least_bytes,
    out_of_memory,
    peak_bytes,
    reset_peak,
)
from gradflow.outcome import summary_of
from gradflow.recipe import as_trained
from gradflow.records import LayerRecord, ParamRecord, Run, StepRecord, Timing, first_step
from gradflow.spec import RunOptions, StackSpec
from gradflow.stack import build_loss, build_stack, input_batch
from gradflow.timing import Clock, clock_for, time_network
from gradflow.training import train_stack
from gradflow.verdict import summarise
from gradflow.walk import Network, walk

# (what is going on, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def measure(
    spec: StackSpec,
    options: RunOptions | None = None,
    *,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
) -> Run:
    """Measure gradient flow, and the time of each unit, in one stack.

    Args:
        spec: the network, its input and its loss; where the options train it, its input and its
            loss are those of a task, see `recipe.as_trained`.
        options: seeds, device, timing; the defaults of `RunOptions` if None.
        progress: called as the work goes on.
        clock: in place of the device's own.

    Returns:
        The run, not stored yet: `gradflow.save` does that.

    Raises:
        UsageError: the device is not there, or lacks the dtype, or there is no such training.
        MeasurementError: out of memory.
    """
    options = options or RunOptions()
    spec = as_trained(spec, options)
    device = resolve_device(options.device, spec.dtype)
    started, begin = datetime.now(UTC), perf_counter()
    needed = least_bytes(spec)
    try:
        needed = check_room(spec, options, device)
        reset_peak(device)
        found = _measure_seeds(spec, options, device, progress, clock or clock_for(device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(needed, available_bytes(device), spec, options) from None
    environment = describe(spec, device) | {
        "start_utc": started.isoformat(timespec="seconds"),
        "duration_s": perf_counter() - begin,
    }
    return _to_run(spec, options, environment, found)


@dataclass(frozen=True)
class _Found:
    """All seeds; `passes_s` are the seconds of the statistics passes."""

    layers: Sequence[LayerRecord]
    params: Sequence[ParamRecord]
    losses: Sequence[float]
    passes_s: Sequence[float]
    steps: Sequence[StepRecord]
    timing: Timing | None
    peak: int


def build_network(spec: StackSpec, seed: int, device: torch.device) -> Network:
    """One seed of a stack, resident on the device."""
    return Network(
        build_stack(spec, seed, device),
        input_batch(spec, seed, device),
        build_loss(spec, seed, device),
    )


def _measure_seeds(
    spec: StackSpec, options: RunOptions, device: torch.device, progress: Progress, clock: Clock
) -> _Found:
    layers: list[LayerRecord] = []
    params: list[ParamRecord] = []
    losses: list[float] = []
    passes: list[float] = []
    steps: list[StepRecord] = []
    timing = None
    for seed in options.all_seeds:
        progress("building", 0, 1)
        network = build_network(spec, seed, device)
        if options.timing and timing is None:
            tick = _counter(progress, "timing", options.repeats)
            timing = time_network(network, options, clock, tick)
        if options.steps:
            del network  # the trained one takes its place
            tick = _counter(progress, f"training, seed {seed}", options.steps + 1)
            trained = train_stack(spec, seed, device, options, tick)
            steps += trained.steps
            losses.append(trained.steps[0].loss)
            new_layers, new_params = trained.layers, trained.params
        else:
            tick = _counter(progress, f"gradients, seed {seed}", 2 * spec.depth)
            marks = [clock.mark()]
            found = walk(spec, seed, network, raw_range=options.raw_range, tick=tick)
            marks.append(clock.mark())
            passes += clock.seconds(marks)
            new_layers, new_params = found.records()
            losses.append(found.loss.item())
            del network  # or the next one would be built beside it
        layers += new_layers
        params += new_params
    return _Found(layers, params, losses, passes, steps, timing, peak_bytes(device))


def _counter(progress: Progress, phase: str, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(phase, min(done, total), total)

    return tick


def _to_run(
    spec: StackSpec, options: RunOptions, environment: dict[str, object], found: _Found
) -> Run:
    loss = None if spec.loss == "cotangent" else mean(found.losses)
    summary = summarise(first_step(found.layers), spec, options, loss)
    run = Run(
        spec=spec,
        options=options,
        summary=replace(summary, peak_bytes=found.peak, **summary_of(found.steps)),
        environment=environment,
        overhead=None,
        warnings=(),
        layer_records=found.layers,
        param_records=found.params,
        time_records=(),
        step_records=found.steps,
    )
    run = with_theory(run)
    statistics_s = median(found.passes_s) if found.passes_s else None
    return with_times(run, found.timing, statistics_s) if found.timing else run
