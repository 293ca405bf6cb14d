"""Build what a `ModelRequest` names: a model, its batches, its loss; run it, leaving no trace."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradflow.errors import UsageError
from gradflow.measuring.models.hugging_face import (
    Build,
    as_inputs,
    hugging_face_build,
    inputs,
    tokens,
)
from gradflow.specs.model_spec import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.specs.user_files import (
    LocatedName,
    errors_of_users_code,
    import_object,
    without_digest,
)
from gradflow.torch_internals import map_tensors
from gradflow.training.tasks import MarkovTask, PrototypeTask, Samples, Task
from gradflow.watching.discovery import stream_of

# Losses that compare the output with a target.
_PAIRED = ("ce", "mse")


@dataclass(frozen=True)
class Example:
    """One batch of a model: its input as for `called`; labels or values of the output, if any."""

    given: Any
    target: Tensor | None = None


def called(model: nn.Module, batch: Any) -> Any:
    """Call a model with one tensor, a tuple or list of arguments, or a mapping of names to them."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def real_output(output: Any) -> Tensor:
    """Return the first floating tensor of an output; if complex, its real and imaginary parts.

    Raises:
        UsageError: the output has no such tensor, or it takes no gradient.
    """
    y = stream_of(output)
    if y is None or not y.requires_grad:
        rule = "the model returns a floating tensor that takes a gradient"
        got = type(output).__name__ if y is None else "one without"
        raise UsageError(rule, got, "return one, thaw its parameters, or take another loss")
    return torch.view_as_real(y) if y.is_complex() else y


def projection(output: Any, seed: int) -> Tensor:
    """Return L = <c, y> with y = `real_output` and a random normal c of norm 1, so dL/dy = c."""
    y = real_output(output)
    c = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((c / c.norm()).to(y.device, y.dtype) * y).sum()


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put back torch's settings and the working directory, which a user's code may change."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    threads, folder = torch.get_num_threads(), Path.cwd()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        os.chdir(folder)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Start with gradients of None; put back gradients, buffers and random state at the end."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not is_lazy(b)]
    devices = {p.device.index for p, _ in grads if p.device.type == "cuda"}
    try:
        for p, _ in grads:
            p.grad = None
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def moved_to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a nested value with its tensors on the device, floating ones in the number format."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: moved_to(item, device, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [moved_to(item, device, dtype) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def users_batches(
    thing: Any, request: ModelRequest, move: Callable[[Any], Any]
) -> Iterator[Example]:
    """Yield the user's batches without end, from the start again when they are used up.

    The thing is a function, an iterable of batches, or one batch; the request's loss tells whether
    batches are pairs; `move` puts a batch on its device.

    Raises:
        UsageError: there are no batches.
    """
    shown = without_digest(str(request.input))
    paired = request.loss in _PAIRED
    for epoch in count():
        found = 0
        for batch in _each(thing, shown):
            found += 1
            yield _example(move(batch), paired=paired)
        if not found:
            got = "none" if epoch == 0 else "none when it is called again"
            raise UsageError(f"{shown} yields batches", got, "return a list or a new generator")


def _each(thing: Any, shown: str) -> Iterator[Any]:
    """Yield one batch after the other; anything but an iterable of batches is one batch."""
    with errors_of_users_code(shown):
        made = thing() if callable(thing) else thing
        single = isinstance(made, Tensor | Mapping | tuple) or not isinstance(made, Iterable)
        source = iter([made] if single else made)
    while True:
        with errors_of_users_code(shown):
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch


def _example(batch: Any, *, paired: bool) -> Example:
    """Return the batch as an example: a pair is input and target where the loss takes a target."""
    if paired and isinstance(batch, list | tuple) and len(batch) == 2:
        given, target = batch
        if isinstance(target, Tensor):
            return Example(given, target)
    return Example(batch)


def loss_of(model: nn.Module, example: Example, kind: str, seed: int) -> Tensor:
    """Return the scalar whose gradient is measured.

    The kind `cotangent` is <c, y> with a random c of norm 1 and y the first floating tensor of the
    output; `mse` and `ce` compare y with the target, or with random values or labels; `own` is the
    loss that the model returns. c, the values and the labels follow the seed.

    Raises:
        UsageError: the output has no loss, or its shape does not fit the target.
    """
    output = _output(model, example.given, kind)
    if kind == "cotangent":
        return projection(output, seed)
    if kind == "own":
        return _own_loss(output)
    y = real_output(output)
    source = torch.Generator().manual_seed(seed)
    if kind == "mse":
        given = example.target
        target = torch.randn(y.shape, generator=source) if given is None else given
        return F.mse_loss(y, target.to(y))
    return cross_entropy(y, example.target, source)


def _output(model: nn.Module, given: Any, kind: str) -> Any:
    try:
        return called(model, given)
    except TypeError as error:
        if isinstance(given, list | tuple) and len(given) == 2 and kind not in _PAIRED:
            rule = "a batch is what the model is called with"
            remedy = f"for pairs of input and target use --loss {' or '.join(_PAIRED)}"
            raise UsageError(rule, str(error), remedy) from None
        raise


def _own_loss(output: Any) -> Tensor:
    """Return the loss that an output holds, or the output itself where it is a scalar."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        rule = "--loss own is a scalar that the model returns, by itself or as .loss"
        raise UsageError(rule, type(output).__name__, "give it what it needs for that with --input")
    return found.reshape(())


def cross_entropy(y: Tensor, labels: Tensor | None, source: torch.Generator) -> Tensor:
    """Mean over all labels; classes lie on the last axis of tokens, on the second of images.

    Args:
        y: (B, K), (B, T, K) or (B, K, H, W).
        labels: all axes of y but that of the classes; random ones if None.
        source: of random labels.

    Raises:
        UsageError: the shapes do not go together.
    """
    shapes = {y.ndim - 1: y.shape[:-1], 1: y.shape[:1] + y.shape[2:]}
    axis = 1 if y.ndim == 4 else y.ndim - 1
    if labels is not None:
        fitting = [place for place in (axis, *shapes) if shapes.get(place) == labels.shape]
        if not fitting:
            got = f"output {tuple(y.shape)}, labels {tuple(labels.shape)}"
            rule = "labels have the shape of the output less its classes"
            raise UsageError(rule, got, "give pairs (input, labels), or another --loss")
        axis = fitting[0]
    else:
        labels = torch.randint(y.shape[axis], shapes[axis], generator=source)
    return F.cross_entropy(y.movedim(axis, -1).flatten(0, -2), labels.flatten().to(y.device))


# Classes of the built-in tasks, as for stacks.
_CLASSES = 10


@dataclass(frozen=True)
class Subject:
    """A model that can be measured.

    Attributes:
        model: the module on its device, in its number format, in training mode.
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
    _seed_all(seed)
    dtype = getattr(torch, request.dtype)
    build = hugging_face_build(request) if request.is_from_library else None
    with errors_of_users_code(without_digest(request.model)):
        model = build.model() if build else _own_model(request)
        model = _converted(model, device, dtype).train()
    torch.set_grad_enabled(True)  # whatever its code has left
    move = partial(moved_to, device=device, dtype=dtype)
    loss = partial(loss_of, kind=request.loss, seed=seed)
    if isinstance(request.input, LocatedName):
        batches = partial(users_batches, import_object(request.input), request, move)
        return _whole(Subject(model, batches, loss))
    given = move(inputs(build, request, seed) if build else _own_input(model, request, seed))
    subject = _whole(Subject(model, lambda: repeat(Example(given)), loss))
    return _trained(subject, build, request, seed) if options.steps else subject


def backward_pass(subject: Subject, example: Example, request: ModelRequest) -> Tensor:
    """Run one forward and one backward pass; return the loss, detached."""
    with errors_of_users_code(without_digest(request.model)), torch.enable_grad():
        loss = subject.loss(subject.model, example)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
    return loss.detach()


def _whole(subject: Subject) -> Subject:
    """Return the subject after a first call, which gives lazy parameters their sizes."""
    if any(map(is_lazy, subject.model.parameters())):
        with torch.no_grad(), untouched(subject.model), errors_of_users_code("the model"):
            called(subject.model, next(subject.batches()).given)
    return subject


def _converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model to the device, real numbers to a format, complex ones to the same width."""
    wide = dtype.to_complex() if dtype != torch.bfloat16 else torch.complex64

    def each(x: Tensor) -> Tensor:
        kind = dtype if x.is_floating_point() else wide if x.is_complex() else None
        return x.to(device, kind)

    map_tensors(model, each)
    return model


def _seed_all(seed: int) -> None:
    """Seed every generator that a model's code may draw from: of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the user's code may use it)
    random.seed(seed)


def _own_input(model: nn.Module, request: ModelRequest, seed: int) -> Tensor:
    """Return standard normal numbers, or token ids if the model's first part embeds tokens."""
    assert request.shape is not None
    source = torch.Generator().manual_seed(seed)
    symbols = _vocabulary(model)
    if symbols is not None:
        return torch.randint(symbols, request.shape, generator=source)
    return torch.randn(request.shape, generator=source)


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of symbols if the first part with parameters is an embedding; else None."""
    for part in model.modules():
        if part is not model and next(part.parameters(recurse=False), None) is not None:
            return part.num_embeddings if isinstance(part, nn.Embedding) else None
    return None


def _own_model(request: ModelRequest) -> nn.Module:
    """Return the model that the user's function makes from the sizes and settings asked for."""
    assert isinstance(request.model, LocatedName)
    thing = import_object(request.model)
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
    """Return the subject with the batches of a built-in task that fits its input and output."""
    example = next(subject.batches())
    x = _main(example.given)
    if request.loss != "ce" or (build and _is_ids(x) and not build.is_causal):
        rule = "training on a built-in task is that of classes, or of a causal model's next token"
        got = f"--model {without_digest(request.model)} --loss {request.loss}"
        raise UsageError(rule, got, "give batches: --input my_pkg.data:batches")
    outputs = _classes(subject.model, example)
    if _is_ids(x):
        shape = (x.shape[0], tokens(build, request) if build else x.shape[1])
        task: Task = MarkovTask(Samples(min(_CLASSES, outputs), shape), x.device)
    else:
        classes = min(_CLASSES, outputs, x.shape[1])
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
    """Return the number of logits for each sample or token."""
    with untouched(model), errors_of_users_code("the model"):
        y = real_output(called(model, example.given))
    x = _main(example.given)
    if y.ndim < 2 or y.shape[:-1] != (x.shape if _is_ids(x) else x.shape[:1]) or y.shape[-1] < 2:
        rule = "training needs logits: (B, T, K) for tokens, (B, K) for other samples"
        raise UsageError(rule, str(tuple(y.shape)), "give batches: --input my_pkg.data:batches")
    return int(y.shape[-1])
