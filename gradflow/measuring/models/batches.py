"""Batches of a user's own: whatever their function, generator or list holds, without an end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from gradflow.errors import UsageError
from gradflow.specs.located import users_own
from gradflow.specs.model_request import ModelRequest, without_digest

# Losses that hold the output against a target.
PAIRED = ("ce", "mse")


@dataclass(frozen=True)
class Example:
    """One batch of a model.

    Attributes:
        given: one tensor, a tuple or list of arguments, or a mapping of names to them.
        target: labels or values of the output, where there are any.
    """

    given: Any
    target: Tensor | None = None


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Every tensor in it on the device, and those with a point in the number format."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: moved(item, device, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [moved(item, device, dtype) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def users_batches(
    thing: Any, request: ModelRequest, move: Callable[[Any], Any]
) -> Iterator[Example]:
    """The user's batches, from the start again when they end."""
    shown = without_digest(str(request.input))
    paired = request.loss in PAIRED
    for epoch in count():
        found = 0
        for batch in _each(thing, shown):
            found += 1
            yield _example(move(batch), paired=paired)
        if not found:
            got = "none" if epoch == 0 else "none when it is called again"
            raise UsageError(f"{shown} yields batches", got, "return a list or a new generator")


def _each(thing: Any, shown: str) -> Iterator[Any]:
    """One batch after the other: what is no iterable of batches is one batch itself."""
    with users_own(shown):
        made = thing() if callable(thing) else thing
        single = isinstance(made, Tensor | Mapping | tuple) or not isinstance(made, Iterable)
        source = iter([made] if single else made)
    while True:
        with users_own(shown):
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch


def _example(batch: Any, *, paired: bool) -> Example:
    """A pair is input and target, where the loss takes one."""
    if paired and isinstance(batch, list | tuple) and len(batch) == 2:
        given, target = batch
        if isinstance(target, Tensor):
            return Example(given, target)
    return Example(batch)
