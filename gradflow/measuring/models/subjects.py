"""What a `ModelRequest` names, built: a model, its batches, and its loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import count, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradflow.errors import UsageError
from gradflow.measuring.models.batches import Example, moved, users_batches
from gradflow.measuring.models.hugging_face import Build, as_inputs, inputs, resolve, tokens
from gradflow.measuring.models.losses import loss_of
from gradflow.measuring.models.one_pass import called, real_output, untouched
from gradflow.specs.located import Located, load, users_own
from gradflow.specs.model_request import ModelRequest, without_digest
from gradflow.specs.run_options import RunOptions
from gradflow.training.tasks import MarkovTask, PrototypeTask, Samples, Task

# Classes of the built-in tasks, as for stacks.
CLASSES = 10


@dataclass(frozen=True)
class Subject:
    """A model that can be measured.

    Attributes:
        model: on its device, in its number format, in training mode.
        batches: endless; every call begins anew.
        loss: a scalar, from the model and one of its batches.
        task: the source of the batches where it is a built-in one, whose floor is known.
    """

    model: nn.Module
    batches: Callable[[], Iterator[Example]]
    loss: Callable[[nn.Module, Example], Tensor]
    task: Task | None = None


def build_subject(
    request: ModelRequest, seed: int, device: torch.device, options: RunOptions
) -> Subject:
    """Model, batches and loss of one seed; all of torch's, numpy's and Python's numbers follow it.

    Raises:
        UsageError: something of the user's does not run, or is not what it has to be.
    """
    seed_all(seed)
    dtype = getattr(torch, request.dtype)
    build = resolve(request) if request.is_from_library else None
    with users_own(without_digest(request.model)):
        model = build.model() if build else _own_model(request)
        model = converted(model, device, dtype).train()
    torch.set_grad_enabled(True)  # whatever its code has left
    move = partial(moved, device=device, dtype=dtype)
    loss = partial(loss_of, kind=request.loss, seed=seed)
    if isinstance(request.input, Located):
        batches = partial(users_batches, load(request.input), request, move)
        return _whole(Subject(model, batches, loss))
    given = move(inputs(build, request, seed) if build else own_input(model, request, seed))
    subject = _whole(Subject(model, lambda: repeat(Example(given)), loss))
    return _trained(subject, build, request, seed) if options.steps else subject


def backward(subject: Subject, example: Example, request: ModelRequest) -> Tensor:
    """One forward and one backward pass; returns the loss."""
    with users_own(without_digest(request.model)), torch.enable_grad():
        loss = subject.loss(subject.model, example)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
    return loss.detach()


def _whole(subject: Subject) -> Subject:
    """Lazy parameters get their sizes when the model is first called."""
    if any(map(is_lazy, subject.model.parameters())):
        with torch.no_grad(), untouched(subject.model), users_own("the model"):
            called(subject.model, next(subject.batches()).given)
    return subject


def converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on the device, its real numbers in this format; complex ones of the same width.

    `Module.to` would make real numbers of complex ones.
    """
    wide = dtype.to_complex() if dtype != torch.bfloat16 else torch.complex64

    def each(x: Tensor) -> Tensor:
        kind = dtype if x.is_floating_point() else wide if x.is_complex() else None
        return x.to(device, kind)

    model._apply(each)  # type: ignore[no-untyped-call]  # torch's stubs
    return model


def seed_all(seed: int) -> None:
    """Set every generator that a model's own code may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the user's code may use it)
    random.seed(seed)


def own_input(model: nn.Module, request: ModelRequest, seed: int) -> Tensor:
    """Standard normal numbers; token ids where the first thing with parameters embeds them."""
    assert request.shape is not None
    source = torch.Generator().manual_seed(seed)
    symbols = vocabulary(model)
    if symbols is not None:
        return torch.randint(symbols, request.shape, generator=source)
    return torch.randn(request.shape, generator=source)


def vocabulary(model: nn.Module) -> int | None:
    """Symbols of the embedding that is the model's first part with parameters of its own."""
    for part in model.modules():
        if part is not model and next(part.parameters(recurse=False), None) is not None:
            return part.num_embeddings if isinstance(part, nn.Embedding) else None
    return None


def _own_model(request: ModelRequest) -> nn.Module:
    """What the user's function returns; sizes and settings are its arguments."""
    assert isinstance(request.model, Located)
    thing = load(request.model)
    named = {name: getattr(request, name) for name in ("depth", "width")}
    given = {name: value for name, value in named.items() if value is not None} | request.settings
    shown = without_digest(request.model)
    if isinstance(thing, nn.Module):
        if given:
            rule = f"{shown} is a model already, and takes no settings"
            raise UsageError(rule, ", ".join(given), "name a function or a class that builds it")
        return deepcopy(thing)  # every seed begins with these weights, which stay as they are
    if not callable(thing):
        rule = "--model names a function or a class that builds a model"
        raise UsageError(rule, type(thing).__name__, "name another")
    _check_arguments(thing, given, shown)
    model = thing(**given)
    if not isinstance(model, nn.Module):
        rule = f"{shown} returns an nn.Module"
        raise UsageError(rule, type(model).__name__, "return the model")
    return model


def _check_arguments(thing: Callable[..., Any], given: dict[str, Any], shown: str) -> None:
    try:
        signature(thing).bind(**given)
    except TypeError as error:
        rule = f"{shown} takes what --depth, --width and --set give"
        raise UsageError(rule, str(error), "add the parameter, or leave the option out") from None


def _trained(subject: Subject, build: Build | None, request: ModelRequest, seed: int) -> Subject:
    """The subject on a built-in task that fits its input and its output.

    Raises:
        UsageError: there is none.
    """
    example = next(subject.batches())
    x = _main(example.given)
    if request.loss != "ce" or (build and _is_ids(x) and not build.is_causal):
        rule = "training on a built-in task is that of classes, or of a causal model's next token"
        got = f"--model {without_digest(request.model)} --loss {request.loss}"
        raise UsageError(rule, got, "give batches: --input my_pkg.data:batches")
    outputs = _classes(subject.model, example)
    if _is_ids(x):
        shape = (x.shape[0], tokens(build, request) if build else x.shape[1])
        task: Task = MarkovTask(Samples(min(CLASSES, outputs), shape), x.device)
    else:
        classes = min(CLASSES, outputs, x.shape[1])
        task = PrototypeTask(Samples(classes, tuple(x.shape), x.dtype), x.device)
    return Subject(subject.model, partial(_task_batches, task, build, seed), subject.loss, task)


def _task_batches(task: Task, build: Build | None, seed: int) -> Iterator[Example]:
    for step in count():
        batch = task.batch(seed, step)
        ids = _is_ids(batch.x)
        labels = batch.labels.view(batch.x.shape) if ids else batch.labels
        given = batch.x if build is None else _named(build, batch.x)
        yield Example(given, labels)


def _named(build: Build, x: Tensor) -> dict[str, Tensor]:
    return as_inputs(build, x) if _is_ids(x) else {str(build.model_class.main_input_name): x}


def _main(given: Any) -> Tensor:
    x = next(iter(given.values())) if isinstance(given, Mapping) else given
    assert isinstance(x, Tensor)
    return x


def _is_ids(x: Tensor) -> bool:
    return not x.is_floating_point()


def _classes(model: nn.Module, example: Example) -> int:
    """Numbers in the output for each sample or token.

    Raises:
        UsageError: its shape is not that of logits.
    """
    with untouched(model), users_own("the model"):
        y = real_output(called(model, example.given))
    x = _main(example.given)
    if y.ndim < 2 or y.shape[:-1] != (x.shape if _is_ids(x) else x.shape[:1]) or y.shape[-1] < 2:
        rule = "training needs logits: (B, T, K) for tokens, (B, K) for other samples"
        raise UsageError(rule, str(tuple(y.shape)), "give batches: --input my_pkg.data:batches")
    return int(y.shape[-1])
