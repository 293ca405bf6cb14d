"""Parts of one forward and one backward pass through any model, which is left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradflow.errors import UsageError
from gradflow.watching.discovery import stream_of


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
