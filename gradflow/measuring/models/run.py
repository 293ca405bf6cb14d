"""`measure_model`: a `ModelRequest`, all its seeds, one device; from a request to a `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.engine.environment import describe_environment, resolve_device
from gradflow.engine.memory import available_bytes, peak_bytes, reset_peak
from gradflow.engine.timing import Clock, Timer, clock_for, matmul_flop_per_s, take_times
from gradflow.errors import MeasurementError, is_out_of_memory
from gradflow.judging.assembly import Measured, assembled_run
from gradflow.measuring.columns import with_times
from gradflow.measuring.models.hugging_face import hugging_face_build
from gradflow.measuring.models.subjects import (
    Example,
    Subject,
    backward_pass,
    build_subject,
    settings_kept,
    untouched,
)
from gradflow.measuring.progress import Progress, counter
from gradflow.runs.records import Run, StepRecord, Timing
from gradflow.specs.model_spec import ModelRequest, ModelSpec
from gradflow.specs.run_options import RunOptions
from gradflow.specs.user_files import errors_of_users_code, without_digest
from gradflow.text import gib
from gradflow.training.steps import Problem, step_record, train
from gradflow.watching import watch
from gradflow.watching.discovery import WatchedLayer, find_layers, repeats
from gradflow.watching.times import bare_step, counted_step, layer_timing, timed_step

# Copies of the parameters: they and their gradients; training adds the optimizer's two moments and
# the values before an update.
_COPIES, _TRAINED_COPIES = 2, 5
_ADVICE = "name those that always run with --layers"


@dataclass
class _ModelResults:
    """What the seeds that were measured so far leave behind.

    Attributes:
        runs: one run for each watched pass.
        losses: loss of each seed at initialisation.
        pass_seconds: seconds of each watched pass; empty where the model is trained.
        timing: times of the first seed; None if it was not timed.
    """

    runs: list[Run] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    timing: Timing | None = None


def measure_model(
    request: ModelRequest,
    options: RunOptions,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
) -> Run:
    """Measure gradient flow, and the time of each layer, in any model.

    The model is watched during one forward and one backward pass in training mode, or during
    the measured steps of its training; times come from passes of their own.

    `clock` stands in the place of the device's own.

    Raises:
        UsageError: the device is not there, or the user's code does not run.
        MeasurementError: out of memory, no layer has run, or seeds have other layers.
    """
    device = resolve_device(options.device, request.dtype)
    started, begin = datetime.now(UTC), perf_counter()
    progress("building", 0, 1)
    _check_memory(request, options, device)
    reset_peak(device)
    work = _ModelMeasurement(request, options, device, progress, clock or clock_for(device))
    try:
        with settings_kept():
            results = work.all_seeds()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MeasurementError(_too_large(request, None, available_bytes(device))) from None
    when = {
        "start_utc": started.isoformat(timespec="seconds"),
        "duration_s": perf_counter() - begin,
    }
    return _run_of(request, options, results, when, device)


def _check_memory(request: ModelRequest, options: RunOptions, device: torch.device) -> None:
    """Refuse a model of `transformers` that cannot fit before the system kills the process."""
    needed, free = model_bytes(request, options), available_bytes(device)
    if needed > free:
        raise MeasurementError(_too_large(request, needed, free))


def _too_large(request: ModelRequest, needed: int | None, free: int) -> str:
    size = "does not fit" if needed is None else f"needs at least {gib(needed)}"
    lower = "--depth, --width, --batch-size or --seq-len" if request.is_from_library else "--input"
    name = without_digest(request.model)
    return f"out of memory: {name} {size}, {gib(free)} are free; lower {lower}"


def model_bytes(request: ModelRequest, options: RunOptions) -> int:
    """Return the bytes a model of `transformers` needs; 0 for other models, which are unknown."""
    if not request.is_from_library:
        return 0
    build = hugging_face_build(request)
    with errors_of_users_code(without_digest(request.model)):
        numbers = build.parameters
    copies = _TRAINED_COPIES if options.steps else _COPIES
    return numbers * copies * int(getattr(torch, request.dtype).itemsize)


@dataclass(frozen=True)
class _ModelMeasurement:
    """The passes of one measurement of a model: every seed, and the times of the first."""

    request: ModelRequest
    options: RunOptions
    device: torch.device
    progress: Progress
    clock: Clock

    def all_seeds(self) -> _ModelResults:
        """Measure every seed; time the first one after its numbers are there.

        Timed passes draw random numbers and move running averages, and the machine decides how
        many there are: nothing of this may reach the numbers.
        """
        results = _ModelResults()
        for seed in self.options.all_seeds:
            self.progress(f"building, seed {seed}", 0, 1)
            subject = build_subject(self.request, seed, self.device, self.options)
            self.progress(f"gradients, seed {seed}", 0, 1)
            if self.options.steps:
                self._train(subject, seed, results)
            else:
                self._watch(subject, seed, results)
            if self.options.timing and results.timing is None:
                results.timing = self._time(subject)
            del subject  # or the next one would be built beside it
        return results

    def _time(self, subject: Subject) -> Timing | None:
        tick = counter(self.progress, "timing", self.options.repeats)
        timing = take_times(timer_of(subject, self.request), self.options, self.clock, tick)
        if timing is None:
            return None
        rate = matmul_flop_per_s(self.device, self.request.dtype, self.clock)
        return replace(timing, matmul_flop_per_s=rate)

    def _watch(self, subject: Subject, seed: int, results: _ModelResults) -> None:
        marks = [self.clock.mark()]
        run, loss = watched(subject, next(subject.batches()), self.request, self.options, seed)
        marks.append(self.clock.mark())
        results.pass_seconds += self.clock.seconds(marks)
        results.runs.append(run)
        results.losses.append(loss)

    def _train(self, subject: Subject, seed: int, results: _ModelResults) -> None:
        """Train one seed; measurements on the way change nothing in the training."""

        def observe(step: int, example: Example) -> None:
            run, loss = watched(subject, example, self.request, self.options, seed)
            results.runs.append(_at_step(run, step))
            results.losses += [loss] * (step == 0)

        def loss(_: nn.Module, example: Example) -> Tensor:
            with errors_of_users_code(without_digest(self.request.model)):
                return subject.loss(subject.model, example)

        what = f"training, seed {seed}"
        for step in train(Problem(subject.model, subject.batches(), loss), self.options, observe):
            results.steps.append(step_record(seed, step, subject.task))
            self.progress(what, step.step, self.options.steps)


def watched(
    subject: Subject, example: Example, request: ModelRequest, options: RunOptions, seed: int
) -> tuple[Run, float]:
    """Watch one forward and one backward pass, which leave the model as it was, and its loss."""
    limits = RunOptions(seed=seed, vanishing=options.vanishing, exploding=options.exploding)
    model = subject.model
    with untouched(model), watch(model, request.patterns, options=limits) as flow:
        loss = backward_pass(subject, example, request)
    return flow.run, loss.item()


def _at_step(run: Run, step: int) -> Run:
    layers = [replace(row, step=step) for row in run.layer_records]
    params = [replace(row, step=step) for row in run.param_records]
    return replace(run, layer_records=layers, param_records=params)


def _run_of(
    request: ModelRequest,
    options: RunOptions,
    results: _ModelResults,
    when: dict[str, Any],
    device: torch.device,
) -> Run:
    spec = _common_spec(request, results.runs)
    first = [run for run in results.runs if run.layer_records[0].step == 0]
    run = assembled_run(
        Measured(
            spec,
            options,
            describe_environment(spec, device) | when,
            layers=[row for run in results.runs for row in run.layer_records],
            params=[row for run in results.runs for row in run.param_records],
            steps=results.steps,
            losses=() if request.loss == "cotangent" else results.losses,
            warnings=list(dict.fromkeys(line for run in first for line in run.warnings)),
            peak_bytes=peak_bytes(device),
        )
    )
    return with_times(run, results.timing, results.pass_seconds)


def _common_spec(request: ModelRequest, runs: Sequence[Run]) -> ModelSpec:
    """Return the model as the passes found it; its layers must be the same in all of them."""
    # The last batch of an epoch may be smaller, so the shape is taken from the first one.
    specs = [replace(spec, shape="") for run in runs if isinstance(spec := run.spec, ModelSpec)]
    if any(spec != specs[0] for spec in specs):
        what = "has other layers from one seed or step to the next"
        raise MeasurementError(f"{without_digest(request.model)} {what}; {_ADVICE}")
    spec = runs[0].spec
    assert isinstance(spec, ModelSpec)
    return replace(spec, request=request, loss=request.loss)


def model_timer(request: ModelRequest, options: RunOptions, device: torch.device) -> Timer:
    """Return the timer of the first seed of a model, which is built on the device."""
    with settings_kept():
        return timer_of(build_subject(request, options.seed, device, options), request)


def timer_of(subject: Subject, request: ModelRequest) -> Timer:
    """Return the timer of a model and its first batch; it leaves parameters' `.grad` at None."""
    model, example = subject.model, next(subject.batches())
    places = layers_of(subject, example, request)

    def step() -> None:
        backward_pass(subject, example, request)
        model.zero_grad(set_to_none=True)

    with untouched(model):
        flops = counted_step(places, step)
    return Timer(
        timed=partial(timed_step, places, step),
        bare=partial(bare_step, step),
        summary=partial(layer_timing, [place.name for place in places], flops=flops),
    )


def layers_of(subject: Subject, example: Example, request: ModelRequest) -> list[WatchedLayer]:
    """Return the layers of a model, found in a watched pass where its modules do not tell."""
    model = subject.model
    if request.patterns is not None or repeats(model):
        return find_layers(model, request.patterns)
    with untouched(model), watch(model) as flow:
        backward_pass(subject, example, request)
    return flow.watched_layers
