"""`measure_model`: a `ModelRequest`, all its seeds, one device; from a request to a `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from statistics import median
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
from gradflow.measuring.models.one_pass import settings_kept, untouched
from gradflow.measuring.models.subjects import Example, Subject, backward_pass, build_subject
from gradflow.measuring.progress import Progress
from gradflow.runs.records import Run, StepRecord, Timing
from gradflow.specs.model_spec import ModelRequest, ModelSpec
from gradflow.specs.run_options import RunOptions
from gradflow.specs.user_files import errors_of_users_code, without_digest
from gradflow.text import gib
from gradflow.training.steps import Problem, step_record, train
from gradflow.watching import watch
from gradflow.watching.discovery import WatchedLayer, find_layers, repeats
from gradflow.watching.times import bare_step, counted_step, layer_timing, timed_step


def model_timer(request: ModelRequest, options: RunOptions, device: torch.device) -> Timer:
    """Times the first seed of a model."""
    with settings_kept():
        return timer_of(build_subject(request, options.seed, device, options), request)


def timer_of(subject: Subject, request: ModelRequest) -> Timer:
    """Times a model with its first batch; parameters' `.grad` are None afterwards."""
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
    """The layers of a model; where only a run tells them, after one."""
    model = subject.model
    if request.patterns is not None or repeats(model):
        return find_layers(model, request.patterns)
    with untouched(model), watch(model) as flow:
        backward_pass(subject, example, request)
    return flow.watched_layers


# Parameters and their gradients; with them, training has two moments and the values before.
_COPIES, _TRAINED_COPIES = 2, 5
_ADVICE = "name those that always run with --layers"


@dataclass
class _Found:
    """All seeds so far; `seconds` are those of the passes that were watched."""

    runs: list[Run] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    timing: Timing | None = None


def measure_model(
    request: ModelRequest,
    options: RunOptions,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
) -> Run:
    """Measure gradient flow, and the time of each layer, in somebody's model.

    The model is watched during one forward and one backward pass in training mode, or during
    those of its training; times come from passes of their own.

    Raises:
        UsageError: the device is not there, or something of the user's does not run.
        MeasurementError: out of memory, no layer has run, or seeds have other layers.
    """
    device = resolve_device(options.device, request.dtype)
    started, begin = datetime.now(UTC), perf_counter()
    progress("building", 0, 1)
    check_memory(request, options, device)
    reset_peak(device)
    work = _Work(request, options, device, progress, clock or clock_for(device))
    try:
        with settings_kept():
            found = work.all_seeds()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MeasurementError(_too_large(request, None, available_bytes(device))) from None
    when = {
        "start_utc": started.isoformat(timespec="seconds"),
        "duration_s": perf_counter() - begin,
    }
    return _to_run(request, options, found, when, device)


def check_memory(request: ModelRequest, options: RunOptions, device: torch.device) -> None:
    """Refuse a model of `transformers` that cannot fit before the system kills the process.

    Raises:
        MeasurementError: more is needed than is available.
    """
    needed = model_bytes(request, options)
    free = available_bytes(device)
    if needed > free:
        raise MeasurementError(_too_large(request, needed, free))


def _too_large(request: ModelRequest, needed: int | None, free: int) -> str:
    size = "does not fit" if needed is None else f"needs at least {gib(needed)}"
    lower = "--depth, --width, --batch-size or --seq-len" if request.is_from_library else "--input"
    name = without_digest(request.model)
    return f"out of memory: {name} {size}, {gib(free)} are free; lower {lower}"


def model_bytes(request: ModelRequest, options: RunOptions) -> int:
    """Parameters and gradients of a model of `transformers`; of others nothing is known."""
    if not request.is_from_library:
        return 0
    build = hugging_face_build(request)
    with errors_of_users_code(without_digest(request.model)):
        numbers = build.parameters
    copies = _TRAINED_COPIES if options.steps else _COPIES
    return numbers * copies * int(getattr(torch, request.dtype).itemsize)


@dataclass(frozen=True)
class _Work:
    """One measurement under way."""

    request: ModelRequest
    options: RunOptions
    device: torch.device
    progress: Progress
    clock: Clock

    def all_seeds(self) -> _Found:
        """Seed by seed; the first is timed, once its numbers are there.

        Passes that are timed draw random numbers and move running averages, and how many there
        are is up to the machine: none of it may reach the numbers.
        """
        found = _Found()
        for seed in self.options.all_seeds:
            self.progress(f"building, seed {seed}", 0, 1)
            subject = build_subject(self.request, seed, self.device, self.options)
            self.progress(f"gradients, seed {seed}", 0, 1)
            if self.options.steps:
                self._train(subject, seed, found)
            else:
                self._watch(subject, seed, found)
            if self.options.timing and found.timing is None:
                found.timing = self._time(subject)
            del subject  # or the next one would be built beside it
        return found

    def _time(self, subject: Subject) -> Timing | None:
        done = count(1)

        def tick() -> None:
            self.progress("timing", min(next(done), self.options.repeats), self.options.repeats)

        found = take_times(timer_of(subject, self.request), self.options, self.clock, tick)
        if found is None:
            return None
        rate = matmul_flop_per_s(self.device, self.request.dtype, self.clock)
        return replace(found, matmul_flop_per_s=rate)

    def _watch(self, subject: Subject, seed: int, found: _Found) -> None:
        marks = [self.clock.mark()]
        run, loss = watched(subject, next(subject.batches()), self.request, self.options, seed)
        marks.append(self.clock.mark())
        found.seconds += self.clock.seconds(marks)
        found.runs.append(run)
        found.losses.append(loss)

    def _train(self, subject: Subject, seed: int, found: _Found) -> None:
        """Train one seed; what is measured on the way changes nothing in it."""

        def observe(step: int, example: Example) -> None:
            run, loss = watched(subject, example, self.request, self.options, seed)
            found.runs.append(_at_step(run, step))
            found.losses += [loss] * (step == 0)

        def loss(_: nn.Module, example: Example) -> Tensor:
            with errors_of_users_code(without_digest(self.request.model)):
                return subject.loss(subject.model, example)

        what = f"training, seed {seed}"
        for step in train(Problem(subject.model, subject.batches(), loss), self.options, observe):
            found.steps.append(step_record(seed, step, subject.task))
            self.progress(what, step.step, self.options.steps)


def watched(
    subject: Subject, example: Example, request: ModelRequest, options: RunOptions, seed: int
) -> tuple[Run, float]:
    """One forward and one backward pass under watch, and its loss; the model stays as it was."""
    limits = RunOptions(seed=seed, vanishing=options.vanishing, exploding=options.exploding)
    model = subject.model
    with untouched(model), watch(model, request.patterns, options=limits) as flow:
        loss = backward_pass(subject, example, request)
    return flow.run, loss.item()


def _at_step(run: Run, step: int) -> Run:
    return replace(
        run,
        layer_records=[replace(row, step=step) for row in run.layer_records],
        param_records=[replace(row, step=step) for row in run.param_records],
    )


def _to_run(
    request: ModelRequest,
    options: RunOptions,
    found: _Found,
    when: dict[str, Any],
    device: torch.device,
) -> Run:
    spec = _common_spec(request, found.runs)
    first = [run for run in found.runs if run.layer_records[0].step == 0]
    run = assembled_run(
        Measured(
            spec,
            options,
            describe_environment(spec, device) | when,
            layers=[row for run in found.runs for row in run.layer_records],
            params=[row for run in found.runs for row in run.param_records],
            steps=found.steps,
            losses=() if request.loss == "cotangent" else found.losses,
            warnings=list(dict.fromkeys(line for run in first for line in run.warnings)),
            peak_bytes=peak_bytes(device),
        )
    )
    if found.timing is None:
        return run
    return with_times(run, found.timing, median(found.seconds) if found.seconds else None)


def _common_spec(request: ModelRequest, runs: Sequence[Run]) -> ModelSpec:
    """The model as it was found, which no seed and no step may change."""
    # The last batch of an epoch may be smaller: the stream is that of the first.
    specs = [replace(spec, shape="") for run in runs if isinstance(spec := run.spec, ModelSpec)]
    if any(spec != specs[0] for spec in specs):
        name = without_digest(request.model)
        what = "has other layers from one seed or step to the next"
        raise MeasurementError(f"{name} {what}; {_ADVICE}")
    spec = runs[0].spec
    assert isinstance(spec, ModelSpec)
    return replace(spec, request=request, loss=request.loss)
