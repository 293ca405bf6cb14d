"""The loss that puts the gradient into somebody's model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.errors import UsageError
from gradflow.measuring.models.batches import PAIRED, Example
from gradflow.measuring.models.one_pass import called, projection, real_output


def loss_of(model: nn.Module, example: Example, kind: str, seed: int) -> Tensor:
    """The scalar whose gradient is measured.

    cotangent: <c, y> with a random c of norm 1 and y the first floating tensor of the output.
    mse, ce: against the target, or against random values or labels. own: the model's own loss.

    Raises:
        UsageError: the output has none, or its shape and the target's do not go together.
    """
    output = _output(model, example.given, kind)
    if kind == "cotangent":
        return projection(output, seed)
    if kind == "own":
        return own_loss(output)
    y = real_output(output)
    source = torch.Generator().manual_seed(seed)
    if kind == "mse":
        target = (
            torch.randn(y.shape, generator=source) if example.target is None else example.target
        )
        return F.mse_loss(y, target.to(y))
    return cross_entropy(y, example.target, source)


def _output(model: nn.Module, given: Any, kind: str) -> Any:
    try:
        return called(model, given)
    except TypeError as error:
        if isinstance(given, list | tuple) and len(given) == 2 and kind not in PAIRED:
            rule = "a batch is what the model is called with"
            remedy = f"for pairs of input and target use --loss {' or '.join(PAIRED)}"
            raise UsageError(rule, str(error), remedy) from None
        raise


def own_loss(output: Any) -> Tensor:
    """What the output calls its loss, or the output itself where it is a scalar.

    Raises:
        UsageError: there is no such thing.
    """
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
