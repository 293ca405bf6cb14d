"""The stream in what modules take and return: a tensor, or one in a tuple, dict, dataclass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

# The names that libraries give the stream, where a container holds several tensors.
STREAM_NAMES = ("last_hidden_state", "hidden_states", "hidden_state")


def is_stream(value: object) -> bool:
    """Whether a gradient can flow through it: a dense floating or complex tensor."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.is_floating_point() or value.is_complex()


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor that can be a stream, the likeliest first."""
    if is_stream(value):
        assert isinstance(value, Tensor)
        yield value
    elif isinstance(value, Mapping):
        named = [value[name] for name in STREAM_NAMES if name in value]
        for item in (*named, *value.values()):
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors({f.name: getattr(value, f.name) for f in fields(value)})


def stream_of(value: object, shape: torch.Size | None = None) -> Tensor | None:
    """The first tensor of this shape, else the first; None where there is none."""
    found = tensors(value)
    first = next(found, None)
    if shape is None or first is None or first.shape == shape:
        return first
    return next((x for x in found if x.shape == shape), first)


def exchanged(value: Any, old: Tensor, make: Callable[[Tensor], Tensor]) -> Any:
    """`value` with the tensor `old` replaced by `make(old)`, all else as it was."""
    if value is old:
        return make(old)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(exchanged(item, old, make) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(exchanged(item, old, make) for item in value)
    if isinstance(value, Mapping) and any(item is old for item in value.values()):
        items = {name: exchanged(item, old, make) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        changed = {n: exchanged(v, old, make) for n, v in held.items() if v is old}
        return replace(value, **changed) if changed else value
    return value
