"""How somebody's model is timed, and its operations counted: layer by layer, after its numbers."""

from __future__ import annotations

from functools import partial

import torch

from gradflow.engine.timing import Timer
from gradflow.measuring.models.batches import Example
from gradflow.measuring.models.one_pass import settings_kept, untouched
from gradflow.measuring.models.subjects import Subject, backward, build_subject
from gradflow.specs.model_request import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.watching import watch
from gradflow.watching.discovery import Place, find_layers, repeats
from gradflow.watching.times import bare_step, counted_step, put_together, timed_step


def model_timer(request: ModelRequest, options: RunOptions, device: torch.device) -> Timer:
    """Times the first seed of a model."""
    with settings_kept():
        return timer_of(build_subject(request, options.seed, device, options), request)


def timer_of(subject: Subject, request: ModelRequest) -> Timer:
    """Times a model with its first batch; parameters' `.grad` are None afterwards."""
    model, example = subject.model, next(subject.batches())
    places = layers_of(subject, example, request)

    def step() -> None:
        backward(subject, example, request)
        model.zero_grad(set_to_none=True)

    with untouched(model):
        flops = counted_step(places, step)
    return Timer(
        timed=partial(timed_step, places, step),
        bare=partial(bare_step, step),
        summary=partial(put_together, [place.name for place in places], flops=flops),
    )


def layers_of(subject: Subject, example: Example, request: ModelRequest) -> list[Place]:
    """The layers of a model; where only a run tells them, after one."""
    model = subject.model
    if request.patterns is not None or repeats(model):
        return find_layers(model, request.patterns)
    with untouched(model), watch(model) as flow:
        backward(subject, example, request)
    return flow.places
