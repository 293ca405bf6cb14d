"""The input batch y_0, and the shapes of the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.networks.checkpoint import embed
from gradflow.networks.initial import fill, generator, module_slots
from gradflow.networks.norms import stream_norm, unit_norm
from gradflow.specs.stack import StackSpec


def stream_shape(spec: StackSpec) -> tuple[int, ...]:
    """Return the shape of y_0 ... y_D, of one stream."""
    batch = spec.batch_size
    return {
        "vectors": (batch, spec.width),
        "tokens": (batch, spec.tokens, spec.width),
        "images": (batch, spec.width, spec.side, spec.side),
    }[spec.kind.domain]


def state_shape(spec: StackSpec, layer: int, unit: int) -> tuple[int, ...]:
    """Return the shape of the output of unit number `unit` (from 0) of layer `layer` (from 1)."""
    batch, *rest = stream_shape(spec)
    streams = spec.streams(layer, unit)
    return (batch, *rest) if streams == 1 else (batch, streams, *rest)


def input_shape(spec: StackSpec, layer: int, unit: int) -> tuple[int, ...]:
    """Return the shape of the input of unit number `unit` (from 0) of layer `layer` (from 1)."""
    if (layer, unit) == (1, 0):
        return stream_shape(spec)
    before = (layer, unit - 1) if unit else (layer - 1, spec.units_per_block - 1)
    return state_shape(spec, *before)


def input_batch(spec: StackSpec, seed: int, device: torch.device) -> Tensor:
    """Return y_0: standard normal elements, scaled or normalised as the scheme has it.

    The input of a trained checkpoint is the embeddings of random tokens, so that the stream has its
    trained scale.
    """
    if spec.weights:
        rows = embed(spec.checkpoint, token_ids(spec, seed)[:, :-1], spec.width)
        return rows.to(device, getattr(torch, spec.dtype))
    x = standard_normal(spec, stream_shape(spec), generator(device, seed, "input"))
    return scaled_input(spec, x).detach()


def token_ids(spec: StackSpec, seed: int) -> Tensor:
    """Return uniform random tokens, (B, T + 1): the inputs and, one on, what comes next."""
    shape = (spec.batch_size, spec.tokens + 1)
    source = generator(torch.device("cpu"), seed, "tokens")
    return torch.randint(spec.classes, shape, generator=source)


def scaled_input(spec: StackSpec, x: Tensor) -> Tensor:
    """Return x scaled or normalised as the scheme has it."""
    if spec.scheme is None:
        return x
    scale = spec.scheme_record.input_scale(spec.depth)
    return _normalised_input(spec, x if scale == 1 else x * scale)


def _normalised_input(spec: StackSpec, x: Tensor) -> Tensor:
    if spec.scheme_record.input_norm == "unit":
        return unit_norm(x)
    if spec.scheme_record.input_norm is None:
        return x
    norm = stream_norm(spec)
    fill(module_slots(spec, norm), spec, x.device, generator(x.device, 0, "input norm"))
    return norm.requires_grad_(False)(x)


def standard_normal(spec: StackSpec, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Return standard normal elements in the number format of the spec."""
    values = torch.empty(shape, device=source.device).normal_(generator=source)
    return values.to(getattr(torch, spec.dtype))
